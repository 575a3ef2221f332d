"""Runs a job's shards in actors of a Ray cluster, one worker each.

Only leases and messages travel through Ray. The driver holds no state that a commit record does not hold too: it may be
killed at any moment, its actors end with it, and the same command goes on. Actors that have no place yet wait for one.
"""

import math
import re
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtoken.pipeline.executors.driver import Driver, Ending, WorkerHandle
from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.local import Terminated, sigterm_unwinds
from xtoken.pipeline.executors.protocol import Event, Job, Lease, Message, Watch
from xtoken.pipeline.executors.ray_actor import RayWorker, Report
from xtoken.pipeline.executors.ray_cluster import Share, alive, import_ray, joined, share_of
from xtoken.pipeline.executors.ray_metrics import RayMetrics
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import code_version

_TICK_SECONDS = 1.0
_GATHER_SECONDS = 0.02  # what comes in together is handled together, which bounds what a round costs
_HEARTBEAT_SECONDS = 2.0  # how long a worker may wait before it answers that nothing has happened
_WORKERS_PER_SECOND = 100  # heartbeats that the driver takes, whatever the number of workers
_VERDICT_SECONDS = 2.0  # how long the cluster may take to notice that a machine is gone
_GRACE_SECONDS = 5.0
_SURVEY_SECONDS = 5.0
_CALLS_AT_ONCE = 4


@dataclass(eq=False, kw_only=True)
class _Actor(WorkerHandle):
    """A worker's actor and the call to it that has not come back."""

    actor: Any
    call: Any
    seen: int = 0  # messages that came from it
    calls: int = 0  # that gave it leases
    node: str = ""
    fell_at: float = 0.0  # when its death was noticed
    cause: str = ""
    lost: bool = False  # its machine is gone
    released: float = 0.0


@dataclass(frozen=True)
class _Watches:
    """Two that watch as one."""

    first: Watch
    second: Watch

    def see(self, event: Event) -> None:
        """See ``Watch``."""
        self.first.see(event)
        self.second.see(event)

    def tick(self) -> None:
        """See ``Watch``."""
        self.first.tick()
        self.second.tick()


class RayExecutor:
    """Workers on a Ray cluster, each with the job open once.

    Args:
        address: local, auto or HOST:PORT; ignored if this process is connected to Ray already.
        workers: how many; None: as many as the cluster has GPUs for, at any time, at least one.
        gpus_per_worker: None: ``tensor_parallel`` where the cluster has GPUs and the device is not cpu, else 0.
        tensor_parallel: GPUs that share one teacher; they are of one node.
        device: auto, cpu, cuda.
        lease_seconds: a worker without progress for so long loses its shards, and at twice that its life.
        cpus_per_worker: None: without GPUs the CPUs are divided among the workers, with GPUs one each.
    """

    def __init__(
        self,
        address: str,
        workers: int | None,
        gpus_per_worker: float | None,
        tensor_parallel: int = 1,
        device: str = "auto",
        lease_seconds: float = math.inf,
        *,
        cpus_per_worker: int | None = None,
    ) -> None:
        self._address = address
        self._workers = workers
        self._gpus_per_worker = gpus_per_worker
        self._tensor_parallel = tensor_parallel
        self._device = device
        self._lease_seconds = lease_seconds
        self._cpus_per_worker = cpus_per_worker

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """See ``Executor``. A shard that fails three times is quarantined and the others go on.

        Raises:
            XtokenError: no Ray, no cluster, no node with the GPUs of one worker, no worker can open the job, or a
                ``StopRun`` that would befall every shard.
            KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM, after the workers were ended.
        """
        # the outer one undoes what Ray does to SIGTERM when it is joined
        with sigterm_unwinds(), joined(self._address, self._workers or 1), sigterm_unwinds():
            share = share_of(alive(), self._workers, self._gpus_per_worker, self._tensor_parallel, self._device)
            if self._cpus_per_worker is not None:
                share = replace(share, cpus=self._cpus_per_worker)
            both = _Watches(watch, RayMetrics(len(shards)))
            leases = Leases(shards, job.ahead, both.see, self._lease_seconds)
            driver = Driver(RayTransport(job, share, self._workers), both, leases)
            try:
                failed = driver.run()
            except SystemExit as error:
                # Ray makes SystemExit(1) of whatever SIGTERM raises while it waits
                raise Terminated(128 + signal.SIGTERM) from error
            both.tick()
        return failed


