"""Whole runs of a tiny student: it learns, resumes bit for bit, and refuses what does not fit."""

import errno
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import xtoken.trainer.loop as loop
import xtoken.trainer.opening as opening
import xtoken.trainer.start as start
from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate import EvalSample, evaluate
from xtoken.trainer.loop import train
from xtoken.trainer.metrics import Metrics
from xtoken.trainer.optim import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7]]
HELD_OUT = [EvalSample(np.array([3, 4, 5, 6], np.int32), 9, 2), EvalSample(np.array([7, 8], np.int32), 3, 1)]


FACTOR = {"p-kl": 0.55, "h-kl": 0.75, "ce": 0.6}


class Stop(Exception):
    """Stands for a kill."""


class Deadly:
    """``run_step`` that ends the process, as far as the loop can tell, at its n-th call."""

    def __init__(self, real: Callable[..., Any], calls: int) -> None:
        self.real, self.left = real, calls

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Stop
        return self.real(*args, **options)


@pytest.fixture
def configure(make_targets: Callable[..., str], student_dir: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    root = make_targets(LENGTHS)

    def build(**options: Any) -> TrainConfig:
        base = {"targets": [root], "student": student_dir, "out": str(tmp_path / "run"), "device": "cpu"}
        sizes = {"steps": 12, "step_tokens": 24, "micro_tokens": 14, "max_tokens": 32, "warmup": 3, "save_every": 5}
        losses = {"loss": [options.pop("loss", "p-kl")]} if isinstance(options.get("loss", ""), str) else {}
        return TrainConfig.from_flat(**{**base, **sizes, "lr": 1e-2, **losses, **options})

    return build


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}/model/model.safetensors")


def steps_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tiny_student_learns(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any, loss: str
) -> None:
    """On sixteen samples of random targets it learns some by heart: ``FACTOR`` of the first steps' loss at most."""
    root = make_targets(LENGTHS, name="one", losses=(loss,))
    sizes = {"steps": 120, "step_tokens": 80, "micro_tokens": 80, "warmup": 5}
    config = configure(targets=[root], loss=loss, **sizes, lr=2e-2, kd_weight=1.0, ce_weight=0.0)
    train(config, student_info, [], Silent())
    factor = FACTOR.get(loss, 0.85)
    values = [line["ce" if loss == "ce" else "kd"] for line in steps_of(config.out)]
    assert np.mean(values[-5:]) < factor * np.mean(values[:3]), (values[:3], values[-5:])


@pytest.mark.parametrize("mix", ["fixed", "dynamic", "gradmag"])
def test_resume_is_bit_exact(
    configure: Callable[..., TrainConfig],
    student_info: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mix: str,
) -> None:
    """Killed in step 9 after a checkpoint at 5, and again in 11: weights and metrics are those of a quiet run."""
    options: dict[str, Any] = {"mix": mix, "learn_w": mix == "fixed"}
    options |= {"gradmag_every": 3} if mix == "gradmag" else {}
    quiet = configure(out=str(tmp_path / "quiet"), **options)
    train(quiet, student_info, HELD_OUT, Silent())
    config, real = configure(**options), loop.run_step
    for calls in (9, 6):  # the second start goes on after step 5
        monkeypatch.setattr(loop, "run_step", Deadly(real, calls))
        with pytest.raises(Stop):
            train(config, student_info, HELD_OUT, Silent())
    monkeypatch.setattr(loop, "run_step", real)
    assert steps_of(config.out)[-1]["step"] == 10, "killed in step 11"
    summary = train(config, student_info, HELD_OUT, Silent())
    for name, value in weights(quiet.out).items():
        assert torch.equal(value, weights(config.out)[name]), name
    if mix == "fixed":
        learned = [np.load(Path(one.out, "w-0.npy")) for one in (quiet, config)]
        np.testing.assert_array_equal(*learned)
        assert (learned[0] != Targets(quiet.data.targets[0]).w.weight).any()
    timing = ("seconds", "tokens_per_s")
    ours, theirs = (
        [{k: v for k, v in s.items() if k not in timing} for s in steps_of(o)] for o in (config.out, quiet.out)
    )
    assert ours == theirs
    assert [line["step"] for line in ours if "loss" in line] == list(range(1, 13))
    assert theirs[-1] == {"step": 12, "eval": "after", **summary["after"]}


