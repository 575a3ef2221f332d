"""The driver's loop over a transport whose workers do what the test says."""

from collections.abc import Collection, Iterator

import pytest

from xtoken.pipeline.executors.driver import Driver, Ending, WorkerHandle
from xtoken.pipeline.executors.leases import ATTEMPTS, Leases
from xtoken.pipeline.executors.protocol import Event, Lease, Message
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import Part

Script = list[tuple[int, Message | Ending]]


def part(shard: int) -> Message:
    sizes = {"samples": 1, "tokens": 1, "rows": 1, "entries": 1, "text_bytes": 1, "file_bytes": 1}
    return Message("part", shard, part=Part(index=shard, **sizes, sha256="0" * 64))


class Watching:
    """Remembers all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ticks = 0

    def see(self, event: Event) -> None:
        """See ``Watch``."""
        self.events.append(event)

    def tick(self) -> None:
        """See ``Watch``."""
        self.ticks += 1

    def kinds(self) -> list[str]:
        """What happened, in order."""
        return [event.kind for event in self.events]


class Scripted:
    """A ``Transport`` that sends what the test wrote down for each round, by the workers' numbers."""

    def __init__(self, *rounds: Script, slots: int = 1) -> None:
        self.workers: list[WorkerHandle] = []
        self.log: list[tuple[str, int]] = []
        self.holding: Collection[int] | None = None
        self._rounds = iter(rounds)
        self._slots = slots

    def capacity(self) -> int:
        """See ``Transport``."""
        return self._slots

    def spawn(self, number: int, slot: int) -> WorkerHandle:
        """See ``Transport``."""
        self.workers.append(WorkerHandle(number=number, slot=slot))
        self.log.append(("spawn", number))
        return self.workers[-1]

    def receive(self) -> Iterator[tuple[WorkerHandle, Message | Ending]]:
        """See ``Transport``."""
        for number, what in next(self._rounds):
            yield next(worker for worker in self.workers if worker.number == number), what

    def hopeless(self, worker: WorkerHandle) -> Ending:
        """See ``Transport``."""
        return Ending("died", f"worker {worker.number} hangs")

    def send(self, worker: WorkerHandle, leases: list[Lease]) -> None:
        """See ``Transport``."""
        assert worker in self.workers
        self.log += [("lease", lease.shard) for lease in leases]

    def kill(self, worker: WorkerHandle) -> None:
        """See ``Transport``."""
        self.workers.remove(worker)
        self.log.append(("kill", worker.number))

    def release(self, worker: WorkerHandle) -> None:
        """See ``Transport``."""
        self.workers.remove(worker)
        self.log.append(("release", worker.number))

    def drain(self) -> None:
        """See ``Transport``."""
        self.log.append(("drain", 0))

    def end(self, holding: Collection[int]) -> None:
        """See ``Transport``."""
        self.holding = holding


def driven(transport: Scripted, shards: int) -> tuple[Driver[WorkerHandle], Watching]:
    watch = Watching()
    return Driver(transport, watch, Leases(range(shards), 1, watch.see, 60.0)), watch


def test_a_worker_is_spawned_leased_and_released() -> None:
    transport = Scripted([(1, Message("open", place="here"))], [(1, Message("begun", 0)), (1, part(0))])
    driver, watch = driven(transport, 1)
    assert driver.run() == {}
    assert transport.log == [("spawn", 1), ("lease", 0), ("release", 1), ("drain", 0)]
    assert watch.kinds() == ["starting", "opened", "leased", "begun", "part", "released"]
    assert (watch.ticks, transport.holding) == (2, set())


def test_a_dead_worker_is_reaped_and_another_takes_its_slot_and_its_shard() -> None:
    died = Ending("died", "a worker died (signal 9)")
    transport = Scripted(
        [(1, Message("open"))],
        [(1, Message("begun", 0)), (1, died)],
        [(2, Message("open"))],
        [(2, Message("begun", 0)), (2, part(0))],
    )
    driver, watch = driven(transport, 1)
    assert driver.run() == {}
    assert transport.log[2:5] == [("kill", 1), ("spawn", 2), ("lease", 0)]
    assert [event.worker for event in watch.events if event.kind == "starting"] == [0, 0], "its slot"
    assert [event.error for event in watch.events if event.kind == "died"] == [died.why]
    assert [event.attempt for event in watch.events if event.kind == "leased"] == [1, 2]


def test_a_shard_that_keeps_failing_is_quarantined_and_the_driver_ends() -> None:
    failures = [(1, Message("begun", 0)), (1, Message("failed", 0, error=ValueError("it tastes bad")))]
    driver, watch = driven(Scripted([(1, Message("open"))], *[failures] * ATTEMPTS), 1)
    assert driver.run() == {0: "it tastes bad"}
    assert watch.kinds()[-2:] == ["set_aside", "released"]


def test_no_worker_is_released_while_another_ones_death_is_not_understood() -> None:
    """Its shard may come back, and a worker that is open saves loading a model again."""
    transport = Scripted([(1, Message("open")), (2, Message("open"))], [(1, part(0))], [], slots=2)
    driver, _ = driven(transport, 2)
    driver.scale_up()
    driver.turn()
    fallen = transport.workers[1]
    fallen.fallen = True
    driver.turn()
    assert [worker.number for worker in transport.workers] == [1, 2]
    fallen.fallen = False
    driver.turn()
    assert [worker.number for worker in transport.workers] == [2], "it holds shard 1"


def test_a_fallen_worker_gets_no_leases() -> None:
    transport = Scripted([(1, Message("open"))])
    driver, _ = driven(transport, 1)
    driver.scale_up()
    transport.workers[0].fallen = True
    driver.turn()
    assert transport.log == [("spawn", 1)]


def test_a_worker_that_cannot_open_is_killed_and_ends_the_run_where_none_can() -> None:
    transport = Scripted([(1, Message("broken", error=XtokenError("no such model")))])
    driver, _ = driven(transport, 1)
    with pytest.raises(XtokenError, match=r"^no such model$"):
        driver.run()
    assert transport.holding == set(), "the others are ended all the same"


def test_workers_that_hold_leases_are_named_when_the_run_is_interrupted() -> None:
    class Interrupted(Scripted):
        def drain(self) -> None:
            raise AssertionError("nobody waits for workers of a run that was interrupted")

        def receive(self) -> Iterator[tuple[WorkerHandle, Message | Ending]]:
            if self.workers[0].opened:
                raise KeyboardInterrupt
            yield from super().receive()

    transport = Interrupted([(1, Message("open"))], slots=2)
    driver, _ = driven(transport, 2)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    assert transport.holding == {1}, "worker 2 is still loading"
