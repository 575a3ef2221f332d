"""Subsets, merges and copies of captures of conversations."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from talks import TALKS

from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.figures import chat_figures
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.seal import seal
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.tables import SPAN_COLUMNS
from xtoken.schemas.ui.progress import Silent

SETTINGS: dict[str, Any] = {"max_tokens": 96, "k": 16, "min_p": 0.01, "on_bad": "skip", "date": "2026-07-04"}


@pytest.fixture(scope="session")
def halves(small_capture: Callable[..., Path]) -> dict[str, Path]:
    """Captures of some conversations each, alike but for what their names say; the second skips one."""
    first = {f"a/{name}": TALKS[name] for name in ("plain", "system")}
    # a template that has no end, and one whose answers are empty
    second = {f"b/{name}": TALKS[name] for name in ("call", "thinking")} | {"b/none": TALKS["plain"][:1]}
    return {
        "first": small_capture(first, "smollm2", **SETTINGS),
        "second": small_capture(second, "smollm2", **SETTINGS),
        "last turns": small_capture(first, "smollm2", **SETTINGS, turns="last"),
        "another day": small_capture(first, "smollm2", **{**SETTINGS, "date": "2026-07-05"}),
        "thinking": small_capture(first, "smollm2", **SETTINGS, learn=["thinking"]),
        "text": small_capture({"a.txt": "Hello."}, "smollm2", max_tokens=96, k=16, min_p=0.01),
    }


def merged(sources: list[Path], destination: Path) -> CaptureManifest:
    merge(MergeConfig(sources=[str(source) for source in sources], destination=str(destination)), Silent())
    verify(str(destination))
    return read_manifest(str(destination), CaptureManifest)


def pulled(source: Path, destination: Path, **options: Any) -> CaptureManifest:
    pull(PullConfig(source=str(source), destination=str(destination), **options), Silent())
    verify(str(destination))
    return read_manifest(str(destination), CaptureManifest)


def rows(*roots: Path) -> list[dict[str, Any]]:
    return [row for root in roots for row in pa.Table.from_batches(iter_capture(str(root))).to_pylist()]


def test_a_copy_and_some_parts_keep_spans_and_messages(chat_capture: Path, tmp_path: Path) -> None:
    found = pulled(chat_capture, tmp_path / "some", parts="0-1")
    assert found.chat == read_manifest(str(chat_capture), CaptureManifest).chat
    whole = rows(chat_capture)
    assert rows(tmp_path / "some") == whole[: len(rows(tmp_path / "some"))]
    assert {*SPAN_COLUMNS, "messages"} <= set(whole[0])


def test_chosen_samples_are_counted_anew(chat_capture: Path, tmp_path: Path) -> None:
    found = pulled(chat_capture, tmp_path / "some", where="list_contains(span_kind, 'call') OR len(teacher_ids) > 40")
    kept = rows(tmp_path / "some")
    assert 0 < len(kept) < len(rows(chat_capture))
    figures, by_kind = chat_figures(found), Counter[str]()
    for row in kept:
        sizes = np.diff(row["span_token_end"], prepend=0).tolist()
        for kind, learn, size in zip(row["span_kind"], row["span_learn"], sizes, strict=True):
            by_kind[kind] += size if learn else 0
    assert figures["taught_tokens"] == +by_kind
    turns = [{m for m, learn in zip(row["span_message"], row["span_learn"], strict=True) if learn} for row in kept]
    assert figures["taught_turns"] == sum(map(len, turns))
    assert figures["conversations"] == len(kept)
    assert "absent_contents" not in figures, "only the teacher's template says it"


def test_without_text_there_are_no_messages_either(chat_capture: Path, tmp_path: Path) -> None:
    found = pulled(chat_capture, tmp_path / "bare", columns=["none"])
    assert {"text", "messages"} <= set(found.left_out)
    for row in rows(tmp_path / "bare"):
        assert row["text"] is row["messages"] is None
        assert row["span_kind"]
    data = b"".join(path.read_bytes() for path in (tmp_path / "bare" / "data").iterdir())
    assert b"messages" not in data
    shown = inspect(str(tmp_path / "bare"))["samples_shown"][0]
    assert shown["row"]["position"] > 0


def test_conversations_of_one_kind_become_one_capture(halves: dict[str, Path], tmp_path: Path) -> None:
    found = merged([halves["first"], halves["second"]], tmp_path / "joined")
    assert found.chat == read_manifest(str(halves["first"]), CaptureManifest).chat
    assert found.schema_version == 6
    assert rows(tmp_path / "joined") == rows(halves["first"], halves["second"])
    figures = [chat_figures(read_manifest(str(halves[name]), CaptureManifest)) for name in ("first", "second")]
    assert chat_figures(found)["taught_turns"] == sum(one["taught_turns"] for one in figures)


def test_what_the_sources_skipped_is_named_by_new_numbers(halves: dict[str, Path], tmp_path: Path) -> None:
    (skipped,) = [json.loads(line) for line in (halves["second"] / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["sample_id"], skipped["reason"]) == ("b/none", "nothing is taught")
    merged([halves["first"], halves["second"]], tmp_path / "joined")
    (found,) = [json.loads(line) for line in (tmp_path / "joined" / "skipped.jsonl").read_text().splitlines()]
    parts = len(read_manifest(str(halves["first"]), CaptureManifest).parts)
    assert found == skipped | {"part": skipped["part"] + parts}
    assert inspect(str(tmp_path / "joined"))["skipped_conversations"] == {"nothing is taught": 1}


def test_parts_of_one_plan_name_what_was_skipped_once(halves: dict[str, Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(halves["second"], tmp_path / name)) for name in ("one", "two")]
    merged(copies, tmp_path / "joined")
    assert (tmp_path / "joined" / "skipped.jsonl").read_bytes() == (halves["second"] / "skipped.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last turns", r"chat\.turns is 'all' and 'last'"),
        ("another day", r"chat\.date is '2026-07-04' and '2026-07-05'"),
        ("thinking", r"chat\.learn is \['assistant', 'call', 'stop'\] and \['assistant', 'call', 'stop', 'thinking'\]"),
        ("text", r"chat\.form is 'messages' and 'text'"),
    ],
)
def test_what_was_read_otherwise_is_refused_by_name(
    halves: dict[str, Path], tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(XtokenError, match=rf"cannot be one capture: {said}"):
        merged([halves["second"], halves[name]], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_another_template_is_refused_by_name(halves: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(halves["first"], tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["chat"]["template"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    seal(str(other))
    with pytest.raises(XtokenError, match=r"chat\.template is '[0-9a-f]{64}' and '0{64}'"):
        merged([halves["second"], other], tmp_path / "joined")
