"""A capture must stay readable: golden folders written by every release so far, and what other versions are refused."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import InThisProcess

from xtoken.pipeline.align.run import align
from xtoken.pipeline.store.codecs.topk import decode, decode_tau_tail
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture, iter_targets, load_vocab
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_any_manifest, read_manifest
from xtoken.schemas.tables import OLDEST_READ, SCHEMA_VERSIONS
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import read_sample
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"
CAPTURES = sorted(path.name for path in GOLDEN.glob("v*") if (path / "vocab.parquet").exists())
TOPK = [name for name in CAPTURES if "sampled" not in name]
SAMPLED = [name for name in CAPTURES if "sampled" in name]
TARGETS = sorted(path.name for path in GOLDEN.glob("v*") if (path / "w.parquet").exists())
CHATS = [name for name in CAPTURES if "chats" in name]
TALKED = [*CHATS, "v6-answers", "v6-ids"]
TEXTS_OF = [name for name in CAPTURES if name not in TALKED]
TEXTS = 4
EOS = 0


def expected(name: str) -> list[dict[str, Any]]:
    """First rows of the first sample, from the teacher itself."""
    rows: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.expected.json").read_text())
    return rows


def first_sample(name: str) -> dict[str, Any]:
    row: dict[str, Any] = next(iter_capture(str(GOLDEN / name))).slice(0, 1).to_pylist()[0]
    return row


def test_every_version_that_is_read_has_a_golden() -> None:
    captures = {read_any_manifest(str(GOLDEN / name)).schema_version for name in CAPTURES}
    targets = {read_any_manifest(str(GOLDEN / name)).schema_version for name in TARGETS}
    assert captures == set(range(OLDEST_READ["capture"], SCHEMA_VERSIONS["capture"] + 1))
    assert targets == set(range(OLDEST_READ["targets"], SCHEMA_VERSIONS["targets"] + 1))


@pytest.mark.parametrize("name", [*CAPTURES, *TARGETS])
def test_goldens_name_no_machine(name: str) -> None:
    for path in (GOLDEN / name).rglob("*"):
        if path.is_file() and path.suffix == ".json":
            assert '"/' not in path.read_text(), path
            assert "tmp" not in path.read_text(), path


@pytest.mark.parametrize("name", [*CAPTURES, *TARGETS])
def test_every_golden_is_verified_and_described(name: str) -> None:
    root = str(GOLDEN / name)
    assert verify(root)["samples"] == TEXTS
    shown = inspect(root)
    assert shown["samples"] == TEXTS
    assert len(shown["samples_shown"]) == 3
    assert shown["bytes_per_token"]["all"] > 0


@pytest.mark.parametrize("name", TOPK)
def test_topk_rows_decode_to_what_the_teacher_said(name: str) -> None:
    codec, row = read_manifest(str(GOLDEN / name), CaptureManifest).codec, first_sample(name)
    kept, ids, gap, rest = (np.asarray(row[column]) for column in ("kept", "topk_ids", "topk_gap", "rest_gap"))
    found = decode(kept, ids, gap, rest, codec.step)
    for at, wanted in enumerate(expected(name)):
        here = slice(int(found.offsets[at]), int(found.offsets[at + 1]))
        count = here.stop - here.start
        assert wanted["sample_id"] == row["sample_id"]
        assert found.ids[here].tolist() == wanted["ids"][:count]
        assert count == codec.k or wanted["logprob"][count] < np.log(codec.min_p)
        np.testing.assert_allclose(found.logprob[here], wanted["logprob"][:count], atol=codec.step / 2 + 1e-5)
        left = 1 - np.exp(wanted["logprob"][:count]).sum()
        np.testing.assert_allclose(found.tail_logprob[at], np.log(left), atol=codec.step / 2 + 1e-4)
        if wanted["realised_logprob"] is None:
            assert np.isnan(row["realised_logprob"][at]), "the set does not say"
        else:
            assert row["realised_logprob"][at] == pytest.approx(wanted["realised_logprob"], rel=2.0**-16, abs=1e-5)
        for tau, logprob in wanted.get("tau_logprob", {}).items():
            odds = np.asarray(row["tau_rest_odds"], np.int16)
            rest_R = decode_tau_tail(odds, codec.temperatures, float(tau), codec.step)
            left = 1 - np.exp(logprob[:count]).sum()
            np.testing.assert_allclose(rest_R[at], np.log(left), atol=codec.step / 2 + 2e-3)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_rows_are_draws_of_what_the_teacher_said(name: str) -> None:
    codec, row = read_manifest(str(GOLDEN / name), CaptureManifest).codec, first_sample(name)
    stops = np.cumsum(row["drawn"])
    for at, wanted in enumerate(expected(name)):
        here = slice(int(stops[at]) - row["drawn"][at], int(stops[at]))
        assert sum(row["draw_count"][here]) == codec.draws
        assert row["entropy"][at] == pytest.approx(wanted["entropy"], abs=1e-3)
        assert row["realised_logprob"][at] == pytest.approx(wanted["realised_logprob"], rel=2.0**-16, abs=1e-5)
        drawn = dict(zip(row["draw_ids"][here], row["draw_count"][here], strict=True))
        for token, logprob in zip(wanted["ids"][:3], wanted["logprob"][:3], strict=True):
            p, n = np.exp(logprob), codec.draws
            assert abs(drawn.get(token, 0) - n * p) < 5 * np.sqrt(n * p * (1 - p)) + 1


@pytest.mark.parametrize("name", TEXTS_OF)
def test_the_vocabulary_comes_with_it(name: str) -> None:
    table = load_vocab(str(GOLDEN / name))
    row = first_sample(name)
    assert table.size == 400
    assert row["teacher_ids"][-1] == table.info.eos_id == EOS
    assert b"".join(table.token(token) for token in row["teacher_ids"]).decode() == row["text"]


@pytest.mark.parametrize("name", CHATS)
def test_conversations_say_what_they_are(name: str) -> None:
    """Every byte and kind as a person reads it in the conversations of ``make_captures.py``."""
    manifest, table = read_manifest(str(GOLDEN / name), CaptureManifest), load_vocab(str(GOLDEN / name))
    template = (GOLDEN / "zephyr.jinja").read_bytes()
    assert manifest.chat is not None
    assert manifest.chat.template == hashlib.sha256(template).hexdigest()
    assert (manifest.chat.date, manifest.chat.form, manifest.chat.stop_token) == ("2026-07-04", "messages", EOS)
    rows = [row for batch in iter_capture(str(GOLDEN / name)) for row in batch.to_pylist()]
    brief, switched, called, cut = rows
    assert brief["text"] == "Be brief.The river runs past the old mill?27 boats wait.It runs, naïve Leser: 日本語。"
    assert [kind for kind in brief["span_kind"] if kind != "template"] == [
        *("system", "user", "marker", "thinking", "marker", "assistant", "stop")
    ]
    taught = {m for m, learn in zip(switched["span_message"], switched["span_learn"], strict=True) if learn}
    assert taught == {3}, "message 1 is switched off"
    assert switched["text"].startswith("</s>\n<|system|>\nrain")
    assert EOS not in switched["teacher_ids"][7:26], "a user's '</s>' is text"
    assert [k for k, learn in zip(called["span_kind"], called["span_learn"], strict=True) if learn] == [
        *("assistant", "call", "stop", "assistant", "stop")
    ]
    assert '{"name": "rain", "arguments": {"unit": "m²"}}' in called["text"]
    assert (cut["text"], cut["complete"]) == ("shortshort", False)
    for row in rows:
        assert len(row["realised_logprob"]) == sum(
            size
            for size, learn in zip(np.diff(row["span_token_end"], prepend=0), row["span_learn"], strict=True)
            if learn
        )
        stops = [end - 1 for kind, end in zip(row["span_kind"], row["span_token_end"], strict=True) if kind == "stop"]
        assert {row["teacher_ids"][at] for at in stops} == {EOS}
    assert table.size == 400


@pytest.mark.parametrize("name", CHATS)
def test_conversations_align_with_a_student_of_another_template(name: str, tmp_path: Path) -> None:
    config = AlignConfig(
        captures=[str(GOLDEN / name)],
        student=str(GOLDEN / "tiny"),
        template=str(GOLDEN / "vicuna.jinja"),
        out=str(tmp_path / "t"),
        losses=["p-kl", "h-kl", "alm", "strict", "byte-prefix"],
    )
    manifest = align(config, Silent(), executor=InThisProcess())
    assert verify(str(tmp_path / "t"))["samples"] == TEXTS
    assert manifest.chat is not None
    golden = GOLDEN / "v7-targets"
    for path in sorted(golden.rglob("*.parquet")):
        assert (tmp_path / "t" / path.relative_to(golden)).read_bytes() == path.read_bytes(), "the same bytes"


def rows_of(root: Path) -> list[dict[str, Any]]:
    return [row for batch in iter_capture(str(root)) for row in batch.to_pylist()]


def taught(row: dict[str, Any]) -> list[int]:
    """Token ids of its taught spans."""
    sizes = np.diff(row["span_token_end"], prepend=0)
    kept = np.repeat(row["span_learn"], sizes)
    return [token for token, learn in zip(row["teacher_ids"], kept, strict=True) if learn]


def test_answers_say_what_they_are() -> None:
    """Of six, two are no UTF-8: one ends, two are empty and end at once, one is cut."""
    manifest, table = read_manifest(str(GOLDEN / "v6-answers"), CaptureManifest), load_vocab(str(GOLDEN / "v6-answers"))
    assert manifest.chat is not None
    assert manifest.chat.answering is not None
    assert manifest.chat.answering.model_dump() == {
        "tokens": 6, "temperature": 0.7, "top_p": 0.5, "samples": 3, "seed": 1
    }  # fmt: skip
    found = {row["sample_id"].removeprefix("prompts.jsonl:"): row for row in rows_of(GOLDEN / "v6-answers")}
    answers = {name: json.loads(row["messages"])["messages"][-1] for name, row in found.items()}
    assert {name: one["content"] for name, one in answers.items()} == {
        "0#2.2": " old riv a run \u0395", "1#1.0": "", "1#1.1": "", "1#1.2": " the past # old pas un"
    }  # fmt: skip
    for name, row in found.items():
        said = b"".join(map(table.token, taught(row))).decode()
        assert said == answers[name]["content"]
        assert row["complete"] == (taught(row)[-1] == EOS) == (name != "1#1.2")
        assert len(row["realised_logprob"]) == len(taught(row))
    skipped = [json.loads(line) for line in (GOLDEN / "v6-answers" / "skipped.jsonl").read_text().splitlines()]
    assert {one["sample_id"]: one["reason"] for one in skipped} == {
        f"prompts.jsonl:0#2.{number}": "an answer that is not UTF-8" for number in (0, 1)
    }


def test_token_ids_say_what_they_are() -> None:
    """A question and an eos, which are not taught, and a text and an eos, which are; without their padding."""
    manifest, table = read_manifest(str(GOLDEN / "v6-ids"), CaptureManifest), load_vocab(str(GOLDEN / "v6-ids"))
    assert manifest.chat is not None
    assert (manifest.chat.form, manifest.chat.template, manifest.chat.date) == ("ids", None, None)
    assert manifest.chat.stop_token == EOS
    texts = ["The river runs past the old mill, and 27 boats wait for rain", None, None, "short"]
    for row, text in zip(rows_of(GOLDEN / "v6-ids"), texts, strict=True):
        assert row["messages"] is None
        assert row["span_kind"] == ["text", "template", "text", "stop"]
        assert row["span_learn"] == [False, False, True, True]
        assert row["span_byte_end"] == [5, 5, len(row["text"].encode()), len(row["text"].encode())]
        assert b"".join(map(table.token, taught(row)[:-1])).decode() == row["text"].removeprefix("rain?")
        assert taught(row)[-1] == EOS == row["teacher_ids"][4]
        assert text is None or row["text"] == "rain?" + text


@pytest.mark.parametrize("name", ["v6-answers", "v6-ids"])
def test_they_align_with_a_student_of_another_template(name: str, tmp_path: Path) -> None:
    """Every taught byte of the teacher's is in a chunk, and of the stops those that are there."""
    student = Path(shutil.copytree(GOLDEN / "tiny", tmp_path / "student"))
    shutil.copyfile(GOLDEN / "vicuna.jinja", student / "chat_template.jinja")
    config = AlignConfig(
        captures=[str(GOLDEN / name)], student=str(student), out=str(tmp_path / "t"), losses=["p-kl", "alm"]
    )
    manifest = align(config, Silent())
    assert verify(str(tmp_path / "t"))["samples"] == TEXTS
    counts = Counter[str]()
    for part in manifest.parts:
        counts.update(part.counts)
    assert counts["chat_chunk_bytes"] == counts["chat_taught_bytes"] > 0
    stored = {row["sample_id"]: row for row in rows_of(GOLDEN / name)}
    for batch in iter_targets(str(tmp_path / "t")):
        for row in batch.to_pylist():
            learned = [one for one, learn in zip(row["student_ids"], row["learn"], strict=True) if learn]
            assert learned == taught(stored[row["sample_id"]]), "the tokenizers are the same"