def test_the_embedding_settles_before_the_body_moves(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Through step 5 the body is what it was, undecayed and without optimizer state; then it learns. A kill on either
    side of that changes no bit."""
    options: dict[str, Any] = {"freeze_steps": 5, "weight_decay": 0.5}
    quiet = configure(out=str(tmp_path / "quiet"), keep=9, **options)
    train(quiet, student_info, [], Silent())
    before = load_file(Path(student_dir) / "model.safetensors")
    folders = {step: Path(quiet.out) / "checkpoints" / f"step-{step:06d}" for step in (5, 10, 12)}
    after = {step: load_file(folder / "model.safetensors") for step, folder in folders.items()}
    table = "model.embed_tokens.weight"
    for name, value in before.items():
        assert torch.equal(value, after[5][name]) == (name != table), name
        assert not torch.equal(value, after[10][name]), name
    states = {step: load_file(folder / "optimizer.safetensors") for step, folder in folders.items()}
    assert {name.partition(":")[2] for name in states[5]} == {table}
    assert {name.partition(":")[2] for name in states[10]} == before.keys()
    assert {int(value) for name, value in states[10].items() if name.startswith("step:")} == {5, 10}
    for calls in (3, 7, 12):  # in the steps 3, 7 and 12: before the body moves, behind that, and close to the end
        config = configure(out=str(tmp_path / f"killed-{calls}"), save_every=2, **options)
        with monkeypatch.context() as patched:
            patched.setattr(loop, "run_step", Deadly(loop.run_step, calls))
            with pytest.raises(Stop):
                train(config, student_info, [], Silent())
        train(config, student_info, [], Silent())
        assert all(torch.equal(value, weights(config.out)[name]) for name, value in weights(quiet.out).items())


def test_a_checkpoint_without_a_parameters_state_leaves_it_none(configure: Callable[..., TrainConfig]) -> None:
    """A rollback to a step in which the body did not move yet forgets what AdamW has learned of it since."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer, named = build_optimizer(model, configure().optim), dict(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    stored = {name: value.clone() for name, value in optimizer_tensors(named, optimizer).items() if ":0." in name}
    optimizer.step()
    restore_optimizer(named, optimizer, stored)
    found = optimizer_tensors(named, optimizer)
    assert found.keys() == stored.keys()
    assert all(torch.equal(value, found[name]) for name, value in stored.items())


def test_a_finished_run_returns_its_summary(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(steps=3)
    summary = train(config, student_info, HELD_OUT, Silent())
    assert summary["steps"] == 3
    assert summary["before"].keys() == {"bits_per_byte", "bytes"}
    assert summary["after"]["bits_per_byte"] != summary["before"]["bits_per_byte"]
    monkeypatch.setattr(opening, "open_student", lambda *_: pytest.fail("loads a model for nothing"))
    assert train(config, student_info, HELD_OUT, Silent()) == summary


def test_the_result_is_a_model_folder(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    """What evaluate says of the saved folder is what the run said after training."""
    config = configure(steps=4, eval_targets=configure().data.targets[0])
    summary = train(config, student_info, HELD_OUT, Silent())
    assert Path(summary["model"], "tokenizer_config.json").exists()
    again = EvalConfig(
        model=summary["model"], text="given", targets=config.data.targets[0], max_tokens=32, device="cpu"
    )
    assert evaluate(again, student_info, HELD_OUT, Silent()) == summary["after"]


def test_checkpoints_are_counted_and_cleared(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    config = configure(keep=2, save_every=3)
    train(config, student_info, [], Silent())
    assert sorted(p.name for p in Path(config.out, "checkpoints").iterdir()) == ["step-000009", "step-000012"]


def test_another_run_is_refused_by_name(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any, tmp_path: Path
) -> None:
    train(configure(steps=2), student_info, [], Silent())
    with pytest.raises(XtokenError, match=r"another run: lr=0\.01 there, 0\.005 now"):
        train(configure(steps=2, lr=5e-3), student_info, [], Silent())
    other = make_targets([[5, 5, 5]], name="other")
    with pytest.raises(XtokenError, match="targets_hash"):
        train(configure(steps=2, targets=[other]), student_info, [], Silent())
    assert train(configure(steps=2, keep=7, save_every=1), student_info, [], Silent())["steps"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(XtokenError, match="is not a training run"):
        train(configure(out=str(tmp_path / "mine")), student_info, [], Silent())
    with pytest.raises(XtokenError, match="is a URL"):
        train(configure(out="s3://bucket/run"), student_info, [], Silent())


def test_what_does_not_fit_is_refused_before_the_model_loads(
    configure: Callable[..., TrainConfig],
    make_targets: Callable[..., str],
    student_info: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "open_student", lambda *_: pytest.fail("too late"))
    only = make_targets([[5, 5]], name="only", losses=("p-kl",))
    with pytest.raises(XtokenError, match=r"no columns for loss 'h-kl'.*xtoken align .* --for p-kl,h-kl"):
        train(configure(targets=[only], loss="h-kl"), student_info, [], Silent())
    stranger = student_info.model_copy(update={"hash": "f" * 64, "name": "stranger"})
    with pytest.raises(XtokenError, match=r"'stranger'.*'toy-student'.*xtoken align"):
        train(configure(), stranger, [], Silent())
    Path(configure().data.targets[0], "w.parquet").write_bytes(b"no table")
    with pytest.raises(XtokenError, match="sha256"):
        train(configure(), student_info, [], Silent())


def test_models_that_do_not_fit(configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="cannot be loaded"):
        train(configure(student=str(tmp_path / "missing")), student_info, [], Silent())
    assert train(configure(steps=1), student_info, [], Silent())["steps"] == 1, "a failed start binds nothing"
    with pytest.raises(XtokenError, match="use --max-tokens 64"):
        train(configure(max_tokens=65, out=str(tmp_path / "long")), student_info, [], Silent())
    with pytest.raises(XtokenError, match="device 'cuda:77'"):
        train(configure(device="cuda:77", out=str(tmp_path / "gpu")), student_info, [], Silent())


def test_a_narrow_head_is_refused(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(configure().student.student)
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path / "narrow")
    with pytest.raises(XtokenError, match="predicts 20 tokens, but its tokenizer's ids go up to 23"):
        train(configure(student=str(tmp_path / "narrow")), student_info, [], Silent())
    assert not Path(configure().out).exists(), "refused before the folder is made"
    monkeypatch.setattr(
        "xtoken.trainer.data.targets.stated_rows", lambda _: None
    )  # as of a config.json that does not say
    with pytest.raises(XtokenError, match="predicts 20 tokens, but its tokenizer's ids go up to 23"):
        train(configure(student=str(tmp_path / "narrow")), student_info, [], Silent())


def test_a_loss_that_is_no_number_stops_the_run(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, calls = configure(save_every=2), loop.run_step, []

    def poisoned(objective: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                next(objective.model.parameters()).fill_(math.nan)
        return real(objective, *args, **options)

    monkeypatch.setattr(loop, "run_step", poisoned)
    with pytest.raises(XtokenError, match=r"step 4: KD is nan.*last checkpoint stays.*the weights are at fault"):
        train(config, student_info, [], Silent())
    assert [p.name for p in Path(config.out, "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(loop, "run_step", real)
    assert train(config, student_info, [], Silent())["steps"] == 12


@pytest.mark.parametrize("rollback", [1, 2])
def test_a_rollback_leaves_the_step_out(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch, rollback: int
) -> None:
    """The fifth batch breaks the loss: the run goes back to step 4, leaves it out, and is a run without this batch."""
    config, real = configure(save_every=2, rollback=rollback), loop.run_step
    seen: list[list[str]] = []

    def poisoned(objective: Any, batch: Any, *args: Any, **options: Any) -> Any:
        seen.append(batch.sample_ids)
        figures = real(objective, batch, *args, **options)
        return replace(figures, ce=math.inf) if batch.sample_ids in seen[4:5] else figures

    monkeypatch.setattr(loop, "run_step", poisoned)
    summary = train(config, student_info, [], Silent())
    assert summary["steps"] == 12
    lines = steps_of(config.out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    (event,) = [line for line in lines if "event" in line]
    assert (event["step"], event["event"], event["from_step"], event["left_out"]) == (4, "rollback", 5, 5)
    assert json.loads(Path(config.out, "diagnosis.json").read_text())["step"] == 5
    assert seen[5] != seen[4], "the step at fault is not taken again"


def test_a_torn_last_line_of_metrics_is_dropped(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(save_every=2, steps=4), start.Training.save
    only_two = lambda training: real(training) if training.counted.step == 2 else 1 / 0  # noqa: E731
    monkeypatch.setattr(start.Training, "save", only_two)
    with pytest.raises(ZeroDivisionError):
        train(config, student_info, [], Silent())
    with open(f"{config.out}/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    monkeypatch.setattr(start.Training, "save", real)
    train(config, student_info, [], Silent())
    assert [line["step"] for line in steps_of(config.out)] == [1, 2, 3, 4]


def test_learning_rate_and_decay_groups(configure: Callable[..., TrainConfig]) -> None:
    config = configure(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, config.optim) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(1, configure(warmup=0, steps=1).optim) > 0
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    matrices, vectors = build_optimizer(model, config.optim).param_groups
    assert [p.dim() for p in matrices["params"]] == [2]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)
    assert len(vectors["params"]) == 3


@pytest.mark.parametrize("loss", ["p-kl", "h-kl"])
def test_a_head_without_the_last_special_tokens_trains(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, loss: str
) -> None:
    """As Gemma's: its tokenizer has one more id, an image token, than its head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(configure().student.student)
    model.resize_token_embeddings(24)
    model.save_pretrained(tmp_path / "exact")
    wider = student_info.model_copy(update={"size": 25})
    config = configure(student=str(tmp_path / "exact"), steps=2, loss=loss, eval_targets=configure().data.targets[0])
    assert math.isfinite(train(config, wider, HELD_OUT, Silent())["after"]["kl"])


def test_a_full_disk_is_said_and_resumed(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = configure(save_every=2), Metrics.write

    def refuse(self: Metrics, line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, line)

    monkeypatch.setattr(Metrics, "write", refuse)
    with pytest.raises(XtokenError, match=r"disk of .* is full"):
        train(config, student_info, [], Silent())
    monkeypatch.setattr(Metrics, "write", write)
    assert train(config, student_info, [], Silent())["steps"] == 12
    assert [line["step"] for line in steps_of(config.out)] == list(range(1, 13))


def test_two_teachers_with_their_own_losses(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any
) -> None:
    """The second holds a third of the samples; all is counted, and another number of losses is refused."""
    second = make_targets(LENGTHS[:1], name="second", losses=("sparse-kl",))
    roots = [configure().data.targets[0], second]
    config = configure(targets=roots, loss=["h-kl", "sparse-kl"], weights=[1.0, 3.0], steps=6, step_tokens=60)
    summary = train(config, student_info, [], Silent())
    assert (summary["samples"], summary["samples_of_all_teachers"]) == (14, 5)
    rows = summary["teachers"]
    assert [(row["loss"], row["samples"]) for row in rows] == [("h-kl", 14), ("sparse-kl", 5)]
    lines = steps_of(config.out)
    assert [row["samples_seen"] for row in rows] == [sum(line["teacher_samples"][i] for line in lines) for i in (0, 1)]
    assert 0 < rows[1]["samples_seen"] < rows[0]["samples_seen"]
    with pytest.raises(XtokenError, match=r"second has no columns for loss 'h-kl'"):
        train(configure(targets=roots, loss=["h-kl"]), student_info, [], Silent())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.0]}, "sum to 0"),
        ({"weights": [-1.0]}, "at least 0"),
        ({"weights": [float("nan")]}, "at least 0"),
        ({"weights": [1.0, 1.0]}, "2 numbers for 1 target folders"),
        ({"loss": ["p-kl", "h-kl"]}, "2 losses for 1 target folders"),
        ({"loss": ["pkl"]}, "'pkl' is unknown; choose from ce, p-kl"),
        ({"targets": []}, "'xtoken align' writes one"),
        ({"alm_threshold": 0.0}, "greater than 0"),
        ({"alm_threshold": 1.0}, "less than 1"),
        ({"alm_tau": 0.0}, "greater than 0"),
        ({"debias": ["space"]}, "'space' is unknown; choose from outcome, merge"),
        ({"prefix": []}, "needs a term"),
        ({"loss": ["h-kl"], "learn_w": True}, "no target folder is trained with p-kl"),
    ],
)
def test_bad_options_name_the_way_out(
    configure: Callable[..., TrainConfig], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        configure(**options)


def test_targets_without_what_an_option_needs_are_refused(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any
) -> None:
    alm = make_targets(LENGTHS, name="alm", losses=("alm",))
    with pytest.raises(XtokenError, match=r"--debias outcome needs .* capture with --backend hf"):
        train(configure(targets=[alm], loss="alm", debias=["outcome"]), student_info, [], Silent())
    hot = make_targets(LENGTHS, name="hot", losses=("p-kl",), tau=2.0)
    path = Path(hot, "data", "part-00000.parquet")
    table = pq.read_table(path)
    unknown = [[math.nan] * len(row) for row in table.column("pkl_rest_logprob").to_pylist()]
    index = table.schema.get_field_index("pkl_rest_logprob")
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array(unknown, table.schema[index].type)), path
    )
    with pytest.raises(XtokenError, match=r"at tau=2 .*--rest drop, or capture with --temperatures 2"):
        train(configure(targets=[hot]), student_info, [], Silent())
    with pytest.raises(XtokenError, match="--merge first --tau 2"):
        train(configure(eval_targets=hot), student_info, [], Silent())


def test_old_targets_are_refused_by_version(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    path = Path(configure().data.targets[0], "manifest.json")
    path.write_text(path.read_text().replace('"schema_version":3', '"schema_version":1'))
    with pytest.raises(XtokenError, match="schema version 1, this xtoken reads targets of version 2 to 8"):
        train(configure(), student_info, [], Silent())
