"""Captures of token ids: merged, subset, verified, queried and drawn."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.page.sample_page import write_page
from xtoken.pipeline.query import query
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.figures import chat_figures
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import InspectConfig, QueryConfig
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

from ..conftest import IDS_SETTINGS


def rows(*roots: Path) -> list[dict[str, Any]]:
    return [row for root in roots for row in pa.Table.from_batches(iter_capture(str(root))).to_pylist()]


def ask(root: Path, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(QueryConfig(path=str(root), sql=sql))["rows"]
    return found


@pytest.fixture(scope="module")
def others(
    small_capture: Callable[..., Path], ids_rows: dict[str, dict[str, Any]], tokenizer_file: Callable[[str], Path]
) -> Path:
    """A capture of other records of the same teacher; read only."""
    more = {f"more/{name}": ids_rows[name] for name in ("plain", "system")}
    return small_capture(more, **IDS_SETTINGS, tokenizer=str(tokenizer_file("smollm2")))


def test_captures_of_token_ids_become_one(ids_capture: Path, others: Path, tmp_path: Path) -> None:
    """Whenever each was made: nothing of them says a day."""
    sources = [str(ids_capture), str(others)]
    merge(MergeConfig(sources=sources, destination=str(tmp_path / "one")), Silent())
    verify(str(tmp_path / "one"))
    found = read_manifest(str(tmp_path / "one"), CaptureManifest)
    assert found.chat == read_manifest(str(ids_capture), CaptureManifest).chat
    assert rows(tmp_path / "one") == rows(ids_capture, others)
    figures = [chat_figures(read_manifest(root, CaptureManifest)) for root in sources]
    assert chat_figures(found)["taught_turns"] == sum(one["taught_turns"] for one in figures)


def test_parts_of_one_plan_come_together_again(ids_capture: Path, tmp_path: Path) -> None:
    for name, parts in (("head", "0-1"), ("tail", "2")):
        pull(PullConfig(source=str(ids_capture), destination=str(tmp_path / name), parts=parts), Silent())
    sources = [str(tmp_path / "head"), str(tmp_path / "tail")]
    merge(MergeConfig(sources=sources, destination=str(tmp_path / "one")), Silent())
    assert rows(tmp_path / "one") == rows(ids_capture)


def test_chosen_samples_are_counted_anew(ids_capture: Path, tmp_path: Path) -> None:
    where = "len(teacher_ids) > 30"
    pull(PullConfig(source=str(ids_capture), destination=str(tmp_path / "some"), where=where), Silent())
    verify(str(tmp_path / "some"))
    kept = rows(tmp_path / "some")
    assert 0 < len(kept) < len(rows(ids_capture))
    figures = chat_figures(read_manifest(str(tmp_path / "some"), CaptureManifest))
    assert sum(figures["taught_tokens"].values()) == sum(len(row["realised_logprob"]) for row in kept)
    assert figures["conversations"] == len(kept)


def test_a_template_without_a_date_is_no_manifest(ids_capture: Path, tmp_path: Path) -> None:
    """And a date without a template: nothing was rendered."""
    root = Path(shutil.copytree(ids_capture, tmp_path / "changed"))
    manifest = json.loads((root / "manifest.json").read_text())
    for changes in ({"template": "0" * 64}, {"date": "2026-07-04"}):
        changed = {**manifest, "chat": {**manifest["chat"], **changes}}
        (root / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(XtokenError, match="a chat template has a date"):
            verify(str(root))


def test_spans_are_those_on_disk(ids_capture: Path) -> None:
    stored = {row["sample_id"]: row for row in rows(ids_capture)}
    found = ask(ids_capture, "SELECT sample_id, list(kind ORDER BY span) AS kinds, string_agg(text, '' ORDER BY span) "
                "AS said, sum(tokens) AS tokens, sum(nats) AS nats FROM spans GROUP BY sample_id")  # fmt: skip
    assert len(found) == len(stored)
    for one in found:
        row = stored[one["sample_id"]]
        assert one["kinds"] == row["span_kind"]
        assert one["said"] == row["text"]
        assert one["tokens"] == len(row["teacher_ids"])
        assert math.isclose(one["nats"], -np.sum(row["realised_logprob"]), rel_tol=1e-4)


def test_a_page_shows_runs_of_text(ids_capture: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    figures = write_page(InspectConfig(path=str(ids_capture), html="system#0", out=str(page)))
    assert figures["taught_tokens"] == len(
        next(r for r in rows(ids_capture) if r["sample_id"] == "system#0")["realised_logprob"]
    )
    assert figures["turns"] == 1
    assert figures["page_bytes"] == page.stat().st_size
