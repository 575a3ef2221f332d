"""The script for a GPU runs without one: toys in place of models, and what it lacks is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent


def check(work: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(work), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_toys_pass_and_what_is_lacking_is_named(tmp_path: Path) -> None:
    names = ["environment", "packing", "capture-hf", "trainer-p-kl", *([] if torch.cuda.is_available() else ["liger"])]
    done = check(tmp_path, "--only", ",".join(names))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "checks.json").read_text())
    verdicts = {name: one["verdict"] for name, one in found["checks"].items()}
    assert verdicts == {name: "not run" if name == "liger" else "passed" for name in names}
    assert found["checks"]["trainer-p-kl"]["figures"]["tokens per second"] > 0
    assert "liger: needs a GPU" in done.stdout or torch.cuda.is_available()


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
