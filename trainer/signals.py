"""SIGTERM, as schedulers send it before they take a machine away: the loop saves and ends in its own time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A scheduler signals every process of a job, and a launcher (torchrun) passes on what it got: the same SIGTERM, twice.
SAME = 5.0  # seconds


class Preempted:
    """Whether SIGTERM has come; the loop asks between steps."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = signal.SIG_DFL
        self._first = 0.0

    def _hear(self, number: int, _frame: Any) -> None:
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= SAME:  # who asks again does not want to wait
            self._stop()
            signal.raise_signal(number)

    def _listen(self) -> None:
        before = signal.signal(signal.SIGTERM, self._hear)
        self._before = signal.SIG_DFL if before is None else before  # None: set by a library in C

    def _stop(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


@contextmanager
def preemption() -> Iterator[Preempted]:
    """Within, SIGTERM sets ``asked``; one that comes ``SAME`` seconds later or more does what it did before, as a rule
    end the process at once.

    Only the main thread hears signals: in any other, ``asked`` stays false.
    """
    preempted = Preempted()
    if threading.current_thread() is not threading.main_thread():
        yield preempted
        return
    preempted._listen()
    try:
        yield preempted
    finally:
        preempted._stop()
