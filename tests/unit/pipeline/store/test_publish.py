"""Publishing: what a kill, a twin, a torn file or a full disk leave behind."""

import errno
import json
import os
import uuid

import pytest

from xtoken.pipeline.store.files import DiskFull, Folder
from xtoken.pipeline.store.publish import Figures, clean, commit_name, committed, data_name, publish_part
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.remote import named_errors


class Writer:
    """Writes ``content``; ``fails`` is raised half-way."""

    def __init__(self, content: bytes, fails: Exception | None = None) -> None:
        self.content, self.fails, self.calls = content, fails, 0

    def __call__(self, url: str) -> dict[str, int]:
        import fsspec

        self.calls += 1
        with fsspec.open(url, "wb") as file:
            file.write(self.content[: len(self.content) // 2])
            if self.fails is not None:
                raise self.fails
            file.write(self.content[len(self.content) // 2 :])
        return {"extra": 7}


def check(url: str) -> Figures:
    import fsspec

    with fsspec.open(url, "rb") as file:
        content = file.read()
    if not content.startswith(b"good"):
        raise VerificationError("not good")
    return Figures(1, 2, 3, 4, len(content))


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4()}/out"


def test_publishes_and_commits(root):
    part = publish_part(root, 3, Writer(b"good one"), check)
    folder = Folder(root)
    assert folder.read(data_name(3)) == b"good one"
    assert (part.index, part.file_bytes, part.text_bytes, part.counts) == (3, 8, 8, {"extra": 7})
    assert part.sha256 == folder.sha256(data_name(3))[0]
    assert committed(root) == {3: part}
    assert folder.names("data") == ["part-00003.parquet"]
    assert folder.names("commits") == ["part-00003.json"]


def test_a_second_attempt_gets_the_first_commit_and_writes_nothing(root):
    first = publish_part(root, 0, Writer(b"good one"), check)
    late = Writer(b"good two")
    assert publish_part(root, 0, late, check) == first
    assert late.calls == 0


def test_a_slow_twin_loses(root):
    class Slow(Writer):
        def __call__(self, url):
            counts = super().__call__(url)
            self.first = publish_part(root, 0, Writer(b"good one"), check)
            return counts

    slow = Slow(b"good two, later")
    assert publish_part(root, 0, slow, check) == slow.first
    assert Folder(root).read(data_name(0)) == b"good one"
    assert Folder(root).names("data") == ["part-00000.parquet"]


class Swept(Writer):
    """Another run begins, and sweeps, each of the first ``times`` times that the file is written, or read back."""

    def __init__(self, root: str, times: int, when: str = "written") -> None:
        super().__init__(b"good one")
        self.root, self.times, self.when = root, times, when

    def __call__(self, url: str) -> dict[str, int]:
        counts = super().__call__(url)
        self.sweep("written")
        return counts

    def check(self, url: str) -> Figures:
        self.sweep("read")
        with named_errors(url):
            return check(url)

    def sweep(self, when: str) -> None:
        if when == self.when and self.calls <= self.times:
            assert [name.split(".")[0] for name in clean(self.root)] == ["data/part-00000"]


@pytest.mark.parametrize("when", ["written", "read"])
def test_a_part_that_another_run_sweeps_away_is_written_again(root, when):
    swept = Swept(root, 2, when)
    assert publish_part(root, 0, swept, swept.check) == committed(root)[0]
    assert swept.calls == 3
    assert Folder(root).read(data_name(0)) == b"good one"
    assert Folder(root).names("data") == ["part-00000.parquet"]


def test_what_goes_on_sweeping_is_named(root):
    with pytest.raises(XtokenError, match=r"part-00000\..*\.tmp cannot be written: something removes files from .*out"):
        publish_part(root, 0, Swept(root, 99), check)
    assert committed(root) == {}


def test_a_published_file_without_a_record_is_adopted(root):
    folder = Folder(root)
    folder.make("data")
    folder.create(data_name(0), b"good orphan")
    part = publish_part(root, 0, Writer(b"good two"), check)
    assert folder.read(data_name(0)) == b"good orphan"
    assert part.sha256 == folder.sha256(data_name(0))[0]
    assert part.text_bytes == len(b"good orphan")


def test_a_bad_published_file_without_a_record_is_set_aside(root):
    folder = Folder(root)
    folder.make("data")
    folder.create(data_name(0), b"torn")
    part = publish_part(root, 0, Writer(b"good two"), check)
    assert folder.read(data_name(0)) == b"good two"
    assert part.file_bytes == 8
    assert [name.endswith(".bad") for name in folder.names("data")] == [False, True]


def test_what_does_not_verify_is_not_published(root):
    with pytest.raises(VerificationError):
        publish_part(root, 0, Writer(b"bad"), check)
    assert committed(root) == {}
    assert Folder(root).names("data") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so_and_leaves_nothing(root, number):
    publish_part(root, 0, Writer(b"good one"), check)
    with pytest.raises(DiskFull, match="free some space and run the same command again"):
        publish_part(root, 1, Writer(b"good two", OSError(number, os.strerror(number))), check)
    assert list(committed(root)) == [0]
    assert Folder(root).names("data") == ["part-00000.parquet"]
    publish_part(root, 1, Writer(b"good two"), check)


def test_other_os_errors_keep_their_name(root):
    with pytest.raises(PermissionError if Folder(root).local else XtokenError, match="no"):
        publish_part(root, 0, Writer(b"good", PermissionError(errno.EACCES, "no")), check)
    assert Folder(root).names("data") == []


def test_clean_removes_what_dead_attempts_left_of_some_parts_or_of_all(root):
    folder = Folder(root)
    folder.make("data", "commits")
    mine = ["data/part-00000.dead.tmp", "commits/part-00000.json.dead.tmp"]
    for name in (*mine, "data/part-00001.other.tmp", "manifest.json.dead.tmp"):
        folder.create(name, b"x")
    publish_part(root, 4, Writer(b"good"), check)
    assert clean(root, lambda index: index == 0) == mine
    assert folder.names("data") == ["part-00001.other.tmp", "part-00004.parquet"]
    assert clean(root) == ["manifest.json.dead.tmp", "data/part-00001.other.tmp"]
    assert folder.names("data") == ["part-00004.parquet"]


def test_records_of_another_part_or_of_nothing_are_refused(root):
    folder = Folder(root)
    part = publish_part(root, 0, Writer(b"good"), check)
    folder.create(commit_name(1), part.model_dump_json().encode())
    with pytest.raises(VerificationError, match="speaks of part 0"):
        committed(root)
    folder.replace(commit_name(1), json.dumps({"index": 1, "path": "../../etc/passwd"}).encode())
    with pytest.raises(VerificationError, match="not a commit record"):
        committed(root)


def test_create_is_whole_and_first_wins(root):
    folder = Folder(root)
    folder.make("")
    assert folder.create("name", b"first")
    assert not folder.create("name", b"second")
    assert folder.read("name") == b"first"
    folder.replace("name", b"third")
    assert folder.read("name") == b"third"
    assert folder.names() == ["name"]


def test_no_hard_links_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(XtokenError, match="no hard links"):
        publish_part(str(tmp_path), 0, Writer(b"good"), check)
    assert Folder(str(tmp_path)).names("data") == []


@pytest.mark.parametrize("how", ["replace", "create"])
def test_a_file_that_another_run_sweeps_away_is_written_again(tmp_path, monkeypatch, how):
    """Two runs in one folder: one begins, and takes the other's temporary file for a dead writer's."""
    folder, write, sweeps = Folder(str(tmp_path)), Folder._write_tmp, []

    def swept(self, name, data):
        tmp = write(self, name, data)
        if len(sweeps) < 2:
            sweeps.append(clean(self.root))
        return tmp

    monkeypatch.setattr(Folder, "_write_tmp", swept)
    getattr(folder, how)("manifest.json", b"all of it")
    assert len(sweeps) == 2
    assert folder.read("manifest.json") == b"all of it"
    assert folder.names() == ["manifest.json"]
    sweeps.clear()
    monkeypatch.setattr("xtoken.pipeline.store.files.SWEEPS", 2)
    with pytest.raises(XtokenError, match=r"other.json cannot be written: something removes files from .*; stop it"):
        getattr(folder, how)("other.json", b"")
