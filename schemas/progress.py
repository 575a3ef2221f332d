"""How long work tells what it is doing, without knowing who looks."""

from typing import Protocol


class Progress(Protocol):
    """One bar at a time: start, advance, finish."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Begin ``label``; ``total`` in ``unit`` (tokens, steps, ...) or None when unknown."""
        ...

    def advance(self, amount: int, **figures: float | str) -> None:
        """Add to the count; ``figures`` are shown beside it."""
        ...

    def finish(self) -> None:
        """End the current label."""
        ...


class Silent:
    """A ``Progress`` that shows nothing."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Do nothing."""

    def advance(self, amount: int, **figures: float | str) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
