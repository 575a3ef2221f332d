"""Runs a job's shards in worker processes of this machine."""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn

from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.open_failures import Openings
from xtoken.pipeline.executors.protocol import Job, Lease, News, Watch, portable
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.errors import XtokenError

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 5.0
_TICK_SECONDS = 1.0


def refuse_unshared(root: str) -> None:
    """Raise XtokenError for a folder that worker processes do not see."""
    folder = Folder(root)
    if not folder.local and "memory" in folder.fs.protocol:
        raise XtokenError(f"{root}: worker processes do not share memory://; use a folder or an object store")


class Terminated(SystemExit):
    """SIGTERM, made to unwind like Ctrl-C."""


@dataclass(eq=False)
class _Child:
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    number: int
    slot: int
    opened: bool = False
    said_why: bool = False  # it named what failed, so an end without a signal is no riddle


@dataclass
class _Run:
    """State of one ``LocalExecutor.run``."""

    job: Job
    watch: Watch
    leases: Leases
    children: list[_Child] = field(default_factory=list)
    started: int = 0
    openings: Openings = field(default_factory=Openings)


class LocalExecutor:
    """Worker processes on this machine, each with the job open once.

    They start afresh, not as copies: a script that uses this needs an ``if __name__ == "__main__"`` guard.
    """

    def __init__(self, workers: int, lease_seconds: float = math.inf) -> None:
        self._workers = workers
        self._lease_seconds = lease_seconds

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """See ``Executor``. A shard that fails three times is set aside and the others go on.

        Raises:
            XtokenError: no worker can open the job, or a ``StopRun`` that would befall every shard.
            KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM, after the workers were ended.
        """
        state = _Run(job, watch, Leases(shards, job.ahead, watch.see, self._lease_seconds))
        with sigterm_unwinds():
            try:
                while state.leases.unfinished:
                    _staff(state, self._workers)
                    _wait_for_news(state)
            finally:
                _end(state, state.children)
        return dict(sorted(state.leases.failed.items()))


def _staff(state: _Run, workers: int) -> None:
    """Start workers in free slots, no more than there are shards for."""
    wanted = state.leases.waiting - _loading(state)
    if wanted > 0:
        free = sorted({*range(workers)} - {child.slot for child in state.children})
        for slot in state.openings.usable(free, len(state.children))[:wanted]:
            _start(state, slot)


def _loading(state: _Run) -> int:
    return sum(not child.opened for child in state.children)


def _wait_for_news(state: _Run) -> None:
    ends = [child.connection for child in state.children] + [child.process.sentinel for child in state.children]
    ready = set(wait(ends, timeout=_TICK_SECONDS))
    for child in list(state.children):
        if child.connection in ready or child.process.sentinel in ready:
            _attend(state, child)
    for number in state.leases.overdue():
        _bury(
            state, next(child for child in state.children if child.number == number), "it made no progress for too long"
        )
    for child in list(state.children):
        _lease(state, child)
    state.watch.tick()


def _attend(state: _Run, child: _Child) -> None:
    """Take one message of a child, or notice that it is dead; the last words of a dead child still count."""
    try:
        news: News | None = child.connection.recv() if child.connection.poll() else None
        dead = news is None and not child.process.is_alive()
    except (EOFError, OSError):
        news, dead = None, True
    if dead:
        child.process.join(_GRACE_SECONDS)
        _bury(state, child, _cause(child.process.exitcode))
    elif news is not None:
        _hear(state, child, news)


def _hear(state: _Run, child: _Child, news: News) -> None:
    if news.kind == "broken" and not child.opened:
        assert news.error is not None
        what = state.openings.broken(child.slot, news.error, _loading(state) - 1, news.place)
        _end(state, [child], at_once=True)
        state.leases.gone(child.number, "died", what)
        return
    if news.kind == "open":
        child.opened = True
        state.openings.opened(child.slot)
    child.said_why = child.said_why or news.kind == "failed"
    state.leases.hear(child.number, news)


def _lease(state: _Run, child: _Child) -> None:
    for lease in state.leases.grant(child.number):
        with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel, leases and all
            child.connection.send(lease)
    if child.opened and not state.leases.waiting and not state.leases.holds(child.number):
        # should a shard that another worker holds come back, a worker is started again
        _end(state, [child])
        state.leases.gone(child.number, "released")


def _bury(state: _Run, child: _Child, cause: str) -> None:
    """Take the shards of a dead worker back."""
    what = f"a worker process died ({cause})"
    if not child.opened:
        what = state.openings.died(child.slot, what)
    retired = child.said_why and child.process.exitcode in (0, None)  # it may take long over ending its engine
    _end(state, [child], at_once=True)
    state.leases.gone(child.number, "retired" if retired else "died", what)


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"signal {-exitcode}" + (", the system may have run out of memory" if exitcode == -signal.SIGKILL else "")


def _start(state: _Run, slot: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # not daemonic: an engine may start processes of its own
    process = context.Process(target=_serve, args=(state.job, slot, theirs, os.getpid()), name="xtoken-worker")
    with _interrupts_held():
        process.start()
    theirs.close()
    state.started += 1
    state.children.append(_Child(process, ours, state.started, slot))
    state.leases.started(state.started, slot)


def _end(state: _Run, children: Sequence[_Child], *, at_once: bool = False) -> None:
    """End workers: with leases or still loading by a signal, the others by closing what they listen to."""
    ending = list(children)
    for child in ending:
        child.connection.close()
        if at_once:
            child.process.kill()
        elif not child.opened or state.leases.holds(child.number):
            child.process.terminate()
    for child in ending:
        child.process.join(_GRACE_SECONDS)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.process.close()
        state.children.remove(child)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits while a child starts, which inherits the mask: interrupts are the driver's business."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Make SIGTERM an exception, so that workers are ended; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Terminated(128 + signum)


def _serve(job: Job, slot: int, connection: "Connection[Any, Any]", parent: int) -> None:
    """Main loop of a worker process: open the job, then work on what is leased until the pipe closes."""
    _die_with(parent)
    line = _Line(connection)
    try:
        worker = job.open(slot)
    except Exception as error:
        line.say(News("broken", error=portable(error), place=socket.gethostname()))
        return
    line.say(News("open", place=socket.gethostname()))
    worker.serve(line.leases(), line.say)


class _Line:
    """A worker's end of the pipe; several of its threads may speak."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, news: News) -> None:
        """See ``Say``; a driver that is gone is noticed by the leases that do not come."""
        with contextlib.suppress(OSError), self._lock:
            self._connection.send(news)

    def leases(self) -> Iterator[Lease]:
        """Leases until the driver hangs up."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connection.recv()


def die_with_parent(number: int) -> None:
    """Have Linux send this process a signal when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _die_with(parent: int) -> None:
    """Never outlive the driver, however it ends. Elsewhere than on Linux the closed pipe ends the worker instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
