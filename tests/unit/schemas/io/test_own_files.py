"""One output file is never written over a file of an artifact; beside them it may lie."""

from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.paths import refuse_unusable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = ("manifest.json", "data/part-00000.parquet", "run/run.json", "run/metrics.jsonl", "run/log.jsonl")
    for name in (*files, "run/model/config.json", "run/checkpoints/step-1/state.json", "run/trace.bin", "a.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "run/report.html").write_text("<!doctype html>\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest.json", "file"),
        ("data/part-00000.parquet", "file"),
        ("data/part-00009.parquet", "file"),
        ("plan.json", "file"),
        ("run/metrics.jsonl", "log"),
        ("run/log.jsonl", "file"),
        ("run/model/config.json", "file"),
        ("run/checkpoints/step-1/state.json", "file"),
        ("run/trace.bin", "file"),
        ("coverage.html", "page"),
    ],
)
def test_files_of_an_artifact_are_kept(root: Path, name: str, kind: Any) -> None:
    (root / "link").symlink_to(root / name)
    for path in (root / name, *([root / "link"] if (root / name).exists() else [])):
        with pytest.raises(XtokenError, match=r"is a file of the artifact in"):
            refuse_unusable(str(path), kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run/report.html", "page"),
        ("run/new.html", "page"),
        ("run/log.jsonl", "log"),
        ("log-1-of-4.jsonl", "log"),
        ("a.csv", "file"),
        ("run/tables/answer.parquet", "file"),
    ],
)
def test_outputs_may_lie_beside_them(root: Path, name: str, kind: Any) -> None:
    refuse_unusable(str(root / name), kind)


def test_names_are_free_elsewhere(tmp_path: Path) -> None:
    for name in ("manifest.json", "summary.json", "coverage.html"):
        refuse_unusable(str(tmp_path / name), "file")


def test_a_page_replaces_pages_only(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "mine"}\n')
    with pytest.raises(XtokenError, match="is there and is not a page"):
        refuse_unusable(str(path), "page")
    for text in ("", "\n<!DOCTYPE html>\n"):
        path.write_text(text)
        refuse_unusable(str(path), "page")
