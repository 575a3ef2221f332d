"""Captures of token ids: the rows of the same conversations as messages, what is refused, and their targets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import InProcess, InThisProcess
from talks import TALKS

from xtoken.pipeline.align.common_samples import compare, refuse_other_chat
from xtoken.pipeline.align.run import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.page.data import sample_data
from xtoken.pipeline.page.sample import load_sample
from xtoken.pipeline.share.card.sections import facts
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture, iter_targets
from xtoken.pipeline.store.skip_records import SKIPPED_FILE
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import MergeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

from ..conftest import IDS_SETTINGS

DAY = "2026-07-04"
GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"
Rows = dict[str, dict[str, Any]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def records(rows: Rows) -> list[dict[str, Any]]:
    return [{"id": name, **row} for name, row in rows.items()]


@pytest.fixture(scope="module")
def sources(tokenizer_file: Callable[[str], Path]) -> Callable[[str], str]:
    return lambda name: str(tokenizer_file(name).parent)


@pytest.fixture(scope="module")
def kept(ids_capture: Path, tokenizer_file: Callable[[str], Path]) -> PrecomputeConfig:
    """What made ``ids_capture``, which is read only."""
    smollm2 = str(tokenizer_file("smollm2"))
    return PrecomputeConfig.from_flat(
        corpus=str(ids_capture.parent / "corpus"),
        teacher=smollm2,
        tokenizer=smollm2,
        backend="fake",
        out=str(ids_capture),
        id_field="id",
        **IDS_SETTINGS,
    )


@pytest.fixture
def config(kept: PrecomputeConfig, tmp_path: Path) -> PrecomputeConfig:
    """The same, of a folder that is not there yet."""
    return kept.changed(out=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def table(
    kept: PrecomputeConfig, ids_rows: Rows, sources: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> PrecomputeConfig:
    """What made a capture of the same rows in a table, whose ids are of a copy of the tokenizer; read only."""
    root = tmp_path_factory.mktemp("table")
    pq.write_table(pa.Table.from_pylist(records(ids_rows)), root / "ids.parquet")
    (root / "copy").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(sources("smollm2"), name), root / "copy" / name)
    config = kept.changed(
        corpus=str(root / "ids.parquet"), out=str(root / "out"), form="ids", tokenizer=str(root / "copy")
    )
    capture(config)
    return config


@pytest.fixture(scope="module")
def messages(kept: PrecomputeConfig, ids_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A capture of the same conversations as messages; read only."""
    root = tmp_path_factory.mktemp("messages")
    talks = [{"id": name, "messages": TALKS[name]} for name in ids_rows]
    capture(kept.changed(corpus=write(root / "chats.jsonl", talks), out=str(root / "out"), tokenizer=None, date=DAY))
    return str(root / "out")


def capture(config: PrecomputeConfig) -> CaptureManifest:
    manifest = precompute(config, Silent(), executor=InProcess())
    assert manifest is not None
    return manifest


def samples(root: str) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for batch in iter_capture(root) for row in batch.to_pylist()}


def test_rows_are_those_of_the_same_conversations_as_messages(
    kept: PrecomputeConfig, messages: str, ids_rows: Rows
) -> None:
    manifest = read_manifest(kept.out, CaptureManifest)
    assert manifest.chat is not None
    assert manifest.schema_version == 6
    assert (manifest.chat.form, manifest.chat.template, manifest.chat.stop_token) == ("ids", None, 2)
    assert manifest.chat.date is None
    assert "date" not in json.loads(Path(kept.out, "plan.json").read_text())
    assert manifest.chat.learn == ["text", "stop"]
    assert not manifest.bos
    assert verify(kept.out)["rows"] == sum(part.rows for part in manifest.parts) > 60
    mine, theirs = samples(kept.out), samples(messages)
    assert mine.keys() == theirs.keys() == {f"{name}#0" for name in ids_rows}
    same = [name for name in mine["plain#0"] if not name.startswith("span_") and name not in ("text", "messages")]
    same.remove("teacher_end")
    assert {"teacher_ids", "realised_logprob", "topk_ids"} <= {*same}
    for name, row in mine.items():
        assert {column: row[column] for column in same} == {column: theirs[name][column] for column in same}
        assert row["messages"] is None
    # the words of the template are text, its marks have no bytes
    assert mine["system#0"]["text"].startswith("system\nBe short.\nuser\nHi there\nassistant\nHello.")


