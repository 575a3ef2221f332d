"""Runs a job's shards in actors of a Ray cluster, one worker each.

Only leases and news travel through Ray. The driver holds no state that a commit record does not hold too: it may be
killed at any moment, its actors end with it, and the same command goes on. Actors that have no place yet wait for one.
"""

import math
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.local import Terminated, sigterm_unwinds
from xtoken.pipeline.executors.open_failures import Openings
from xtoken.pipeline.executors.protocol import Event, Job, News, Watch
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


@dataclass(eq=False)
class _Member:
    """A worker's actor and the call to it that has not come back."""

    actor: Any
    number: int
    slot: int
    call: Any
    seen: int = 0  # news that came from it
    calls: int = 0  # that gave it leases
    node: str = ""
    place: str = ""
    opened: bool = False
    said_why: bool = False
    fell: float | None = None  # when its death was noticed, until it is known what it died of
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
        """See ``Executor``. A shard that fails three times is set aside and the others go on.

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
            crew = RayCrew(job, share, self._workers, both, leases)
            try:
                while leases.unfinished:
                    crew.staff()
                    crew.wait_for_news()
                crew.part(_GRACE_SECONDS)
            except SystemExit as error:
                # Ray makes SystemExit(1) of whatever SIGTERM raises while it waits
                raise Terminated(128 + signal.SIGTERM) from error
            finally:
                crew.end()
            both.tick()
        return dict(sorted(leases.failed.items()))


class RayCrew:
    """The actors of one run."""

    def __init__(self, job: Job, share: Share, workers: int | None, watch: Watch, leases: Leases) -> None:
        self._ray = import_ray()
        # stored once: W may be megabytes, and every worker gets it
        self._job = self._ray.put(self._ray.cloudpickle.dumps(job))
        self._share = share
        self._workers = workers
        self._watch = watch
        self._leases = leases
        self._members: list[_Member] = []
        self._parting: list[_Member] = []  # released; they end their engines
        self._started = 0
        self._openings = Openings()
        self._room, self._surveyed = 1, -math.inf

    def staff(self) -> None:
        """Start workers in free slots, no more than there are shards for."""
        wanted = self._leases.waiting - self._loading()
        if wanted > 0:
            free = sorted({*range(self._workers or self._survey())} - {member.slot for member in self._members})
            for slot in self._openings.usable(free, len(self._members))[:wanted]:
                self._start(slot)

    def _loading(self) -> int:
        return sum(not member.opened for member in self._members)

    def _survey(self) -> int:
        """Workers that the cluster has room for; looked up now and then, for machines come and go."""
        if time.monotonic() - self._surveyed > _SURVEY_SECONDS:
            self._surveyed = time.monotonic()
            self._room = max(1, self._share.places(alive()) if self._share.gpus else 1)
        return self._room

    def _start(self, slot: int) -> None:
        actor = self.hire(slot)
        self._started += 1
        self._members.append(_Member(actor, self._started, slot, self._ask(actor, 0)))
        self._leases.started(self._started, slot)

    def hire(self, slot: int) -> Any:
        """A new actor (see ``RayWorker``), which may have to wait for a machine."""
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
        return actor.news.remote(seen, max(_HEARTBEAT_SECONDS, len(self._members) / _WORKERS_PER_SECOND))

    def wait_for_news(self) -> None:
        """One round: hear what there is, or nothing for a second; bury the dead, give out leases."""
        for member in self._ready():
            self._attend(member)
        self._bury_dead()
        for number in self._leases.overdue():
            member = next(one for one in self._members if one.number == number)
            self._bury(member, "died", f"a worker on {member.place} made no progress for too long")
        for member in list(self._members):
            self._lease(member)
        self._dismiss()
        self._watch.tick()

    def _ready(self) -> list[_Member]:
        calls = {member.call: member for member in self._members if member.fell is None}
        if not calls:
            time.sleep(_GATHER_SECONDS)
            return []
        self._ray.wait(list(calls), num_returns=1, timeout=_TICK_SECONDS)
        time.sleep(_GATHER_SECONDS)
        ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return [calls[call] for call in ready]

    def _attend(self, member: _Member) -> None:
        """Take the answer of a worker, or notice that it is dead."""
        try:
            report: Report = self._ray.get(member.call)
        except self._ray.exceptions.ActorUnavailableError:  # its machine does not answer now: not dead
            member.call = self._ask(member.actor, member.seen)
            return
        except self._ray.exceptions.RayActorError as error:
            self._fell(member, error)
            return
        member.node = report.node
        for news in report.news:
            member.seen += 1
            if news.kind == "broken" and not member.opened:
                assert news.error is not None
                self._cannot_open(member, news.error, news.place)
                return
            self._hear(member, news)
        if report.end is None:
            member.call = self._ask(member.actor, member.seen)
        else:
            retired = member.said_why and not report.end
            last = report.end.rsplit("\n", 1)[-1] or "it returned without a word"
            self._bury(member, "retired" if retired else "died", f"a worker on {member.place} ended ({last})")

    def _hear(self, member: _Member, news: News) -> None:
        if news.kind == "open":
            member.opened, member.place = True, news.place
            self._openings.opened(member.slot)
        member.said_why = member.said_why or news.kind == "failed"
        self._leases.hear(member.number, news)

    def _cannot_open(self, member: _Member, error: Exception, place: str = "") -> None:
        what = self._openings.broken(member.slot, error, self._loading() - 1, place)
        self._remove(member, "died", what)

    def _fell(self, member: _Member, error: Any) -> None:
        if error.actor_init_failed:
            reason = f"a Ray worker cannot start; install xtoken {code_version()} on every node of the cluster: {error}"
            self._cannot_open(member, XtokenError(reason))
            return
        member.fell, member.cause = time.monotonic(), _cause(str(error))
        member.lost = error.preempted or "its node has died" in str(error)

    def _bury_dead(self) -> None:
        """Decide between dead workers and lost machines; the cluster may notice the second only after the first."""
        fallen = [member for member in self._members if member.fell is not None]
        nodes = {node.id for node in alive()} if fallen else set()
        for member in fallen:
            assert member.fell is not None
            where = f"a worker{f' on {member.place}' if member.place else ''}"
            if member.lost or (member.node and member.node not in nodes):
                self._bury(member, "lost", f"{where} was lost with its machine")
            elif time.monotonic() - member.fell > _VERDICT_SECONDS:
                self._bury(member, "died", f"{where} died ({member.cause})")

    def _bury(self, member: _Member, kind: str, what: str) -> None:
        """Take the shards of a worker back that is dead or useless."""
        if not member.opened and kind == "died":
            what = self._openings.died(member.slot, what)
        self._remove(member, kind, what)

    def _remove(self, member: _Member, kind: str, what: str) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)
        self._leases.gone(member.number, kind, what)

    def _lease(self, member: _Member) -> None:
        if member.fell is not None:
            return
        leases = self._leases.grant(member.number)
        if leases:
            member.calls += 1
            member.actor.lease.remote(member.calls, leases)
        nothing_left = not self._leases.waiting and all(one.fell is None for one in self._members)
        if member.opened and nothing_left and not self._leases.holds(member.number):
            # should a shard that another worker holds come back, a worker is started again
            self._members.remove(member)
            member.actor.close.remote()
            member.released = time.monotonic()
            self._parting.append(member)
            self._leases.gone(member.number, "released")

    def _dismiss(self) -> None:
        """Kill released workers once they are done with their engines, or too late."""
        if not self._parting:
            return
        calls = [member.call for member in self._parting]
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for member in list(self._parting):
            ended = member.call in done and not self._goes_on(member)
            if ended or time.monotonic() - member.released > _GRACE_SECONDS:
                self._ray.kill(member.actor)
                self._parting.remove(member)

    def _goes_on(self, member: _Member) -> bool:
        try:
            report: Report = self._ray.get(member.call)
        except self._ray.exceptions.RayActorError:
            return False
        member.seen += len(report.news)
        member.call = self._ask(member.actor, member.seen)
        return report.end is None

    def part(self, patience: float) -> None:
        """Let released workers end their engines."""
        end = time.monotonic() + patience
        while self._parting and time.monotonic() < end:
            self._ray.wait([member.call for member in self._parting], num_returns=1, timeout=_GATHER_SECONDS)
            self._dismiss()

    def end(self) -> None:
        """End all workers, and wait until they are."""
        everyone = [*self._members, *self._parting]
        for member in everyone:
            self._ray.kill(member.actor)
        if everyone:
            self._ray.wait([member.call for member in everyone], num_returns=len(everyone), timeout=_GRACE_SECONDS)
        self._members, self._parting = [], []


def _cause(error: str) -> str:
    """What Ray says of a death, in one line."""
    if "low on memory" in error:
        return "the node ran out of memory"
    if "End of file" in error:
        return "its process ended without a word, the system may have run out of memory"
    reason = re.search(r"The actor is dead because (.*)", error)
    return reason[1].strip()[:300] if reason is not None else " ".join(error.split())[:300]
