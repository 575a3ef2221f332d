"""Standard input, output and error, whatever they are: closed, a pipe that nobody reads, without the signs we use."""

import codecs
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console

from xtoken.schemas.errors import XtokenError


def open_streams() -> None:
    """Give every standard stream somewhere to go, and signs that its encoding lacks something to become."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _fill(number)
            setattr(sys, name, open(os.devnull, "r+" if number else "r", encoding="utf-8"))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if speaks_utf8(stream) else "replace")
    if os.environ.get("COLUMNS", "80").strip("0") == "":  # rich would print nothing
        del os.environ["COLUMNS"]


def close_streams() -> None:
    """Write what is still held, so that Python does not complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def _fill(number: int) -> None:
    """Take a closed descriptor, lest the next file to be opened gets it, and what libraries print."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)


def speaks_utf8(stream: Any) -> bool:
    """Whether a text stream takes every sign."""
    try:
        return codecs.lookup(stream.encoding).name.startswith("utf")
    except (LookupError, TypeError, AttributeError):
        return False


def delivered(write: Callable[[], object]) -> bool:
    """Have ``write`` print to standard output; whether anybody reads it (not after ``| head``, which is no error).

    Raises:
        XtokenError: it cannot be written, as on a full disk.
    """
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        return False
    except OSError as error:
        silence(sys.stdout)
        raise XtokenError(f"standard output cannot be written ({error.strerror}); what was done stays") from error
    return True


def silence(stream: Any) -> None:
    """Nobody reads a stream any more: what follows, of libraries too, goes nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Output(Console):
    """Standard output. A pipe that breaks raises, for ``delivered`` to understand."""

    def on_broken_pipe(self) -> None:
        """See ``rich.console.Console``, which would end the process."""
        raise


class _Remarks(io.TextIOBase):
    """Standard error as it is now; work goes on when nobody reads what is remarked."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """See ``io.TextIOBase``."""
        return str(getattr(self._stream, "encoding", None) or "utf-8")

    @property
    def _stream(self) -> Any:
        # a bar puts a stand-in there, which prints through the console that writes here
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def write(self, text: str) -> int:
        """See ``io.TextIOBase``."""
        try:
            self._stream.write(text)
        except (OSError, ValueError, AttributeError):
            silence(self._stream)
        return len(text)

    def flush(self) -> None:
        """See ``io.TextIOBase``."""
        try:
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            silence(self._stream)

    def isatty(self) -> bool:
        """See ``io.TextIOBase``."""
        return self._stream is not None and bool(self._stream.isatty())

    def fileno(self) -> int:
        """See ``io.TextIOBase``."""
        return int(self._stream.fileno())


def remarks(**options: Any) -> Console:
    """A console on standard error that outlives its reader; options as of ``rich.console.Console``."""
    return Console(file=_Remarks(), **options)  # type: ignore[arg-type]


def read_input(what: str) -> str:
    """Standard input to its end.

    Raises:
        XtokenError: it holds nothing, or no text.
    """
    try:
        text = sys.stdin.read()
    except (OSError, ValueError) as error:
        raise XtokenError(f"{what} cannot be read from standard input ({error}); write it as UTF-8 text") from error
    if not text.strip():
        raise XtokenError(f"standard input is empty, and {what} was to be read from it; pipe it in")
    return text