@pytest.mark.parametrize("name", TEXTS_OF)
def test_every_capture_aligns(name: str, tmp_path: Path) -> None:
    config = AlignConfig(captures=[str(GOLDEN / name)], student="bytes", out=str(tmp_path / "t"), losses=["p-kl"])
    manifest = align(config, Silent(), executor=InThisProcess())
    assert verify(str(tmp_path / "t"))["samples"] == TEXTS
    assert sum(part.tokens for part in manifest.parts) == 418  # the corpus's bytes; 'bytes' has no eos


def test_steps_and_codes_hold_what_the_version_before_holds() -> None:
    """Of the same texts and teacher: every value, but for the rounding to steps."""
    old, new = (
        {name: column for batch in iter_targets(str(GOLDEN / root)) for name, column in batch.to_pydict().items()}
        for root in ("v3-targets", "v6-targets")
    )
    assert (
        {"pkl_ids", "pkl_logprob", "pkl_rest_logprob", "hkl_common_ids", "alm_space_logprob"} < old.keys() < new.keys()
    )
    for column, values in old.items():
        if column in ("pkl_logprob", "pkl_rest_logprob"):
            for ours, theirs in zip(new[column], values, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1 / 32, rtol=0)
        else:
            assert repr(new[column]) == repr(values), column


