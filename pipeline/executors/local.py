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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn

from xtoken.pipeline.executors.driver import Driver, Ending, WorkerHandle
from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.protocol import Job, Lease, Message, Watch, portable
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


@dataclass(eq=False, kw_only=True)
class _Child(WorkerHandle):
    process: SpawnProcess
    connection: "Connection[Any, Any]"


class LocalExecutor:
    """Worker processes on this machine, each with the job open once.

    They start afresh, not as copies: a script that uses this needs an ``if __name__ == "__main__"`` guard.
    """

    def __init__(self, workers: int, lease_seconds: float = math.inf) -> None:
        self._workers = workers
        self._lease_seconds = lease_seconds

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """See ``Executor``. A shard that fails three times is quarantined and the others go on.

        Raises:
            XtokenError: no worker can open the job, or a ``StopRun`` that would befall every shard.
            KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM, after the workers were ended.
        """
        leases = Leases(shards, job.ahead, watch.see, self._lease_seconds)
        with sigterm_unwinds():
            return Driver(LocalTransport(job, self._workers), watch, leases).run()


class LocalTransport:
    """Processes and pipes; see ``Transport``."""

    def __init__(self, job: Job, workers: int) -> None:
        self.workers: list[_Child] = []
        self._job = job
        self._most = workers

    def capacity(self) -> int:
        """See ``Transport``."""
        return self._most

    def spawn(self, number: int, slot: int) -> _Child:
        """See ``Transport``."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # not daemonic: an engine may start processes of its own
        process = context.Process(target=_serve, args=(self._job, slot, theirs, os.getpid()), name="xtoken-worker")
        with _interrupts_held():
            process.start()
        theirs.close()
        child = _Child(number=number, slot=slot, process=process, connection=ours)
        self.workers.append(child)
        return child

    def receive(self) -> Iterator[tuple[_Child, Message | Ending]]:
        """See ``Transport``; one message of each child at a time."""
        ends = [child.connection for child in self.workers] + [child.process.sentinel for child in self.workers]
        ready = set(wait(ends, timeout=_TICK_SECONDS))
        for child in list(self.workers):
            if child.connection in ready or child.process.sentinel in ready:
                what = _attend(child)
                if what is not None:
                    yield child, what

    def hopeless(self, worker: _Child) -> Ending:
        """See ``Transport``."""
        return _ending(worker, "it made no progress for too long")

    def send(self, worker: _Child, leases: list[Lease]) -> None:
        """See ``Transport``."""
        for lease in leases:
            with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel, leases and all
                worker.connection.send(lease)

    def kill(self, worker: _Child) -> None:
        """See ``Transport``."""
        worker.connection.close()
        worker.process.kill()
        self._join(worker)

    def release(self, worker: _Child) -> None:
        """See ``Transport``; waits for it."""
        worker.connection.close()
        self._join(worker)

    def drain(self) -> None:
        """See ``Transport``: nobody is left to wait for."""

    def end(self, holding: Collection[int]) -> None:
        """See ``Transport``: with leases or still loading by a signal, the others by closing what they listen to."""
        for child in self.workers:
            child.connection.close()
            if not child.opened or child.number in holding:
                child.process.terminate()
        for child in list(self.workers):
            self._join(child)

    def _join(self, child: _Child) -> None:
        child.process.join(_GRACE_SECONDS)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        child.process.close()
        self.workers.remove(child)


def _attend(child: _Child) -> Message | Ending | None:
    """One message of a child, or how it died; the last words of a dead child still count."""
    try:
        message: Message | None = child.connection.recv() if child.connection.poll() else None
        dead = message is None and not child.process.is_alive()
    except (EOFError, OSError):
        message, dead = None, True
    if not dead:
        return message
    child.process.join(_GRACE_SECONDS)
    return _ending(child, _cause(child.process.exitcode))


def _ending(child: _Child, cause: str) -> Ending:
    retired = child.explained and child.process.exitcode in (0, None)  # it may take long over ending its engine
    return Ending("retired" if retired else "died", f"a worker process died ({cause})")


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    return f"signal {-exitcode}" + (", the system may have run out of memory" if exitcode == -signal.SIGKILL else "")


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
        line.send(Message("broken", error=portable(error), place=socket.gethostname()))
        return
    line.send(Message("open", place=socket.gethostname()))
    worker.serve(line.leases(), line.send)


class _Line:
    """A worker's end of the pipe; several of its threads may speak."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """See ``Send``; a driver that is gone is noticed by the leases that do not come."""
        with contextlib.suppress(OSError), self._lock:
            self._connection.send(message)

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
