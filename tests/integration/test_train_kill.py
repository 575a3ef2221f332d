"""Training that is killed, preempted or out of disk at any moment: run again, it ends in the bits of a quiet run."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toys import toys
from train_kill import Child, Nursery, nursery

from xtoken.schemas.configs.train import TrainConfig

KILLS = 20
STEPS = 40
SAVE_EVERY = 3
TIMING = {"seconds", "tokens_per_s"}
RESTARTS = {"resumed", "preempted"}  # events that only a disturbed run has
LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7], [20, 2, 8]]


class Runs:
    """Training runs that differ in nothing but their folder and what is done to them."""

    def __init__(self, forks: Nursery, folder: Path, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        self.forks, self.folder, self.config, self.tokenizer = forks, folder, config, tokenizer

    def start(self, name: str, fault: dict[str, Any] | None = None, **options: Any) -> Child:
        """Start the run ``name``, or start it again."""
        config = self.config | {"out": str(self.out(name))} | options
        job = {"config": config, "tokenizer": self.tokenizer, "log": str(self.log(name))}
        return self.forks.start(job | (fault or {}))

    def finish(self, name: str, **options: Any) -> None:
        """Run to the end without a fault."""
        assert self.start(name, **options).end() == 0, self.log(name).read_text()

    def out(self, name: str) -> Path:
        return self.folder / name

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def steps(self, name: str) -> int:
        """Optimizer steps in metrics.jsonl."""
        path = self.out(name) / "metrics.jsonl"
        return path.read_bytes().count(b'"grad_norm"') if path.exists() else 0

    def saved(self, name: str) -> list[int]:
        """Steps of published checkpoints."""
        return sorted(int(path.name[5:]) for path in (self.out(name) / "checkpoints").glob("step-*"))

    def torn(self, name: str) -> bool:
        """Whether a checkpoint was being written or deleted when the run died."""
        return any((self.out(name) / "checkpoints").glob(".step-*"))


def metrics(out: Path) -> list[dict[str, Any]]:
    """Whole lines, without timing and without what a restart adds."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found if line.get("event") not in RESTARTS]


def same_as(quiet: Path, out: Path) -> None:
    """Model, figures and all else that a run leaves are equal bit for bit."""
    assert metrics(quiet) == metrics(out)
    summaries = [json.loads((root / "summary.json").read_text()) for root in (quiet, out)]
    first, second = ({k: v for k, v in one.items() if k not in TIMING | {"model"}} for one in summaries)
    assert first == second
    differ = {"metrics.jsonl", "summary.json", "run.json"}  # compared above; argv and times
    files = [
        {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name not in differ and path.parent.parent.name != "checkpoints"
        }
        for root in (quiet, out)
    ]
    assert files[0].keys() == files[1].keys()
    assert "model/model.safetensors" in files[0]
    for name, data in files[0].items():
        assert data == files[1][name], name


def write_student(folder: Path, toy: ModuleType) -> str:
    """A random Llama with dropout: what is random in a step must come back, too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=toy.V, max_position_embeddings=64, attention_dropout=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of a tiny student; the first, ``quiet``, is left alone."""
    folder, toy = tmp_path_factory.mktemp("train-kill"), toys()
    targets = toy.write_targets(folder / "targets", toy.Pair(), LENGTHS, losses=("p-kl",))
    config = TrainConfig.from_flat(
        targets=[targets],
        student=write_student(folder / "student", toy),
        out="set below",
        device="cpu",
        steps=STEPS,
        step_tokens=48,
        micro_tokens=24,
        max_tokens=32,
        warmup=3,
        lr=1e-2,
        save_every=SAVE_EVERY,
        keep=2,
        eval_every=7,
        completions=0,
    )
    with nursery() as forks:
        made = Runs(forks, folder, config.record(), toy.STUDENT.model_dump(mode="json"))
        made.finish("quiet")
        yield made


