"""One stream of samples, decoded ahead of those who take them.

A stream holds the window that samples are taken from and as much of the next as it has used up of this one, so that
memory is bounded and no window is waited for as a whole.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TypeVar

from xtoken.trainer.data.plan import Plan, Position, Window
from xtoken.trainer.data.samples import Sample
from xtoken.trainer.data.sources import OwnedGroup

Decode = Callable[[OwnedGroup], "Future[list[Sample]]"]
T = TypeVar("T")
POLL_SECONDS = 0.5


def result_of(future: "Future[T]") -> T:
    """The result, or what the task raised; the waiting thread wakes up now and then, so that it hears signals."""
    while not future.done():
        wait([future], timeout=POLL_SECONDS)
    return future.result()


@dataclass(frozen=True)
class Share:
    """What a stream gives to one step: its samples, and where it stands after them."""

    samples: list[Sample]
    tokens: int
    position: Position


@dataclass
class _Opened:
    """A window, and its row groups as far as their decoding has begun."""

    window: Window
    units: "list[Future[list[Sample]]]" = field(default_factory=list)

    def begin(self, decode: Decode, units: int) -> None:
        """See that this many row groups are decoded or wait for it."""
        for unit in self.window.units[len(self.units) : units]:
            self.units.append(decode(unit))

    @property
    def decoded(self) -> bool:
        """All row groups are there, or what came of them."""
        return len(self.units) == len(self.window.units) and all(unit.done() for unit in self.units)


class Stream:
    """Samples of one stream from a position on, cut into shares of steps.

    Args:
        plan: the order.
        stream: which of its streams.
        position: where to go on.
        size: student tokens that a sample counts for.
        decode: begins to decode a row group.
        ahead: row groups of the next window that are begun from the start.
    """

    def __init__(
        self, plan: Plan, stream: int, position: Position, size: Callable[[Sample], int], decode: Decode, ahead: int
    ) -> None:
        self._plan, self._stream, self._size, self._decode, self._ahead = plan, stream, size, decode, ahead
        self._from = position
        self._windows = plan.windows(stream, position)
        self._next = _Opened(next(self._windows))
        self._window: Window | None = None
        self._samples: list[Sample] = []
        self._at = self._tokens_left = 0

    def ready(self, tokens: int) -> bool:
        """A share of this many tokens can be cut without waiting."""
        return self._tokens_left > tokens or self._next.decoded

    @property
    def begun(self) -> "list[Future[list[Sample]]]":
        """Row groups of the next window whose decoding has begun."""
        return self._next.units

    def share(self, tokens: int) -> Share:
        """Samples of ``tokens`` tokens to the nearest, at least one that predicts something, no more than an epoch has.

        To the nearest and not below: behind one that fills a share, a sample of two tokens would be a step of its own.

        Raises:
            Exception: whatever the decoding of a row group raised.
        """
        samples: list[Sample] = []
        taken, limit, predicts = 0, 1, False
        # an epoch's worth may straddle two epochs and hold the same samples twice, so all are seen only after two
        while len(samples) < (limit if predicts else 2 * limit):
            if predicts and taken >= tokens:
                break
            window = self._filled()
            sample = self._samples[self._at]
            size = self._size(sample)
            if predicts and tokens - taken <= taken + size - tokens:
                break
            limit = max(limit, window.share) if samples else window.share
            samples.append(sample)
            predicts = predicts or sample.positions > 0
            position = Position(window.epoch, window.before + self._at + 1)
            self._at, self._tokens_left, taken = self._at + 1, self._tokens_left - size, taken + size
        self._begin_next()
        return Share(samples, taken, position)

    def _filled(self) -> Window:
        """The window in use, or the next one if that is used up."""
        if self._window is None or self._at == len(self._samples):
            opened = self._next
            opened.begin(self._decode, len(opened.window.units))
            stored = [sample for unit in opened.units for sample in result_of(unit)]
            self._samples = [stored[at] for at in self._plan.shuffled(self._stream, opened.window)]
            self._window, self._next = opened.window, _Opened(next(self._windows))
            self._at = max(0, self._from.taken - opened.window.before) if opened.window.epoch == self._from.epoch else 0
            self._tokens_left = sum(self._size(sample) for sample in self._samples[self._at :])
        return self._window

    def _begin_next(self) -> None:
        """Begin as large a part of the next window as is used up of this one."""
        units = len(self._next.window.units)
        used = units * self._at // max(1, len(self._samples))
        self._next.begin(self._decode, used + self._ahead)
