"""Targets at a URL: what is read when, and what damage does there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import RowGroup, Targets

COLUMNS = ("student_ids", "chunk_student_end")
LENGTHS = [[5, 9, 4], [7, 3], [6]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote(cache: Path, make_targets: Callable[..., str]) -> Iterator[tuple[str, str]]:
    """A target folder, and the same at a URL."""
    fs = fsspec.filesystem("memory")
    root = make_targets(LENGTHS)
    fs.put(root, "/remote-targets", recursive=True)
    yield root, "memory://remote-targets"
    fs.rm("/remote-targets", recursive=True)


def held(cache: Path) -> int:
    return len([path for path in cache.glob("*") if path.name != ".lock"])


def same(ours: RowGroup, theirs: RowGroup) -> bool:
    pairs = [(ours.lists[name], theirs.lists[name]) for name in COLUMNS]
    equal = all((mine[at] == other[at]).all() for mine, other in pairs for at in (0, 1))
    return ours.sample_ids == theirs.sample_ids and equal


def test_parts_come_when_they_are_read(remote: tuple[str, str], cache: Path) -> None:
    here, there = Targets(remote[0]), Targets(remote[1])
    assert there.groups == here.groups
    assert (there.samples, held(cache)) == (sum(map(len, LENGTHS)), 0)
    for ref in here.groups:
        assert same(here.read(ref, COLUMNS), there.read(ref, COLUMNS))
    assert held(cache) == len(here.manifest.parts) == len(LENGTHS)


def test_what_does_not_fit_the_cache_is_read_where_it_lies(
    remote: tuple[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Targets(remote[1]).remote_bytes
    monkeypatch.setenv("XTOKEN_CACHE_BYTES", str(size - 1))
    here, there = Targets(remote[0]), Targets(remote[1])
    assert (here.stream, there.stream) == (False, True)
    assert all(same(here.read(ref, COLUMNS), there.read(ref, COLUMNS)) for ref in here.groups)
    assert held(cache) == 0


def test_folders_of_one_run_share_the_cache(
    remote: tuple[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOKEN_CACHE_BYTES", str(Targets(remote[1]).remote_bytes))
    folders = [Targets(remote[1]), Targets(remote[1]), Targets(remote[0])]
    assert [folder.stream for folder in folders] == [False, False, False]
    Sources(folders)
    assert [folder.stream for folder in folders] == [True, True, False]


def test_a_changed_part_is_refused_when_it_is_read(remote: tuple[str, str], cache: Path) -> None:
    fs, path = fsspec.filesystem("memory"), "/remote-targets/data/part-00001.parquet"
    whole = fs.cat_file(path)
    fs.pipe_file(path, whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    there = Targets(remote[1])
    refs = {ref.part: ref for ref in there.groups}
    there.read(refs[0], COLUMNS)
    with pytest.raises(VerificationError, match=r"memory://remote-targets/data/part-00001\.parquet has .* sha256"):
        there.read(refs[1], COLUMNS)
    os.remove(next(path for path in cache.iterdir() if path.name != ".lock"))
    fs.rm_file(path)
    with pytest.raises(VerificationError, match=r"part-00001\.parquet"):
        there.read(refs[1], COLUMNS)