@pytest.mark.parametrize("name", TARGETS)
def test_golden_targets_are_trained_on(name: str) -> None:
    targets = Targets(str(GOLDEN / name))
    name = "alm" if "alm" in targets.manifest.losses else "p-kl"
    targets.require(name)
    sizes = targets.manifest.student.size, targets.manifest.teacher_tokenizer.size
    loss = open_loss(name, LossSetup(targets.w, targets.vocab, *sizes, torch.device("cpu")))
    layout = Layout(None, 64, sizes[0], (loss,))
    group = targets.read(targets.groups[0], layout.columns(0))
    sample = read_sample([(group, 0)], layout)
    lesson = sample.targets[0]
    assert lesson is not None
    source = "bytes" if targets.manifest.chat is None else str(GOLDEN / "tiny")
    spelt = b"".join(map(load_tokenizer(source).table.token, sample.sequence.tolist())).decode(errors="ignore")
    assert spelt.startswith("The river runs" if targets.manifest.chat is None else "Be brief.")
    assert len(lesson.first_C) == len(lesson.columns["teacher_logprob" if name == "alm" else "pkl_count"]) > 5
    assert len(targets.w.weight) > 0


def copy_with(name: str, tmp_path: Path, **changes: Any) -> str:
    root = Path(shutil.copytree(GOLDEN / name, tmp_path / "changed"))
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return str(root)


