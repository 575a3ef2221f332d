"""The order of an epoch: which stream reads which rows, and which samples are shuffled among each other.

Everything here is a function of (folders, seed, streams, stream, epoch), so a run goes on where it stood on any number
of ranks. Per epoch the parts are shuffled, then the row groups within each run of ``RUN_PARTS`` parts, so that a remote
read keeps to few files at a time; each row group goes to the stream that has the fewest samples so far. A stream joins
its row groups to windows, decodes a window together and shuffles its samples. Each row group is thus read once per
epoch and memory stays bounded, at the price that samples of distant windows never meet in one step.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.sources import OwnedGroup, Sources

# What is decoded together. At 32 entries a token, 2**19 tokens are some 150 MB, and a stream holds two windows.
WINDOW_SAMPLES = 1024
WINDOW_TOKENS = 1 << 19
RUN_PARTS = 4
# With fewer row groups than this per stream they are split, so that streams get like shares.
UNITS_PER_STREAM = 4


@dataclass(frozen=True)
class Position:
    """Where a stream stands: samples already taken of an epoch."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Window:
    """Row groups, or slices of them, whose samples are shuffled among each other.

    Attributes:
        before: samples of the stream's epoch that stand before the window. share: samples of the stream's epoch.
    """

    epoch: int
    number: int
    before: int
    share: int
    units: tuple[OwnedGroup, ...]

    @property
    def samples(self) -> int:
        """How many it holds."""
        return sum(len(unit.rows) for unit in self.units)


@dataclass(frozen=True)
class Plan:
    """Order of a stream's samples.

    Raises:
        XtokenError: there are fewer samples than streams.
    """

    sources: Sources
    seed: int
    streams: int = 1

    def __post_init__(self) -> None:
        if self.sources.samples < self.streams:
            raise XtokenError(
                f"{self.sources.samples} samples cannot be dealt to {self.streams} streams; lower --streams, or "
                "align more text"
            )

    def windows(self, stream: int, position: Position) -> Iterator[Window]:
        """Endless windows from the one on that holds the sample after ``position``."""
        epoch, taken = position.epoch, position.taken
        while True:
            for window in self.epoch_windows(stream, epoch):
                if window.before + window.samples > taken:
                    yield window
            epoch, taken = epoch + 1, 0

    def epoch_windows(self, stream: int, epoch: int) -> list[Window]:
        """All windows of one epoch of a stream."""
        units = self.units(epoch)[stream]
        share = sum(len(unit.rows) for unit in units)
        windows: list[Window] = []
        before = 0
        for some in self._piles(units):
            windows.append(Window(epoch, len(windows), before, share, tuple(some)))
            before += windows[-1].samples
        return windows

    def _piles(self, units: Sequence[OwnedGroup]) -> Iterator[list[OwnedGroup]]:
        pile: list[OwnedGroup] = []
        samples = tokens = 0
        for unit in units:
            pile.append(unit)
            samples, tokens = samples + len(unit.rows), tokens + self.sources.tokens(unit)
            if samples >= WINDOW_SAMPLES or tokens >= WINDOW_TOKENS:
                yield pile
                pile, samples, tokens = [], 0, 0
        if pile:
            yield pile

    def shuffled(self, stream: int, window: Window) -> NDArray[np.int64]:
        """Order of a window's samples."""
        seed = [self.seed, window.epoch, stream, window.number]
        return np.random.default_rng(seed).permutation(window.samples)

    def units(self, epoch: int) -> list[list[OwnedGroup]]:
        """Per stream its row groups or slices of them, in order; together every sample once."""
        rng = np.random.default_rng([self.seed, epoch])
        parts: dict[tuple[int, int], list[OwnedGroup]] = {}
        for group in self.sources.groups:
            if len(group.rows):
                parts.setdefault((group.source, group.ref.part), []).append(group)
        stored = list(parts.values())
        order = [stored[at] for at in rng.permutation(len(stored))]
        dealt: list[list[OwnedGroup]] = [[] for _ in range(self.streams)]
        least = [(0, stream) for stream in range(self.streams)]
        for low in range(0, len(order), RUN_PARTS):
            run = [unit for part in order[low : low + RUN_PARTS] for group in part for unit in self._split(group)]
            for at in rng.permutation(len(run)):
                samples, stream = least[0]
                dealt[stream].append(run[at])
                heapq.heapreplace(least, (samples + len(run[at].rows), stream))
        return dealt

    def _split(self, group: OwnedGroup) -> list[OwnedGroup]:
        wanted = UNITS_PER_STREAM * self.streams
        if len(self.sources.groups) >= wanted:
            return [group]
        size = -(-self.sources.samples // wanted)
        return [replace(group, rows=group.rows[low : low + size]) for low in range(0, len(group.rows), size)]
