"""The loop that runs a job's shards in workers, whatever carries leases and messages between it and them.

``Leases`` decides who works on what, ``Openings`` what becomes of workers that cannot open; a ``Transport`` starts and
ends workers and speaks with them. The driver holds no state that a commit record does not hold too.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.open_failures import Openings
from xtoken.pipeline.executors.protocol import Lease, Message, Watch


@dataclass(eq=False, kw_only=True)
class WorkerHandle:
    """A worker as its driver sees it.

    Attributes:
        number: no other worker of the run ever has it.
        slot: no other live worker has it; whoever replaces this one does.
        place: where it runs, for people; known once it is open.
        opened: it said that it is ready.
        explained: it named what failed, so an end without a signal is no riddle.
        fallen: it is dead, and it is not known yet what it died of; it gets no leases.
    """

    number: int
    slot: int
    place: str = ""
    opened: bool = False
    explained: bool = False
    fallen: bool = False


@dataclass(frozen=True)
class Ending:
    """How a worker ended by itself: see ``Leases.gone``."""

    kind: Literal["retired", "died", "lost"]
    why: str


W = TypeVar("W", bound=WorkerHandle)


class Transport(Protocol[W]):
    """Starts workers, ends them, and carries what they and the driver send each other.

    Attributes:
        workers: those that were spawned and neither released nor killed; the transport alone changes the list.
    """

    workers: list[W]

    def capacity(self) -> int:
        """Slots there are now."""
        ...

    def spawn(self, number: int, slot: int) -> W:
        """Start a worker."""
        ...

    def receive(self) -> Iterator[tuple[W, Message | Ending]]:
        """What workers have sent, and how they ended, after a second at most; the driver may end them meanwhile."""
        ...

    def hopeless(self, worker: W) -> Ending:
        """How to speak of a worker that makes no progress and is to be killed."""
        ...

    def send(self, worker: W, leases: list[Lease]) -> None:
        """Give a worker leases; one that is dead is noticed by ``receive``."""
        ...

    def kill(self, worker: W) -> None:
        """End a worker at once."""
        ...

    def release(self, worker: W) -> None:
        """Let a worker go that has no leases: it ends its engine first."""
        ...

    def drain(self) -> None:
        """Wait a while for those that were released."""
        ...

    def end(self, holding: Collection[int]) -> None:
        """End all workers and wait until they are; those with leases are known by their numbers."""
        ...


class Driver(Generic[W]):
    """One run."""

    def __init__(self, transport: Transport[W], watch: Watch, leases: Leases) -> None:
        self._transport = transport
        self._watch = watch
        self._leases = leases
        self._openings = Openings()
        self._spawned = 0

    def run(self) -> dict[int, str]:
        """Run all shards; see ``Executor``."""
        try:
            while self._leases.unfinished:
                self.scale_up()
                self.turn()
            self._transport.drain()
        finally:
            self._transport.end(
                {worker.number for worker in self._transport.workers if self._leases.holds(worker.number)}
            )
        return dict(sorted(self._leases.failed.items()))

    def scale_up(self) -> None:
        """Spawn workers in free slots, no more than there are shards for."""
        wanted = self._leases.waiting - self._loading()
        if wanted > 0:
            workers = self._transport.workers
            free = sorted({*range(self._transport.capacity())} - {worker.slot for worker in workers})
            for slot in self._openings.usable(free, len(workers))[:wanted]:
                self._spawned += 1
                self._transport.spawn(self._spawned, slot)
                self._leases.started(self._spawned, slot)

    def turn(self) -> None:
        """One round: receive what there is, or nothing for a second; reap the dead, give out leases."""
        for worker, what in self._transport.receive():
            if isinstance(what, Ending):
                self._reap(worker, what)
            else:
                self._take(worker, what)
        for number in self._leases.overdue():
            worker = next(one for one in self._transport.workers if one.number == number)
            self._reap(worker, self._transport.hopeless(worker))
        for worker in list(self._transport.workers):
            self._lease(worker)
        self._watch.tick()

    def _loading(self) -> int:
        return sum(not worker.opened for worker in self._transport.workers)

    def _take(self, worker: W, message: Message) -> None:
        if message.kind == "broken" and not worker.opened:
            assert message.error is not None
            why = self._openings.broken(worker.slot, message.error, self._loading() - 1, message.place)
            self._remove(worker, Ending("died", why))
            return
        if message.kind == "open":
            worker.opened, worker.place = True, message.place
            self._openings.opened(worker.slot)
        worker.explained = worker.explained or message.kind == "failed"
        self._leases.receive(worker.number, message)

    def _reap(self, worker: W, ending: Ending) -> None:
        """Take the shards of a worker back that is dead or useless."""
        if not worker.opened and ending.kind == "died":
            ending = Ending("died", self._openings.died(worker.slot, ending.why))
        self._remove(worker, ending)

    def _remove(self, worker: W, ending: Ending) -> None:
        self._transport.kill(worker)
        self._leases.gone(worker.number, ending.kind, ending.why)

    def _lease(self, worker: W) -> None:
        """Give a worker leases, or let it go where nothing is left to give."""
        if worker.fallen:
            return
        leases = self._leases.grant(worker.number)
        if leases:
            self._transport.send(worker, leases)
        nothing_left = not self._leases.waiting and not any(one.fallen for one in self._transport.workers)
        if worker.opened and nothing_left and not self._leases.holds(worker.number):
            # should a shard that another worker holds come back, a worker is spawned again
            self._transport.release(worker)
            self._leases.gone(worker.number, "released")
