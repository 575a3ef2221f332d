"""Runs a job's shards in worker processes, treating every delivery as at-least-once.

The worker publishes and commits its parts itself; what comes back here is only news. So a worker
may die at any moment: its shard is leased again, and the commit record decides who was first.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn, Protocol

from pipeline.store.files import StopRun
from schemas.errors import XtokenError
from schemas.manifest import Part

ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 5.0


Tell = Callable[[int], None]
"""Called by a worker in the middle of a shard with how much of it is done, in the shard's own unit."""


def tell_nobody(done: int) -> None:
    """A ``Tell`` for workers that nobody watches."""
    del done


class Worker(Protocol):
    """One worker's state: an engine, open files."""

    def run(self, shard: int, attempt: int, tell: Tell = tell_nobody) -> Part:
        """Make, publish and commit one part."""
        ...


class Job(Protocol):
    """Picklable description of work; sent to each worker process once."""

    def open(self, slot: int = 0) -> Worker:
        """Load what the worker needs; called in its process. No two live workers have the same ``slot``."""
        ...


class Executor(Protocol):
    """Where shards are run."""

    def run(self, job: Job, shards: Sequence[int], watch: "Watch") -> dict[int, str]:
        """Run the shards, telling ``watch``; returns failed shards with their error."""
        ...


class Watch(Protocol):
    """Who wants to know how a run goes."""

    def part(self, part: Part) -> None:
        """A part was committed."""
        ...

    def told(self, shard: int, done: int) -> None:
        """So much of a shard is done; a later attempt at it starts from 0 again."""
        ...


class Terminated(SystemExit):
    """SIGTERM, made to unwind like Ctrl-C."""


@dataclass(frozen=True)
class _News:
    """What a worker says: it is open, a part is done, or something failed."""

    kind: str  # open, told, part, failed, broken (could not open)
    part: Part | None = None
    done: int = 0
    error: Exception | None = None


@dataclass
class _Lease:
    shard: int
    attempt: int = 1


@dataclass
class _Child:
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    slot: int
    opened: bool = False
    lease: _Lease | None = None


@dataclass
class _Run:
    """State of one ``LocalExecutor.run``."""

    job: Job
    watch: Watch
    waiting: deque[_Lease]
    failed: dict[int, str] = field(default_factory=dict)
    children: list[_Child] = field(default_factory=list)
    failed_openings: int = 0


class LocalExecutor:
    """Worker processes on this machine, each with the job open once.

    They start afresh, not as copies: a script that uses this needs an ``if __name__ == "__main__"`` guard.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """See ``Executor``. A shard that fails three times is set aside and the others go on.

        Raises:
            XtokenError: the job cannot be opened, or a ``StopRun`` that would befall every shard.
            KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM, after the workers were ended.
        """
        state = _Run(job, watch, deque(_Lease(shard) for shard in shards))
        with _sigterm_unwinds():
            try:
                for slot in range(min(self._workers, len(shards))):
                    state.children.append(_spawn(job, slot))
                while state.children:
                    _wait_for_news(state)
            finally:
                _end(state.children)
        return dict(sorted(state.failed.items()))


def _wait_for_news(state: _Run) -> None:
    ready = set(wait([child.connection for child in state.children] + [c.process.sentinel for c in state.children]))
    for child in list(state.children):
        if child.connection in ready or child.process.sentinel in ready:
            _attend(state, child)


def _attend(state: _Run, child: _Child) -> None:
    """Take one message of a child, or notice that it is dead; the last words of a dead child still count."""
    try:
        news: _News | None = child.connection.recv() if child.connection.poll() else None
        dead = news is None and not child.process.is_alive()
    except (EOFError, OSError):
        news, dead = None, True
    if dead:
        _bury(state, child)
    elif news is not None:
        _hear(state, child, news)


def _hear(state: _Run, child: _Child, news: _News) -> None:
    if news.kind == "broken":
        assert news.error is not None
        raise news.error
    if news.kind == "told":
        assert child.lease is not None
        state.watch.told(child.lease.shard, news.done)
        return
    child.opened = True
    state.failed_openings = 0
    lease, child.lease = child.lease, None
    if news.kind == "part":
        assert news.part is not None
        state.watch.part(news.part)
    elif news.kind == "failed":
        assert news.error is not None
        assert lease is not None
        if isinstance(news.error, StopRun):
            raise news.error
        _failed(state, lease, str(news.error))
    _lease_next(state, child)


def _lease_next(state: _Run, child: _Child) -> None:
    if not state.waiting:
        # a shard that another worker still holds may come back; that worker, or its heir, will run it
        _end([child])
        state.children.remove(child)
        return
    child.lease = state.waiting.popleft()
    with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel, lease and all
        child.connection.send(child.lease)


def _failed(state: _Run, lease: _Lease, error: str) -> None:
    if lease.attempt < ATTEMPTS:
        state.waiting.append(_Lease(lease.shard, lease.attempt + 1))
    else:
        state.failed[lease.shard] = error


def _bury(state: _Run, child: _Child) -> None:
    """Take the shard of a dead worker back, and start a worker in its place while there is work."""
    child.process.join(_GRACE_SECONDS)
    what = f"a worker process died ({_cause(child.process.exitcode)})"
    if not child.opened:
        state.failed_openings += 1
        if state.failed_openings >= ATTEMPTS:
            raise XtokenError(f"{what} while loading, {ATTEMPTS} times in a row; is there enough memory for it?")
    if child.lease is not None:
        _failed(state, child.lease, what)
    _end([child])
    state.children.remove(child)
    if state.waiting:
        state.children.append(_spawn(state.job, child.slot))


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"signal {-exitcode}" + (", the system may have run out of memory" if exitcode == -signal.SIGKILL else "")


def _spawn(job: Job, slot: int) -> _Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # not daemonic: an engine may start processes of its own
    process = context.Process(target=_serve, args=(job, slot, theirs, os.getpid()), name="xtoken-worker")
    with _interrupts_held():
        process.start()
    theirs.close()
    return _Child(process, ours, slot)


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        child.connection.close()
        if child.lease is not None or not child.opened:
            child.process.terminate()
    for child in children:
        child.process.join(_GRACE_SECONDS)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.process.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits while a child starts, which inherits the mask: interrupts are the driver's business."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
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
    """Main loop of a worker process: open the job, then run what is leased until the pipe closes."""
    _die_with(parent)
    try:
        worker = job.open(slot)
    except Exception as error:
        connection.send(_News("broken", error=_portable(error)))
        return
    try:
        connection.send(_News("open"))
        while True:
            lease: _Lease = connection.recv()
            connection.send(_attempt(worker, lease, connection))
    except (EOFError, OSError):
        return


def _attempt(worker: Worker, lease: _Lease, connection: "Connection[Any, Any]") -> _News:
    try:
        return _News("part", part=worker.run(lease.shard, lease.attempt, partial(_tell, connection)))
    except Exception as error:
        return _News("failed", error=_portable(error))


def _tell(connection: "Connection[Any, Any]", done: int) -> None:
    with contextlib.suppress(OSError):  # a driver that is gone is noticed when the shard ends
        connection.send(_News("told", done=done))


def _portable(error: Exception) -> Exception:
    """An error that can be sent: a user's error keeps its class, a defect becomes text with its traceback."""
    if isinstance(error, XtokenError):
        return type(error)(str(error))
    return RuntimeError("".join(traceback.format_exception(error)).rstrip())


def _die_with(parent: int) -> None:
    """Never outlive the driver, however it ends. Elsewhere than on Linux the closed pipe ends the worker instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
