"""Nothing is written where a corpus is read, by whatever name either is called."""

from pathlib import Path

import pytest

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.overlap import refuse_inside


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a corpus folder, a link to it, and a folder beside it."""
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "a.jsonl").write_text("")
    (tmp_path / "corpus-2").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "corpus", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


INSIDE = [
    ("corpus/out", "corpus"),
    ("corpus", "corpus/"),
    ("./corpus-2/../corpus/deep/out", "corpus"),
    ("link/out", "corpus"),
    ("corpus/out", "link"),
    ("corpus/out", "file://{here}/corpus"),
    ("{here}/corpus/out", "."),
    ("out", "/"),
    ("corpus/a.jsonl", "link/a.jsonl"),
    ("memory://bucket/corpus/out", "memory://bucket/corpus/"),
    ("memory://bucket/corpus//out", "memory://bucket/corpus"),
]
OUTSIDE = [
    ("out", "corpus"),
    ("corpus-2", "corpus"),
    ("corpus/../out", "corpus"),
    ("corpus/out", "corpus/a.jsonl"),
    ("corpus", "corpus/deep"),
    ("memory://bucket/corpus-2/out", "memory://bucket/corpus"),
    ("memory://{here}/corpus/out", "corpus"),
]


@pytest.mark.parametrize(("path", "folder"), INSIDE)
def test_inside(here: Path, path: str, folder: str) -> None:
    path, folder = path.format(here=here), folder.format(here=here)
    with pytest.raises(XtokenError) as error:
        refuse_inside("--out", path, folder)
    assert str(error.value).startswith(f"--out {path} lies inside {folder}, but ")
    assert str(error.value).endswith("choose a place outside of it")


@pytest.mark.parametrize(("path", "folder"), OUTSIDE)
def test_outside(here: Path, path: str, folder: str) -> None:
    refuse_inside("--out", path.format(here=here), folder.format(here=here))


def test_object_stores() -> None:
    pytest.importorskip("s3fs", reason="needs xtoken[s3]")
    with pytest.raises(XtokenError, match="lies inside s3a://bucket/corpus"):
        refuse_inside("--out", "s3://bucket/corpus/out", "s3a://bucket/corpus")
    refuse_inside("--out", "s3://bucket/corpus.out", "s3://bucket/corpus")
