"""What becomes of a run whose workers cannot open: one that cannot does not end what others can do.

A worker that cannot open, or dies while it loads, is tried again in its slot, three times in a row; then the run goes
on without the slot. The run itself ends where no worker has ever opened and none is left that might, where nothing is
left to work with, and at once over what would befall every worker (``StopRun``).
"""

from collections import Counter
from collections.abc import Iterable

from xtoken.pipeline.executors.leases import ATTEMPTS
from xtoken.pipeline.store.files import StopRun
from xtoken.schemas.errors import Unreachable, XtokenError


class Openings:
    """Counts by slot, for executors."""

    def __init__(self) -> None:
        self._any = False  # a worker of this run has opened
        self._failures: Counter[int] = Counter()  # in a row
        self._deaths = 0  # in a row, before any worker has opened
        self._first: Exception | None = None
        self._last = ""

    def opened(self, slot: int) -> None:
        """A worker is open."""
        self._any, self._deaths, self._failures[slot] = True, 0, 0

    def broken(self, slot: int, error: Exception, loading: int, place: str = "") -> str:
        """A worker cannot open, while so many others are still loading; returns the words for it.

        Raises:
            StopRun: the error is one.
            Exception: the error, or that of the first one that could not, where nobody has opened and nobody will.
        """
        if isinstance(error, StopRun):
            raise error
        self._first = self._first or error
        if not self._any and not loading:
            raise self._first
        what = f"a worker{f' on {place}' if place else ''} cannot open: {error}"
        if self._any and isinstance(error, Unreachable):  # an outage is no fault of the slot's
            return what
        return self._failed(slot, what)

    def died(self, slot: int, what: str) -> str:
        """A worker died while it was loading; returns the words for it.

        Raises:
            XtokenError: three in a row did, and none has ever opened.
        """
        self._deaths += 1
        if not self._any and self._deaths >= ATTEMPTS:
            raise XtokenError(f"{what} while loading, {ATTEMPTS} times in a row; is there enough memory for it?")
        return self._failed(slot, f"{what} while loading") if self._any else f"{what} while loading"

    def usable(self, slots: Iterable[int], workers: int) -> list[int]:
        """Those of the free slots in which a worker is to be started; ``workers`` others are there.

        A slot whose worker could not open waits until another one could.

        Raises:
            XtokenError: no worker is left and every slot was given up.
        """
        free = list(slots)
        most = ATTEMPTS if self._any else 1
        usable = [slot for slot in free if self._failures[slot] < most]
        if free and not usable and not workers:
            raise XtokenError(f"no worker is left: none could open {ATTEMPTS} times in a row; the last: {self._last}")
        return usable

    def _failed(self, slot: int, what: str) -> str:
        self._failures[slot] += 1
        self._last = what
        if self._failures[slot] < ATTEMPTS:
            return what
        return f"{what} ({ATTEMPTS} times in a row: the run goes on without worker {slot})"