class RayTransport:
    """The actors of one run; see ``Transport``."""

    def __init__(self, job: Job | None, share: Share, workers: int | None) -> None:
        self.workers: list[_Actor] = []
        self._ray = import_ray()
        # stored once: W may be megabytes, and every worker gets it
        self._job = self._ray.put(self._ray.cloudpickle.dumps(job))
        self._share = share
        self._most = workers
        self._draining: list[_Actor] = []  # released; they end their engines
        self._room, self._surveyed = 1, -math.inf

    def capacity(self) -> int:
        """See ``Transport``; looked up now and then, for machines come and go."""
        if self._most:
            return self._most
        if time.monotonic() - self._surveyed > _SURVEY_SECONDS:
            self._surveyed = time.monotonic()
            self._room = max(1, self._share.places(alive()) if self._share.gpus else 1)
        return self._room

    def spawn(self, number: int, slot: int) -> _Actor:
        """See ``Transport``; it may have to wait for a machine."""
        actor = self.start_actor(slot)
        worker = _Actor(number=number, slot=slot, actor=actor, call=self._ask(actor, 0))
        self.workers.append(worker)
        return worker

    def start_actor(self, slot: int) -> Any:
        """A new actor (see ``RayWorker``)."""
        return (
            self._ray.remote(RayWorker)
            .options(
                num_cpus=self._share.cpus,
                num_gpus=self._share.gpus,
                max_restarts=0,  # a worker that dies has an heir, which knows nothing of it
                max_task_retries=-1,  # a call that is lost with a connection is made again
                max_concurrency=_CALLS_AT_ONCE,
            )
            .remote(code_version(), self._job, slot)
        )

    def _ask(self, actor: Any, seen: int) -> Any:
        return actor.messages.remote(seen, max(_HEARTBEAT_SECONDS, len(self.workers) / _WORKERS_PER_SECOND))

    def receive(self) -> Iterator[tuple[_Actor, Message | Ending]]:
        """See ``Transport``."""
        for worker in self._ready():
            yield from self._attend(worker)
        yield from self._verdicts()
        self._end_released()

    def _ready(self) -> list[_Actor]:
        calls = {worker.call: worker for worker in self.workers if not worker.fallen}
        if not calls:
            time.sleep(_GATHER_SECONDS)
            return []
        self._ray.wait(list(calls), num_returns=1, timeout=_TICK_SECONDS)
        time.sleep(_GATHER_SECONDS)
        ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return [calls[call] for call in ready]

    def _attend(self, worker: _Actor) -> Iterator[tuple[_Actor, Message | Ending]]:
        """The answer of a worker, or the news that it is dead."""
        try:
            report: Report = self._ray.get(worker.call)
        except self._ray.exceptions.ActorUnavailableError:  # its machine does not answer now: not dead
            worker.call = self._ask(worker.actor, worker.seen)
            return
        except self._ray.exceptions.RayActorError as error:
            yield from self._fell(worker, error)
            return
        worker.node = report.node
        for message in report.messages:
            worker.seen += 1
            yield worker, message
            if worker not in self.workers:  # it could not open
                return
        if report.end is None:
            worker.call = self._ask(worker.actor, worker.seen)
        else:
            retired = worker.explained and not report.end
            last = report.end.rsplit("\n", 1)[-1] or "it returned without a word"
            yield worker, Ending("retired" if retired else "died", f"a worker on {worker.place} ended ({last})")

    def _fell(self, worker: _Actor, error: Any) -> Iterator[tuple[_Actor, Message | Ending]]:
        if error.actor_init_failed:
            reason = f"a Ray worker cannot start; install xtoken {code_version()} on every node of the cluster: {error}"
            yield worker, Message("broken", error=XtokenError(reason))
            return
        worker.fallen, worker.fell_at, worker.cause = True, time.monotonic(), _cause(str(error))
        worker.lost = error.preempted or "its node has died" in str(error)

    def _verdicts(self) -> Iterator[tuple[_Actor, Ending]]:
        """Decide between dead workers and lost machines; the cluster may notice the second only after the first."""
        fallen = [worker for worker in self.workers if worker.fallen]
        nodes = {node.id for node in alive()} if fallen else set()
        for worker in fallen:
            where = f"a worker{f' on {worker.place}' if worker.place else ''}"
            if worker.lost or (worker.node and worker.node not in nodes):
                yield worker, Ending("lost", f"{where} was lost with its machine")
            elif time.monotonic() - worker.fell_at > _VERDICT_SECONDS:
                yield worker, Ending("died", f"{where} died ({worker.cause})")

    def hopeless(self, worker: _Actor) -> Ending:
        """See ``Transport``."""
        return Ending("died", f"a worker on {worker.place} made no progress for too long")

    def send(self, worker: _Actor, leases: list[Lease]) -> None:
        """See ``Transport``."""
        worker.calls += 1
        worker.actor.lease.remote(worker.calls, leases)

    def kill(self, worker: _Actor) -> None:
        """See ``Transport``."""
        self.workers.remove(worker)
        self._ray.kill(worker.actor)

    def release(self, worker: _Actor) -> None:
        """See ``Transport``."""
        self.workers.remove(worker)
        worker.actor.close.remote()
        worker.released = time.monotonic()
        self._draining.append(worker)

    def _end_released(self) -> None:
        """Kill released workers once they are done with their engines, or too late."""
        if not self._draining:
            return
        calls = [worker.call for worker in self._draining]
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for worker in list(self._draining):
            ended = worker.call in done and not self._goes_on(worker)
            if ended or time.monotonic() - worker.released > _GRACE_SECONDS:
                self._ray.kill(worker.actor)
                self._draining.remove(worker)

    def _goes_on(self, worker: _Actor) -> bool:
        try:
            report: Report = self._ray.get(worker.call)
        except self._ray.exceptions.RayActorError:
            return False
        worker.seen += len(report.messages)
        worker.call = self._ask(worker.actor, worker.seen)
        return report.end is None

    def drain(self) -> None:
        """See ``Transport``."""
        end = time.monotonic() + _GRACE_SECONDS
        while self._draining and time.monotonic() < end:
            self._ray.wait([worker.call for worker in self._draining], num_returns=1, timeout=_GATHER_SECONDS)
            self._end_released()

    def end(self, holding: Collection[int]) -> None:
        """See ``Transport``."""
        del holding  # a worker holds nothing that dies with it: parts are committed, or made again
        everyone = [*self.workers, *self._draining]
        for worker in everyone:
            self._ray.kill(worker.actor)
        if everyone:
            self._ray.wait([worker.call for worker in everyone], num_returns=len(everyone), timeout=_GRACE_SECONDS)
        self.workers.clear()
        self._draining.clear()


def _cause(error: str) -> str:
    """Ray's reason of a death, in one line."""
    if "low on memory" in error:
        return "the node ran out of memory"
    if "End of file" in error:
        return "its process ended without a word, the system may have run out of memory"
    reason = re.search(r"The actor is dead because (.*)", error)
    return reason[1].strip()[:300] if reason is not None else " ".join(error.split())[:300]
