"""Files and folders that appear whole or not at all, and what is left where that fails."""

import os
from pathlib import Path

import pytest

from xtoken.schemas.io.atomic import rename_synced, sync, whole_file, whole_folder, write_synced, write_text


class TornError(Exception):
    """What goes wrong half-way."""


def tear(path: Path) -> None:
    """Write half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    raise TornError


def test_a_file_takes_the_place_of_the_old_one_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")
    with whole_file(path) as temporary:
        assert temporary == tmp_path / ".run.json.tmp", "sweeps and resumed runs know it by this name"
        temporary.write_text("n")
        assert path.read_text() == "old"
        temporary.write_text("new ü", encoding="utf-8")
    assert path.read_bytes() == "new ü".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(TornError), whole_file(path) as temporary:
        tear(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_of_the_block_is_the_one_that_is_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TornError), whole_file(tmp_path / "file" / "below"):
        raise TornError


def test_a_leftover_of_a_killed_writer_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_text("half of a file that was much longer")
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with whole_file(path, shared=True) as first, whole_file(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "whoever is done last"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").write_text("")
    (tmp_path / ".model.tmp").mkdir()
    with whole_folder(out) as temporary:
        assert not temporary.exists(), "what a killed run left is gone"
        temporary.mkdir()
        (temporary / "new").write_text("")
        assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    with pytest.raises(TornError), whole_folder(out) as temporary:
        tear(temporary / "below" / "file")
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_synced_reaches_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before name, name before the folder's entry: after a power cut no name holds half a file."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    old, new = str(tmp_path / "a.tmp"), str(tmp_path / "a")
    write_synced(old, b"data")
    rename_synced(old, new)
    assert calls == [old, "rename", str(tmp_path)]
    sync(new)
    assert calls[-1] == new
    assert Path(new).read_bytes() == b"data"


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_synced(str(tmp_path / "a"), b"data")
    assert list(tmp_path.iterdir()) == []