@pytest.mark.parametrize("name", [CAPTURES[-1], TARGETS[-1]])
def test_a_newer_version_is_refused_with_the_release_that_reads_it(name: str, tmp_path: Path) -> None:
    root = copy_with(name, tmp_path, schema_version=9, xtoken_version="3.1.4", a_field_of_the_future={"x": [1]})
    for read in (read_any_manifest, verify, inspect):
        with pytest.raises(XtokenError, match=r"schema version 9.*up to version \d; install xtoken 3\.1\.4 or newer"):
            read(root)
    if name in TARGETS:
        with pytest.raises(XtokenError, match=r"install xtoken 3\.1\.4"):
            Targets(root)


@pytest.mark.parametrize("version", [0, -1, "2", 2.0, True, False, None, [2], {"v": 2}, 10**30, 1e308])
@pytest.mark.parametrize("name", [CAPTURES[-1], TARGETS[-1]])
def test_what_is_no_version_is_refused(name: str, version: Any, tmp_path: Path) -> None:
    root = copy_with(name, tmp_path, schema_version=version)
    kind = CaptureManifest if name in CAPTURES else TargetManifest
    with pytest.raises(XtokenError, match=r"has schema version .*this xtoken reads") as caught:
        read_manifest(root, kind)
    assert caught.value.exit_code == 2
