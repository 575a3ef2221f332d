"""Errors that a user can cause. Each message names the value, the rule and the way out.

Everything else that is raised is a defect of ours, or of a library: the command line writes its traceback to a file.
"""

import errno
import re
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

TRACEBACK = "XTOKEN_TRACEBACK"  # set it, and the command line raises what it cannot name
# What the system refuses; any file may meet it, wherever in the code.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, or what one may take of it
_EXHAUSTED = (*NO_ROOM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)
_MEMORY = ("OutOfMemory", "DefaultCPUAllocator", "bad_alloc")  # as torch, DuckDB and C++ say it
_NO_TEMPORARY = "No usable temporary directory"  # as tempfile says it, without a number that tells
_WAYS_OUT = (
    (_REFUSED, "check its path and rights"),
    (_EXHAUSTED, "make room (disk, quota, memory, 'ulimit -n') and run the same command again"),
    (_BROKEN, "its disk or share does not answer as it should; check it and run the same command again"),
)


class XtokenError(Exception):
    """Bad input or a refused request; the command line prints it without a traceback."""

    exit_code = 2


class VerificationError(XtokenError):
    """What lies on disk is not what its manifest says."""

    exit_code = 3


class Unreachable(XtokenError):
    """A server does not answer now, or says that it cannot: trying again later may help."""


class IncompleteRun(XtokenError):
    """A run ended with quarantined shards; what was committed stays and the same command resumes."""

    exit_code = 4


class PartlyDone(XtokenError):
    """Some of what was asked for is done, some failed; ``figures`` say which."""

    def __init__(self, message: str, figures: dict[str, Any], exit_code: int) -> None:
        super().__init__(message)
        self.figures, self.exit_code = figures, exit_code

    @classmethod
    def of_several(
        cls, asked: Sequence[tuple[str, XtokenError | None]], outcome: str, figures: dict[str, Any]
    ) -> "PartlyDone":
        """What to raise where several were asked for and some failed; the worst exit code counts.

        Args:
            asked: of each that was asked for, its name and its error, None where it is done.
            outcome: what follows their number, such as ``teachers failed, the others' captures stand``.
            figures: of all of them.
        """
        errors = [(name, error) for name, error in asked if error is not None]
        lines = "\n".join(f"{name}: {error}" for name, error in errors)
        return cls(
            f"{len(errors)} of {len(asked)} {outcome}; the same command goes on with what is missing\n{lines}",
            figures,
            max(error.exit_code for _, error in errors),
        )


class Unforeseen(XtokenError):
    """What nobody expected: a defect of ours or of a library."""

    exit_code = 1


def named(error: Exception) -> XtokenError:
    """An error as the command line says it: in one line, and for what is unforeseen where the traceback lies."""
    if isinstance(error, XtokenError):
        return error
    if isinstance(error, MemoryError) or any(sign in f"{type(error).__name__}: {error}" for sign in _MEMORY):
        said = str(error).strip().splitlines() or ["nothing is left"]
        return XtokenError(f"out of memory ({said[0][:200]}); use smaller batches or fewer --workers")
    if _NO_TEMPORARY in str(error):
        return XtokenError("no temporary folder can be written; set TMPDIR to a folder that can be written")
    if isinstance(error, OSError):
        for numbers, way_out in _WAYS_OUT:
            if error.errno in numbers:
                return XtokenError(f"{_file_of(error)}{error.strerror or error}; {way_out}")
    return Unforeseen(f"unforeseen {type(error).__name__}: {last_words(str(error))}; {_kept(error)}")


def _file_of(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: " if names else ""


def last_words(text: str) -> str:
    """One line of an error's text: of a traceback, as other processes send it, the last, else the first."""
    lines = text.strip().splitlines() or ["it says nothing more"]
    if "Traceback (most recent call last)" not in text:
        return lines[0].strip()[:300]
    named = [line for line in lines if re.match(r"[\w.]+: ", line)]  # an error's own text may have several lines
    return (named or lines)[-1].strip()[:300]


def _kept(error: Exception) -> str:
    """Write the traceback to a file; says where it is."""
    with suppress(OSError):
        text = "".join(traceback.format_exception(error))
        with tempfile.NamedTemporaryFile("wb", prefix="xtoken-error-", suffix=".txt", delete=False) as file:
            file.write(text.encode(errors="backslashreplace"))
        return f"the full text is in {file.name}, please report it"
    return f"set {TRACEBACK}=1 to see the full text, and report it"