def kill(runs: Runs, name: str, moments: random.Random, **options: Any) -> bool:
    """Start ``name`` and kill -9 it, after a random step by the clock or within a checkpoint; whether that ended it."""
    if moments.random() < 0.5:
        fault = {"die": [moments.randint(1, 3), moments.randint(1, 16)]}
        return runs.start(name, fault, **options).end() == -signal.SIGKILL
    # at a point of the work rather than of the clock alone: how fast this machine is must not decide what is hit;
    # a step that an earlier start has passed is a moment while the program starts
    step, delay = moments.randrange(STEPS), moments.uniform(0, 0.05)
    child = runs.start(name, **options)
    child.wait_for(lambda: runs.steps(name) >= step)
    time.sleep(delay)
    child.send(signal.SIGKILL)
    return child.end() == -signal.SIGKILL


def test_kill_9_at_twenty_random_moments(runs: Runs, figure: Callable[[str], None]) -> None:
    moments = random.Random(20261122)
    kills = torn = folders = 0
    at = []
    while kills < KILLS:
        folders += 1
        assert folders < KILLS
        name = f"killed-{folders}"
        for _ in range(5):  # a few per folder, so that resumed runs are killed too
            if kills < KILLS and kill(runs, name, moments):
                kills += 1
                torn += runs.torn(name)
                at.append(runs.steps(name))
        runs.finish(name)
        same_as(runs.out("quiet"), runs.out(name))
        assert not runs.torn(name)
    assert torn > 0, "some die in the middle of a checkpoint"
    figure(
        f"train: {kills} x kill -9 after steps {at} of {STEPS}, {torn} within a checkpoint, {folders} runs, same bits"
    )


def test_kill_9_of_a_run_that_goes_back(runs: Runs, figure: Callable[[str], None]) -> None:
    """A nervous run, which often leaves a step out: killed at random, it leaves out the same ones."""
    moments = random.Random(20261124)
    nervous = {"spike": 0.5, "rollback": 100}
    runs.finish("nervous", **nervous)
    back = [line["left_out"] for line in metrics(runs.out("nervous")) if line.get("event") == "rollback"]
    assert back, "it has to go back to show anything"
    kills = sum(kill(runs, "nervous-killed", moments, **nervous) for _ in range(6))
    assert kills
    runs.finish("nervous-killed", **nervous)
    same_as(runs.out("nervous"), runs.out("nervous-killed"))
    figure(f"train: {kills} x kill -9 of a run that leaves out batches {back}, same bits")


def test_sigterm_saves_and_the_rerun_goes_on(runs: Runs) -> None:
    """Three times at a random step, no checkpoint being due: each ends with exit code 0 and loses no step."""
    moments = random.Random(20261123)
    for low, high in ((1, 4), (7, 11), (14, 18)):
        step = moments.randint(low, high)
        child = runs.start("preempted", save_every=1000)
        child.wait_for(lambda step=step: runs.steps("preempted") >= step)
        time.sleep(moments.uniform(0, 0.03))
        child.send(signal.SIGTERM)
        assert child.end() == 0, runs.log("preempted").read_text()
        assert not (runs.out("preempted") / "summary.json").exists(), "it ended before it heard"
        assert runs.saved("preempted")[-1] == runs.steps("preempted") >= step
    runs.finish("preempted")
    same_as(runs.out("quiet"), runs.out("preempted"))


def test_a_full_disk_leaves_the_last_checkpoint(runs: Runs) -> None:
    """Room for a part of the first checkpoint, of the third, and of the next one: the run says so; then all fits."""
    checkpoint = next((runs.out("quiet") / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    for checkpoints, saved in ((0.3, []), (2.7, [SAVE_EVERY, 2 * SAVE_EVERY]), (0.9, [SAVE_EVERY, 2 * SAVE_EVERY])):
        assert runs.start("full", {"room": int(checkpoints * size)}).end() == 2
        assert "No space left on device); earlier checkpoints stay, make room" in runs.log("full").read_text()
        assert runs.saved("full") == saved
        assert not runs.torn("full"), "what was begun takes no room"
    runs.finish("full")
    same_as(runs.out("quiet"), runs.out("full"))