def test_a_rerun_does_nothing_and_the_same_again_is_the_same(kept: PrecomputeConfig, table: PrecomputeConfig) -> None:
    """The same again: from a table, under a copy of the tokenizer."""
    before = {path: path.stat().st_mtime_ns for path in Path(kept.out).rglob("*.parquet")}
    capture(kept)
    assert {path: path.stat().st_mtime_ns for path in Path(kept.out).rglob("*.parquet")} == before
    assert len(before) > 4
    for path in before:
        assert Path(table.out, path.relative_to(kept.out)).read_bytes() == path.read_bytes()


def test_whose_ids_they_are_must_be_said_and_be_true(
    config: PrecomputeConfig, table: PrecomputeConfig, sources: Callable[[str], str]
) -> None:
    with pytest.raises(XtokenError, match=r"token ids, which mean nothing without .* name it with --tokenizer"):
        capture(config.changed(tokenizer=None))
    with pytest.raises(XtokenError, match=r"the ids of the corpus are of the tokenizer .*qwen3.* has another one"):
        capture(config.changed(tokenizer=sources("qwen3")))
    assert not Path(config.out).exists()
    # the hash decides, not the name
    assert table.chat.tokenizer not in (table.teacher.teacher, str(Path(table.teacher.teacher).parent))
    assert Path(table.out, "manifest.json").exists()


@pytest.mark.parametrize(
    "flags", [{"turns": "last"}, {"learn": ["thinking"]}, {"template_arg": ["a=1"]}, {"date": DAY}, {"generate": 8}]
)
def test_what_renders_is_refused(config: PrecomputeConfig, flags: dict[str, Any]) -> None:
    with pytest.raises(XtokenError, match=r"the corpus holds token ids, which are scored as they are; leave it out"):
        capture(config.changed(**flags))


def test_flags_of_the_other_forms(config: PrecomputeConfig, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="--bos never is for text: token ids are scored as they are"):
        capture(config.changed(bos="never"))
    with pytest.raises(XtokenError, match="--on-rendered text is for a corpus of text: token ids are scored as they"):
        capture(config.changed(on_rendered="text"))
    with pytest.raises(XtokenError, match="--no-text is for a corpus of text: a student reads token ids from the capt"):
        capture(config.changed(text=False))
    chats = write(tmp_path / "chats.jsonl", [{"id": "a", "messages": TALKS["plain"]}])
    with pytest.raises(XtokenError, match="is for --form ids, and the corpus holds messages"):
        capture(config.changed(corpus=chats))
    texts = write(tmp_path / "texts.jsonl", [{"id": "a", "text": "one two"}])
    with pytest.raises(XtokenError, match=r"--tokenizer .* is for conversations, and the corpus holds text"):
        capture(config.changed(corpus=texts))


def test_bad_rows_stop_the_run_or_are_named(config: PrecomputeConfig, ids_rows: Rows, tmp_path: Path) -> None:
    good = {"id": "system", **ids_rows["system"]}
    bad = [
        {"id": "shifted", "input_ids": [1, 40, 41], "labels": [40, 41, -100]},
        {"id": "outside", "input_ids": [1, 40, 70000], "labels": [-100, 40, 70000]},
        {"id": "long", "input_ids": [1] + [40] * 30, "loss_mask": [0] + [1] * 30},
    ]
    config = config.changed(corpus=write(tmp_path / "bad.jsonl", [good, bad[0]]), max_tokens=30)
    with pytest.raises(XtokenError, match=r"bad.jsonl, line 2: labels of other tokens: label 0 is 40"):
        capture(config)
    assert not (tmp_path / "out" / "plan.json").exists()
    write(tmp_path / "bad.jsonl", [good, *bad])
    manifest = capture(config.changed(on_bad="skip"))
    assert manifest.corpus.bad == {"labels of other tokens": 1}
    skipped = [json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()]
    assert {one["sample_id"]: one["reason"] for one in skipped} == {
        "outside#0": "an id that is no token",
        "long#0": "longer than --max-tokens",
    }
    assert samples(config.out).keys() == {"system#0"}


