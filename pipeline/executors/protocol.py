"""What executors and workers send each other, wherever the workers run.

A worker is given leases of shards and reports what becomes of them. It publishes and commits its parts itself, so its
messages decide nothing: it may die at any moment, its shards are leased again, and the commit record decides who was
first.
"""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import Part

OnProgress = Callable[[int], None]
"""Called in the middle of a shard with how much of it is done, in the shard's own unit."""


def ignore_progress(done: int) -> None:
    """An ``OnProgress`` for workers that nobody watches."""
    del done


@dataclass(frozen=True)
class Lease:
    """One attempt at one shard; attempts count from 1."""

    shard: int
    attempt: int = 1


@dataclass(frozen=True)
class Message:
    """What a worker sends.

    Attributes:
        kind: open (ready for leases), broken (could not open, or an audit refused its rows), begun (work on a shard has
            started), progress (``done`` of it is done), part (it is committed), failed.
        error: of ``broken`` and ``failed``; made portable, so that it can be sent.
        place: of ``open`` and ``broken``: where the worker runs, for people.
    """

    kind: Literal["open", "broken", "begun", "progress", "part", "failed"]
    shard: int = -1
    done: int = 0
    part: Part | None = None
    error: Exception | None = None
    place: str = ""


Send = Callable[[Message], None]
"""How a worker's messages leave it; any of its threads may call it, so it raises nothing."""


class Worker(Protocol):
    """One worker's state: an engine, open files."""

    def serve(self, leases: Iterator[Lease], send: Send) -> None:
        """Work on leases as they come, in order, until there are no more.

        ``next(leases)`` waits for the next lease. A worker that returns earlier wants to be replaced; what it was
        given and has sent nothing about is leased again and not held against anyone.
        """
        ...


class Job(Protocol):
    """Picklable description of work; sent to each worker process once."""

    @property
    def ahead(self) -> int:
        """Leases that a worker has use for at once; more than one if it overlaps its stages."""
        ...

    def open(self, slot: int = 0) -> Worker:
        """Load what the worker needs; called in its process. No two live workers have the same ``slot``."""
        ...


@dataclass(frozen=True)
class Event:
    """What happened in a run, for those who watch it.

    Attributes:
        kind: starting, opened, leased, begun, progress, part, late (a part that another attempt had committed), failed,
            set_aside (quarantined), overdue (no progress within the lease), outage (storage out of reach), retired,
            died, lost (its machine is gone), released (nothing left to do).
        worker: slot of the worker, -1 where none is meant.
    """

    kind: str
    worker: int = -1
    shard: int = -1
    attempt: int = 0
    done: int = 0
    part: Part | None = None
    error: str = ""
    place: str = ""


class Watch(Protocol):
    """Who wants to know how a run goes."""

    def see(self, event: Event) -> None:
        """Something happened."""
        ...

    def tick(self) -> None:
        """Called about once a second, whatever happens."""
        ...


class Executor(Protocol):
    """Where shards are run."""

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """Run the shards, telling ``watch``; returns failed shards with their error."""
        ...


class OneByOne(ABC):
    """A ``Worker`` that overlaps nothing: one shard after the other."""

    @abstractmethod
    def run(self, shard: int, attempt: int, on_progress: OnProgress = ignore_progress) -> Part:
        """Make, publish and commit one part."""

    def serve(self, leases: Iterator[Lease], send: Send) -> None:
        """See ``Worker``."""
        for lease in leases:
            send(Message("begun", lease.shard))
            try:
                part = self.run(lease.shard, lease.attempt, partial(_send_progress, send, lease))
                send(Message("part", lease.shard, part=part))
            except Exception as error:
                send(Message("failed", lease.shard, error=portable(error)))


def _send_progress(send: Send, lease: Lease, done: int) -> None:
    send(Message("progress", lease.shard, done=done))


def portable(error: BaseException) -> Exception:
    """An error that can be sent: a user's error keeps its class, a defect becomes text with its traceback."""
    if isinstance(error, XtokenError):
        return type(error)(str(error))
    return RuntimeError("".join(traceback.format_exception(error)).rstrip())
