"""Whole runs on conversations: figures, resume, what is refused, and the folder that is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import xtoken.trainer.loop as loop
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate import EvalSample, Question, TaughtSpan
from xtoken.trainer.loop import train

LENGTHS = [[29, 32, 25, 17, 31], [26, 1, 20], [33, 24, 29, 19, 23, 37]]
IDS = np.arange(3, 13).astype(np.int32)
SPANS = (TaughtSpan("assistant", 4, 7, 5), TaughtSpan("stop", 7, 8, 0))
HELD_OUT = [EvalSample(IDS, 5, 0, "held#0", "", SPANS, Question(IDS[:4], "what?", "that", 1))]


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture
def configure(
    make_targets: Callable[..., str], student_dir: str, tmp_path: Path, chat_info: ChatInfo
) -> Callable[..., TrainConfig]:
    root = make_targets(LENGTHS, losses=tuple(LOSSES), step=1 / 64, chat=chat_info)

    def build(**options: Any) -> TrainConfig:
        base = {"targets": [root], "student": student_dir, "out": str(tmp_path / "run"), "device": "cpu"}
        sizes = {"steps": 8, "step_tokens": 90, "micro_tokens": 60, "max_tokens": 32, "warmup": 3, "save_every": 3}
        return TrainConfig.from_flat(**{**base, **sizes, "lr": 1e-2, "loss": ["p-kl"], **options})

    return build


def steps_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_learns_conversations(configure: Callable[..., TrainConfig], student_info: Any, loss: str) -> None:
    """All losses, over several epochs; the figures of a step say how much of it is taught."""
    config = configure(loss=[loss], steps=60, step_tokens=400, micro_tokens=400, lr=2e-2, kd_weight=1.0, ce_weight=0.0)
    summary = train(config, student_info, [], Silent())
    lines = steps_of(config.out)
    values = [line["ce" if loss == "ce" else "kd"] for line in lines]
    assert np.mean(values[-5:]) < 0.95 * np.mean(values[:3])
    tokens = np.diff([line["tokens"] for line in lines], prepend=0)
    for line, count in zip(lines, tokens, strict=True):
        assert line["taught"] == pytest.approx(line["predicted"] / count)
        assert 0.4 < line["taught"] < 0.95
        assert 0 <= line["padding"] < 0.5, "what is not taught is no padding"
    assert summary["taught_tokens"] == sum(line["predicted"] for line in lines) < summary["tokens"]
    assert summary["untaught_samples"] == sum(line["untaught_samples"] for line in lines) > 3


def test_figures_of_text_are_what_they_were(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any
) -> None:
    config = configure(targets=[make_targets([[9, 12, 5]], name="text")])
    summary = train(config, student_info, [], Silent())
    assert not {"taught_tokens", "untaught_samples"} & summary.keys()
    assert not {"taught", "untaught_samples"} & steps_of(config.out)[0].keys()


@pytest.mark.parametrize("mix", ["fixed", "dynamic", "gradmag"])
def test_resume_is_bit_exact(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str
) -> None:
    """With a learned W under fixed mixing; held-out conversations are measured before and after."""
    options: dict[str, Any] = {"mix": mix, "learn_w": mix == "fixed"}
    options |= {"gradmag_every": 3} if mix == "gradmag" else {}
    quiet, config = configure(out=str(tmp_path / "quiet"), **options), configure(**options)
    train(quiet, student_info, HELD_OUT, Silent())
    real, calls = loop.run_step, 0

    def deadly(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stop
        return real(*args, **more)

    monkeypatch.setattr(loop, "run_step", deadly)
    with pytest.raises(Stop):
        train(config, student_info, HELD_OUT, Silent())
    summary = train(config, student_info, HELD_OUT, Silent())
    one, other = (load_file(f"{each.out}/model/model.safetensors") for each in (quiet, config))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    if mix == "fixed":
        learned = [np.load(Path(each.out, "w-0.npy")) for each in (quiet, config)]
        np.testing.assert_array_equal(*learned)
        assert (learned[0] != Targets(quiet.data.targets[0]).w.weight).any()
    timing = ("seconds", "tokens_per_s")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in timing} for line in steps_of(each.out)] for each in (config, quiet)
    )
    assert ours == theirs
    assert set(summary["after"]["by_kind"]) == {"assistant", "stop"}
    rows = [json.loads(line) for line in Path(config.out, "completions.jsonl").read_text().splitlines()]
    assert [(row["when"], row["prompt"], row["text"]) for row in rows] == [
        ("before", "what?", "that"),
        ("after", "what?", "that"),
    ]


def test_several_teachers_must_have_written_alike(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_info: Any, chat_info: ChatInfo
) -> None:
    """Before the model is loaded."""
    base = {"losses": ("p-kl",), "step": 1 / 64}
    same = make_targets(LENGTHS, name="same", chat=chat_info, **base)
    other = make_targets(LENGTHS, name="other", chat=chat_info.model_copy(update={"template": "0" * 64}), **base)
    one = configure().data.targets[0]
    with pytest.raises(XtokenError, match="were written with another chat template"):
        train(configure(targets=[one, other], student="no/such/model", tokenizer="bytes"), student_info, [], Silent())
    summary = train(configure(targets=[one, same], loss=["alm", "p-kl"]), student_info, [], Silent())
    assert summary["samples_of_all_teachers"] == summary["samples"] == sum(map(len, LENGTHS))


def test_the_model_carries_the_chat_template(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, tmp_path: Path
) -> None:
    """Its own, or the one that is given, and generation ends where an answer does."""
    (Path(student_dir) / "chat_template.jinja").write_text("{{ messages }} as ever")
    (tmp_path / "other.jinja").write_text("{{ messages }} otherwise")
    for given, expected in ((None, "as ever"), (str(tmp_path / "other.jinja"), "otherwise")):
        config = configure(template=given, out=str(tmp_path / expected), steps=1)
        train(config, student_info, [], Silent())
        assert Path(config.out, "model", "chat_template.jinja").read_text() == f"{{{{ messages }}}} {expected}"


def test_a_chat_template_may_lie_elsewhere_but_says_the_same(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path
) -> None:
    first, moved = tmp_path / "a.jinja", tmp_path / "b.jinja"
    first.write_text("{{ messages }} otherwise")
    config = configure(template=str(first), out=str(tmp_path / "run"), steps=1)
    summary = train(config, student_info, [], Silent())
    first.rename(moved)
    with pytest.raises(XtokenError, match=r"--template .*a\.jinja cannot be read \(No such file or directory\)"):
        train(config, student_info, [], Silent())
    assert train(config.changed(template=str(moved)), student_info, [], Silent()) == summary
    moved.write_text("{{ messages }} changed")
    with pytest.raises(XtokenError, match=r"holds another run: template='\w{64}' there, '\w{64}' now"):
        train(config.changed(template=str(moved)), student_info, [], Silent())


@pytest.mark.parametrize(("own", "expected"), [(None, [7]), (1, [1, 7]), ([1, 2], [1, 2, 7]), ([7, 1], [7, 1]), (7, 7)])
def test_generation_ends_where_an_answer_does(
    configure: Callable[..., TrainConfig],
    make_targets: Callable[..., str],
    student_info: Any,
    student_dir: str,
    chat_info: ChatInfo,
    own: Any,
    expected: Any,
) -> None:
    Path(student_dir, "generation_config.json").write_text(json.dumps({"eos_token_id": own}))
    chat = chat_info.model_copy(update={"stop_token": 7})
    config = configure(targets=[make_targets(LENGTHS, name="stops", step=1 / 64, chat=chat)], steps=1)
    train(config, student_info, [], Silent())
    assert json.loads(Path(config.out, "model", "generation_config.json").read_text())["eos_token_id"] == expected


def test_a_real_tokenizer_keeps_its_template(
    configure: Callable[..., TrainConfig], student_info: Any, smollm2_dir: Path
) -> None:
    """The template of SmolLM2 lies in tokenizer_config.json."""
    from transformers import AutoTokenizer

    config = configure(tokenizer=str(smollm2_dir), steps=1)
    train(config, student_info, [], Silent())
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (smollm2_dir, Path(config.out, "model")))
    assert one.chat_template == other.chat_template
    message = [{"role": "user", "content": "Hi"}]
    assert one.apply_chat_template(message) == other.apply_chat_template(message)


def test_the_template_must_be_that_of_the_targets(
    configure: Callable[..., TrainConfig], make_targets: Callable[..., str], student_dir: str, tmp_path: Path
) -> None:
    """Told before the model is loaded; plain text has none."""
    from typer.testing import CliRunner

    from xtoken import cli

    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    words = ["--student", student_dir, "--tokenizer", "bytes", "--out", str(tmp_path / "run"), "--device", "cpu"]
    given = ["--template", str(tmp_path / "other.jinja")]
    chats, text = configure().data.targets[0], make_targets([[9, 12]], name="text")
    for root, more, said in (
        (chats, given, "is not the one that the targets were written with (ffffffffffff); give that one with"),
        (chats, [], "bytes has no chat template"),
        (text, given, "is for conversations, and"),
    ):
        result = CliRunner().invoke(cli.app, ["train", root, *words, *more])
        assert result.exit_code != 0
        assert said in " ".join(result.output.split())
        assert not (tmp_path / "run").exists()