def test_what_shows_captures_shows_them(config: PrecomputeConfig) -> None:
    """With an intended student."""
    config = config.changed(student="bytes", shard_bytes=1 << 20)
    manifest = capture(config)
    counts = manifest.parts[0].counts
    assert counts["chunks"] > 5
    assert counts["taught_stop"] == counts["turns"] == 5
    shown = inspect(config.out)
    assert shown["chat"]["form"] == "ids"
    assert not {"template", "date"} & shown["chat"].keys()
    card = facts(manifest)
    assert "**Token ids**: scored as the corpus has them" in card
    assert "**Chat template**" not in card
    page = sample_data(load_sample(InspectConfig(path=config.out, html="plain#0")))
    assert json.dumps(page)
    plan = dry_run(config.changed(dry_run=True), Silent())
    assert plan["form"] == "ids"


def test_targets_are_those_of_messages(kept: PrecomputeConfig, messages: str, tmp_path: Path) -> None:
    """A small student of another family: the same chunks of taught text, and the stop."""
    student = Path(shutil.copytree(GOLDEN / "tiny", tmp_path / "student"))
    shutil.copyfile(GOLDEN / "vicuna.jinja", student / "chat_template.jinja")
    stored = read_manifest(kept.out, CaptureManifest)
    common: dict[str, Any] = {"losses": ["p-kl", "alm", "gold"], "student": str(student)}
    manifest, other = (
        align(AlignConfig(captures=[root], out=str(tmp_path / out), **common), Silent(), executor=InThisProcess())
        for root, out in ((kept.out, "t"), (messages, "m"))
    )
    assert manifest.chat is not None
    assert other.chat is not None
    assert (manifest.chat.template, manifest.chat.date, manifest.chat.learn) == (None, None, ["text", "stop"])
    assert manifest.chat.stop_token == other.chat.stop_token
    verify(str(tmp_path / "t"))
    mine, theirs = (
        {row["sample_id"]: row for b in iter_targets(root) for row in b.to_pylist()}
        for root in (str(tmp_path / "t"), str(tmp_path / "m"))
    )
    for name in ("plain#0", "system#0", "blanks#0", "hostile#0"):
        logprobs = [[one for one in side[name]["teacher_logprob"] if one == one] for side in (mine, theirs)]
        assert logprobs[0] == logprobs[1]
        learned = [
            [token for token, taught in zip(side[name]["student_ids"], side[name]["learn"], strict=True) if taught]
            for side in (mine, theirs)
        ]
        assert learned[0] == learned[1]
    counts = manifest.parts[0].counts
    assert not [key for key in counts if key.startswith("chat_lost")]
    assert stored.chat is not None
    with pytest.raises(XtokenError, match="holds token ids, of which nothing is rendered; leave --template-arg out"):
        align(AlignConfig(captures=[kept.out], out=str(tmp_path / "x"), template_arg=["a=1"], **common), Silent())
    captures = {root: read_manifest(root, CaptureManifest) for root in (kept.out, messages)}
    with pytest.raises(XtokenError, match=r"holds token ids, .* conversations; align them one by one"):
        refuse_other_chat(captures)
    with pytest.raises(XtokenError, match=r"chat\.(template|learn)"):
        merge(MergeConfig(sources=[kept.out, messages], destination=str(tmp_path / "merged")), Silent())


def test_a_student_of_the_same_tokenizer_gets_the_ids(kept: PrecomputeConfig, tmp_path: Path) -> None:
    out = str(tmp_path / "t")
    student = AlignConfig(captures=[kept.out], out=out, losses=["p-kl"], student=kept.teacher.teacher)
    align(student, Silent(), executor=InThisProcess())
    align(student, Silent(), executor=InThisProcess())  # the same again does nothing
    stored = samples(kept.out)
    for batch in iter_targets(out):
        for row in batch.to_pylist():
            assert row["student_ids"] == stored[row["sample_id"]]["teacher_ids"]
            with_target = np.flatnonzero(~np.isnan(row["teacher_logprob"]))
            assert len(with_target) == sum(row["learn"])
    assert read_manifest(out, TargetManifest).parts[0].counts["chat_ce_only_tokens"] == 0


def test_two_captures_of_the_same_ids_have_their_samples_in_common(
    kept: PrecomputeConfig, table: PrecomputeConfig, ids_rows: Rows
) -> None:
    captures = {root: read_manifest(root, CaptureManifest) for root in (kept.out, table.out)}
    refuse_other_chat(captures)
    assert compare(captures, "100MB", Silent())["in_all"] == len(ids_rows)
