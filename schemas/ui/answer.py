"""What a verb says at its end: its figures, or what went wrong. Under torchrun one process speaks for all."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from xtoken.schemas.errors import PartlyDone, XtokenError
from xtoken.schemas.ui.terminal import Output, delivered, remarks, speaks_utf8

RANK = os.environ.get("RANK", "0")


class Interrupted(XtokenError):
    """Ctrl-C."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted; what was committed stays, the same command resumes")


class Answer:
    """How the command line answers.

    Args:
        as_json: figures and errors are one JSON object on standard output.
        quiet: no remarks.
        tables: makes what a terminal is shown of figures.
    """

    def __init__(self, as_json: bool, quiet: bool, tables: Callable[[dict[str, Any]], list[Any]]) -> None:
        self._as_json, self._quiet, self._tables = as_json, quiet or RANK != "0", tables

    def show(self, figures: dict[str, Any]) -> bool:
        """Print figures; whether anybody reads on.

        Raises:
            XtokenError: standard output cannot be written.
        """
        if RANK != "0":
            return True
        if not self._as_json:
            return delivered(lambda: Output().print(*self._tables(figures), sep="\n"))
        text = json.dumps(figures, ensure_ascii=not speaks_utf8(sys.stdout), default=str)
        return delivered(lambda: sys.stdout.write(f"{text}\n"))

    def complain(self, error: XtokenError) -> None:
        """Say what went wrong: on standard error always, with ``as_json`` on standard output too."""
        figures = error.figures if isinstance(error, PartlyDone) else {}
        if self._as_json:
            figures = {"error": str(error), "kind": type(error).__name__, **figures}
        with suppress(XtokenError):  # standard output may be what the error is about
            if figures:
                self.show(figures)
        say = remarks(soft_wrap=True)
        say.print("[red]error:[/red]" if RANK == "0" else f"[red]error of rank {RANK}:[/red]", end=" ")
        say.out(error, highlight=False)

    def note(self, text: str | None) -> None:
        """Say something on standard error, unless there is nothing to say."""
        if text is not None and not self._quiet:
            remarks(soft_wrap=True).out(f"note: {text}", highlight=False)
