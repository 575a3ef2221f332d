"""Under FSDP one rank reads the student and the others receive their shards of it; two ranks, on gloo."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_ranks import FULL, ONE, TWO, begin, curve, job, run  # noqa: F401 - job is a fixture

SCRATCH = {"student": None}


def without_weights(path: Path) -> str:
    """A copy of a job's student that has all its files but the weights."""
    student = Path(json.loads(path.read_text())["config"]["student"])
    copy = path.with_suffix(".outline")
    shutil.copytree(student, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(copy.glob("*.safetensors"))
    assert list(student.glob("*.safetensors"))
    return str(copy)


def change(path: Path, **more: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return path


def begun_with(folder: Path, path: Path, ranks: tuple[str, ...], **more: Any) -> tuple[list[Any], Path]:
    """Run a job; what each rank began with, and the run."""
    folder.mkdir()
    out = run(change(path, weights=str(folder), **more), ranks)
    return [torch.load(file) for file in sorted(folder.glob("*.pt"))], out


@pytest.mark.parametrize("options", [{}, {"lora": 4, **FULL}], ids=["whole", "adapters"])
def test_the_second_rank_needs_no_weights(job: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:  # noqa: F811
    """Its folder has none. What it holds is what one rank alone would, bit by bit, and all steps are the same."""
    name = f"load-{len(options)}"
    (alone,), _ = begun_with(tmp_path / "alone", job(f"{name}-alone", steps=1, warmup=0, **options), ONE)
    every, before = begun_with(tmp_path / "all", job(f"{name}-all", parallel="fsdp", **options), TWO, outlines=False)
    path = job(f"{name}-first", parallel="fsdp", **options)
    received, out = begun_with(tmp_path / "first", path, TWO, second={"student": without_weights(path)})
    assert len(every) == len(received) == 2
    for one in (*every, *received):
        assert (one["tied"], one["frozen"]) == (alone["tied"], alone["frozen"])
        assert one["whole"].keys() == alone["whole"].keys()
        assert all(torch.equal(one["whole"][name], value) for name, value in alone["whole"].items())
    assert bool(alone["frozen"]) == bool(options)
    for line, twin in zip(curve(before), curve(out), strict=True):
        for figure in ("loss", "kd", "ce", "grad_norm"):
            assert twin[figure] == line[figure], figure


def test_random_weights_are_made_once(job: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    config = Path(json.loads(job("scratch-of").read_text())["config"]["student"], "config.json")
    fields = json.loads(config.read_text()) | {"bos_token_id": 0, "eos_token_id": 1}
    made = tmp_path / "config.json"
    made.write_text(json.dumps({key: one for key, one in fields.items() if key not in ("architectures", "dtype")}))
    options = {"student": None, "from_scratch": str(made), "steps": 2, "warmup": 0}
    (alone,), _ = begun_with(tmp_path / "alone", job("scratch-alone", **options), ONE)
    both, _ = begun_with(tmp_path / "both", job("scratch-both", parallel="fsdp", **options), TWO)
    for one in both:
        assert one["whole"].keys() == alone["whole"].keys()
        assert all(torch.equal(one["whole"][name], value) for name, value in alone["whole"].items())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    ],
    ids=["weights", "config"],
)
def test_what_the_first_rank_cannot_load_ends_all(
    job: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    break_it: Callable[[Path], object],
    said: str,
) -> None:
    """Each says the first one's error; the second, whose own folder is whole, does not wait for weights."""
    path = job(f"broken-{said}-{break_it.__code__.co_firstlineno}", parallel="fsdp")
    whole = json.loads(path.read_text())["config"]["student"]
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    break_it(broken)
    fields = json.loads(path.read_text())
    change(path, config=fields["config"] | {"student": str(broken)}, second={"student": whole})
    process = begin(path, (*TWO, "--tee", "3"))
    try:
        text, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("a rank waits for what will not come")
    assert process.returncode
    for rank in ("0", "1"):
        mine = [line for line in text.splitlines() if f"{rank}]:" in line and "XtokenError" in line]
        assert any(str(broken) in line and said in line for line in mine), text[-4000:]


def test_another_architecture_is_refused_on_both(job: Callable[..., Path]) -> None:  # noqa: F811
    path = job("unlike", parallel="fsdp")
    other = Path(without_weights(path))
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    process = begin(change(path, second={"student": str(other)}), TWO)
    text, _ = process.communicate(timeout=120)
    assert process.returncode
    assert text.count("use --parallel ddp") >= 2
