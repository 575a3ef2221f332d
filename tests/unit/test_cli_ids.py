"""Token ids through the command line: training on their targets, what a student is measured on, and two captures."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.pipeline.chats import open_chat_model, read_row
from xtoken.pipeline.store.reader import iter_targets
from xtoken.schemas.manifest import TargetManifest, read_manifest

from .test_cli_chats import figures, run, written

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "captures"
TALKS: list[list[dict[str, str]]] = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The river runs?"},
        {"role": "assistant", "content": "It runs, naïve Leser: 日本語。"},
        {"role": "user", "content": "short"},
        {"role": "assistant", "content": "27 boats wait for rain."},
    ],
    [{"role": "user", "content": "def area(r):"}, {"role": "assistant", "content": "\treturn 3.14159 * r * r"}],
]
TRAIN = ("--device", "cpu", "--steps", "2", "--max-tokens", "256", "--step-tokens", "400", "--mix", "fixed")


def model(folder: Path, size: int, tokenizer: Path | None, template: str | None) -> Path:
    """A small random student."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, initializer_range=0.5, **sizes)).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    if template is not None:
        shutil.copyfile(GOLDEN / template, folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of a template that their tokenizer's folder does not have, captured twice; students; targets."""
    root = tmp_path_factory.mktemp("ids")
    tiny = str(shutil.copytree(GOLDEN / "tiny", root / "tiny"))
    writer, rows = open_chat_model(tiny, template=str(GOLDEN / "zephyr.jinja"), date=datetime(2026, 7, 4)), []
    for talk in TALKS:
        tokens = writer.encode(read_row({"messages": talk}, "messages"))
        rows.append({"input_ids": tokens.ids.tolist(), "labels": np.where(tokens.learn, tokens.ids, -100).tolist()})
    ids = written(root / "ids.jsonl", rows)
    written(root / "chats.jsonl", [{"messages": talk} for talk in TALKS])
    written(root / "texts.jsonl", [{"text": "The river runs past the old mill."}])
    model(root / "student", 400, GOLDEN / "tiny", "vicuna.jinja")
    model(root / "plain", 400, GOLDEN / "tiny", None)
    model(root / "of-bytes", 260, None, None)
    for name, k in (("one", 8), ("two", 4)):
        words = ("--teacher", tiny, "--tokenizer", tiny, "--backend", "fake", "--max-tokens", 256, "--k", k)
        figures("precompute", ids, *words, "--out", root / name)
        figures("align", root / name, "--student", root / "student", "--for", "p-kl,alm", "--out", root / f"t-{name}")
    figures("align", root / "one", "--student", "bytes", "--for", "p-kl,alm", "--out", root / "t-bytes")
    return root


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def cross_entropy(student: Path, targets: Path) -> tuple[float, int]:
    """Mean over taught tokens, in nats, by transformers alone, of the tokenizer's ids; and how many there are."""
    from transformers import AutoModelForCausalLM

    size = read_manifest(str(targets), TargetManifest).student.size
    net, nats, count = AutoModelForCausalLM.from_pretrained(student), 0.0, 0
    for batch in iter_targets(str(targets)):
        for row in batch.to_pylist():
            with torch.no_grad():
                logp = net(torch.tensor([row["student_ids"]])).logits[0, :, :size].double().log_softmax(-1)
            for at, (token, learn) in enumerate(zip(row["student_ids"], row["learn"], strict=True)):
                if learn:
                    nats, count = nats - float(logp[at - 1, token]), count + 1
    return nats / count, count


@pytest.mark.parametrize("loss", ["p-kl", "alm"])
@pytest.mark.parametrize(("student", "targets"), [("student", "t-one"), ("of-bytes", "t-bytes")])
def test_training_learns_what_is_taught(made: Path, tmp_path: Path, student: str, targets: str, loss: str) -> None:
    """CE of the first step by hand; samples in one row learn as those in rows of their own."""
    expected, count = cross_entropy(made / student, made / targets)
    tokenizer = ("--tokenizer", "bytes") if student == "of-bytes" else ()
    words = ("train", made / targets, "--student", made / student, *tokenizer, "--loss", loss, *TRAIN)
    found = {}
    for batching in ("pack", "pad"):
        figures(*words, "--batching", batching, "--out", tmp_path / batching)
        found[batching] = steps(tmp_path / batching)
        assert found[batching][0]["predicted"] == count
        assert found[batching][0]["ce"] == pytest.approx(expected, rel=1e-5)
    for one, other in zip(found["pack"], found["pad"], strict=True):
        assert one["chunks"] == other["chunks"] > 20
        for name in ("ce", "kd", "loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_the_model_that_is_left_chats_with_its_own_template(made: Path, tmp_path: Path) -> None:
    """The ids say nothing of a template: it is the student's, or one that is given, or there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ("train", made / "t-one", "--loss", "p-kl", *TRAIN)
    given = ("--template", GOLDEN / "zephyr.jinja")
    for student, more, template in (("student", (), "vicuna"), ("plain", (), None), ("plain", given, "zephyr")):
        out = tmp_path / f"{student}-{template}"
        figures(*words, "--student", made / student, *more, "--out", out)
        tokenizer = AutoTokenizer.from_pretrained(out / "model")
        assert tokenizer.chat_template == (None if template is None else (GOLDEN / f"{template}.jinja").read_text())
        ends = json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"]
        assert 0 in (ends if isinstance(ends, list) else [ends]), "generation ends where an answer does"
        ids = tokenizer("The river", return_tensors="pt").input_ids
        wrote = AutoModelForCausalLM.from_pretrained(out / "model").generate(ids, max_new_tokens=3, do_sample=False)
        assert tokenizer.decode(wrote[0]).startswith("The river")
    result = run(*words, "--student", made / "plain", "--template", "none.jinja", "--out", tmp_path / "no")
    assert "the chat template none.jinja cannot be read" in " ".join(result.output.split())
    assert not (tmp_path / "no").exists()


def test_a_student_of_token_ids_is_measured_on_texts_and_messages(made: Path, tmp_path: Path) -> None:
    words = ("train", made / "t-one", "--loss", "p-kl", *TRAIN)
    chats = figures(*words, "--student", made / "student", "--eval-text", made / "chats.jsonl", "--out", tmp_path / "a")
    assert set(chats["after"]["by_kind"]) == {"assistant", "stop"}
    texts = figures(*words, "--student", made / "plain", "--eval-text", made / "texts.jsonl", "--out", tmp_path / "b")
    assert texts["after"]["bytes"] == len("The river runs past the old mill.")
    for student, corpus, said in (
        ("student", "ids.jsonl", "holds token ids, and models are measured on texts or messages; give those"),
        ("plain", "chats.jsonl", "plain has no chat template"),
    ):
        result = run(
            *words, "--student", made / student, "--eval-text", made / corpus, "--out", tmp_path / "c" / student
        )
        assert result.exit_code != 0
        assert said in " ".join(result.output.split())
        assert not (tmp_path / "c").exists()


def test_eval_takes_their_targets_and_no_ids(made: Path) -> None:
    words = ("eval", made / "student", "--device", "cpu", "--max-tokens", 256)
    found = figures(*words, "--text", made / "chats.jsonl", "--targets", made / "t-one")
    assert found["chunks"] > 20
    assert set(found["by_kind"]) == {"assistant", "stop"}
    result = run(*words, "--text", made / "ids.jsonl")
    assert "holds token ids, and models are measured on texts or messages" in " ".join(result.output.split())


@pytest.fixture
def of_messages(made: Path, tmp_path: Path) -> Path:
    """Targets of the same conversations as messages."""
    words = ("--teacher", made / "tiny", "--backend", "fake", "--template", GOLDEN / "zephyr.jinja")
    figures("precompute", made / "chats.jsonl", *words, "--max-tokens", 256, "--k", 8, "--out", tmp_path / "capture")
    figures("align", tmp_path / "capture", "--student", made / "student", "--for", "p-kl", "--out", tmp_path / "chats")
    return tmp_path / "chats"


def test_two_teachers_of_the_same_ids(made: Path, tmp_path: Path, of_messages: Path) -> None:
    words = ("--student", made / "student", "--loss", "p-kl", *TRAIN)
    found = figures("train", f"{made / 't-one'},{made / 't-two'}", *words, "--out", tmp_path / "both")
    assert found["samples_of_all_teachers"] == found["samples"] == len(TALKS)
    joined = tmp_path / "joined"
    figures("align", f"{made / 'one'},{made / 'two'}", "--student", made / "student", "--for", "p-kl", "--out", joined)
    for name in ("one", "two"):
        rows = [
            [row["student_ids"] for batch in iter_targets(str(root)) for row in batch.to_pylist()]
            for root in (joined / name, made / "t-one")
        ]
        assert rows[0] == rows[1]
    result = run("train", f"{made / 't-one'},{of_messages}", *words, "--out", tmp_path / "no")
    said = " ".join(result.output.split())
    assert "holds token ids and" in said
    assert "conversations, and one run learns from either; train on one after the other" in said
