"""How long work tells what it is doing, without knowing who looks."""

import time
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from xtoken.schemas.ui.terminal import remarks


class Progress(Protocol):
    """One bar at a time: start, advance, finish."""

    def start(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin ``label``: ``total`` in ``unit`` or None when unknown, ``done`` of it by an earlier run."""
        ...

    def advance(self, amount: int, **figures: float | str) -> None:
        """Add to the count; ``figures`` are shown beside it."""
        ...

    def finish(self) -> None:
        """End the current label."""
        ...

    def note(self, text: str) -> None:
        """Say something that the user should know before the work is done."""
        ...


class Silent:
    """A ``Progress`` that shows nothing."""

    def start(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int, **figures: float | str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def brief(value: Any) -> str:
    """A figure as a person reads it: four significant digits, thousands apart."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Bars:
    """Progress on stderr: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = remarks()
        self.bar: RichProgress | None = None
        self.task = TaskID(0)
        self.label, self.unit, self.total = "", "", 0
        self.count, self.resumed, self.began, self.spoke = 0, 0, 0.0, 0.0

    def start(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a bar (see ``xtoken.schemas.ui.progress.Progress``)."""
        self.finish()
        self.label, self.unit, self.total = label, unit, total or 0
        self.count = self.resumed = done
        self.began = self.spoke = time.monotonic()
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = RichProgress(*columns, TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, completed=done, note=unit)

    def advance(self, amount: int, **figures: float | str) -> None:
        """Add to the count and show the rate and the figures given."""
        self.count += amount
        seconds = time.monotonic() - self.began
        rate = (self.count - self.resumed) / seconds if seconds > 0 else 0.0
        shown = [f"{self.unit} ({rate:,.1f}/s)", *(f"{key} {brief(value)}" for key, value in figures.items())]
        if self.bar is not None:
            self.bar.update(self.task, advance=amount, note="  ".join(shown))
        elif not self.quiet and time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            left = f", {(self.total - self.count) / rate:,.0f} s left" if self.total and rate else ""
            of_total = f"/{self.total:,}" if self.total else ""
            self.console.print(
                f"{self.label}: {self.count:,}{of_total} {'  '.join(shown)}{left}", highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            self.console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.stop()
        self.bar = None
