"""What the command line says of errors that no code of ours raised."""

import errno
import re
import tempfile
from pathlib import Path

import pytest

from xtoken.schemas.errors import PartlyDone, Unforeseen, VerificationError, XtokenError, named


def test_a_users_error_stays_what_it_is() -> None:
    error = VerificationError("two\nlines")
    assert named(error) is error


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "check its path and rights"),
        (errno.EROFS, "check its path and rights"),
        (errno.ENOSPC, "make room"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "disk or share"),
    ],
)
def test_what_the_system_refuses_names_the_file(number: int, said: str) -> None:
    told = named(OSError(number, "why", "/some/file"))
    assert type(told) is XtokenError
    assert told.exit_code == 2
    assert str(told).startswith("/some/file: why; ")
    assert said in str(told)


def test_no_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nothing"])
    with pytest.raises(OSError, match="No usable") as found:
        tempfile.gettempdir()
    told = named(found.value)
    assert (type(told), told.exit_code) == (XtokenError, 2)
    assert "set TMPDIR to a folder that can be written" in str(told)


def test_memory_is_named_in_whatever_words_it_comes() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    for error in (MemoryError(), OutOfMemoryError("CUDA\nmore"), RuntimeError("DefaultCPUAllocator: cannot")):
        told = named(error)
        assert told.exit_code == 2
        assert str(told).startswith("out of memory (")
        assert "\n" not in str(told)


def kept(told: XtokenError) -> str:
    """The text in the file that an error names."""
    match = re.search(r"the full text is in (\S+), please report it", str(told))
    assert match is not None
    return Path(match[1]).read_text(encoding="utf-8")


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_is_unforeseen_is_one_line_and_a_file(own_tmp: Path) -> None:
    try:
        raise KeyError("first\nsecond \udcff")
    except KeyError as error:
        told = named(error)
    assert isinstance(told, Unforeseen)
    assert told.exit_code == 1
    assert str(told).startswith("unforeseen KeyError: ")
    assert "\n" not in str(told)
    assert "test_what_is_unforeseen" in kept(told)
    assert FileNotFoundError.__name__ in str(named(FileNotFoundError(errno.ENOENT, "gone", "x")))
    assert "it says nothing more" in str(named(ValueError()))


def test_a_traceback_of_another_process_is_told_by_its_last_line(own_tmp: Path) -> None:
    told = named(RuntimeError("Traceback (most recent call last):\n  File x\nKeyError: 'why'"))
    assert "RuntimeError: KeyError: 'why';" in str(told)
    assert "File x" in kept(told)


def test_a_full_disk_does_not_hide_the_error(own_tmp: Path) -> None:
    own_tmp.rmdir()
    assert "XTOKEN_TRACEBACK=1" in str(named(KeyError("x")))


def test_several_that_failed_are_one_error_with_the_worst_exit_code() -> None:
    asked = [("a", None), ("b", XtokenError("no room")), ("c", VerificationError("torn"))]
    error = PartlyDone.of_several(asked, "teachers failed, the others' captures stand", {"teachers": 3})
    assert (error.exit_code, error.figures) == (3, {"teachers": 3})
    assert str(error) == (
        "2 of 3 teachers failed, the others' captures stand; the same command goes on with what is missing\n"
        "b: no room\nc: torn"
    )
