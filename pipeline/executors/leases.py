"""Who works on which shard: the bookkeeping that every executor shares. It knows nothing of processes or clusters.

A shard that fails three times is quarantined. A lease lasts as long as its worker gets on; then the shard is leased to
somebody else as well, and whoever commits first was first. A machine that is lost, or storage that does not answer, is
no fault of the shard's: that is counted apart.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from xtoken.pipeline.executors.protocol import Event, Lease, Message
from xtoken.pipeline.store.files import StopRun
from xtoken.schemas.errors import Unreachable

ATTEMPTS = 3
_LOSSES = 10  # machines that a shard may take down with it before it is suspect itself
_BACKOFF = (1.0, 60.0)  # seconds before the first try after an outage began, and at most
_PATIENCE = 1800.0  # seconds without any success after which an outage ends the run


@dataclass
class _Holder:
    """A worker with its leases, in the order they were given."""

    slot: int
    since: float
    opened: bool = False
    leases: dict[int, Lease] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    overdue: bool = False


class Leases:
    """State of one run; every method that takes a worker takes a number that no other worker of the run ever had."""

    def __init__(
        self,
        shards: Iterable[int],
        ahead: int,
        see: Callable[[Event], None],
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failed: dict[int, str] = {}
        self._waiting = deque(Lease(shard) for shard in shards)
        self._open = {lease.shard for lease in self._waiting}
        self._ahead = ahead
        self._see = see
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._holders: dict[int, _Holder] = {}
        self._losses: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._outage: float | None = None
        self._quiet_until, self._backoff = 0.0, _BACKOFF[0]

    @property
    def unfinished(self) -> bool:
        """Whether a shard is neither committed nor quarantined."""
        return bool(self._open)

    @property
    def waiting(self) -> int:
        """Leases that nobody has taken (some may be of shards that a late worker has committed)."""
        return len(self._waiting)

    def holds(self, worker: int) -> bool:
        """Whether a worker has leases."""
        return bool(self._holders[worker].leases)

    def started(self, worker: int, slot: int) -> None:
        """A worker is being started."""
        self._holders[worker] = _Holder(slot, self._clock())
        self._emit("starting", worker)

    def receive(self, worker: int, message: Message) -> None:
        """Take what a worker sends.

        Raises:
            XtokenError: an open worker cannot go on (its audit), or names what would befall every shard.
        """
        holder = self._holders[worker]
        holder.since, holder.overdue = self._clock(), False
        if message.kind == "broken":
            assert message.error is not None
            raise message.error
        if message.kind == "open":
            holder.opened = True
            self._emit("opened", worker, place=message.place)
        elif message.kind == "begun":
            holder.begun.add(message.shard)
            self._emit("begun", worker, shard=message.shard)
        elif message.kind == "progress":
            self._emit("progress", worker, shard=message.shard, done=message.done)
        elif message.kind == "part":
            self._part(worker, message)
        else:
            self._failed(worker, message)

    def grant(self, worker: int) -> list[Lease]:
        """Leases to send to a worker now; none where others need them more, or during an outage."""
        holder = self._holders[worker]
        if not holder.opened or holder.overdue or self._clock() < self._quiet_until:
            return []
        granted = []
        while self._waiting and (not holder.leases or self._more(holder)):
            lease = self._waiting.popleft()
            if lease.shard not in self._open:  # committed by somebody late
                continue
            holder.leases[lease.shard] = lease
            holder.since = self._clock() if len(holder.leases) == 1 else holder.since
            granted.append(lease)
            self._emit("leased", worker, shard=lease.shard, attempt=lease.attempt)
        return granted

    def _more(self, holder: _Holder) -> bool:
        """Whether a worker that has leases gets the next one, too."""
        # a shard that did harm is alone with its worker: what dies with it the next time is not blamed
        if any(lease.attempt > 1 for lease in (*holder.leases.values(), self._waiting[0])):
            return False
        # what is read ahead waits for its worker: towards the end every worker gets one shard at a time
        return len(holder.leases) < self._ahead and len(self._waiting) >= len(self._holders)

    def gone(self, worker: int, kind: str, why: str = "") -> None:
        """A worker has ended; its shards wait again.

        Args:
            worker: which.
            kind: retired (it ended by itself), released (it was let go), died, or lost (with its machine); only
                ``died`` counts against the shards that it had begun, ``lost`` after many times.
            why: for people.
        """
        holder = self._holders[worker]
        self._emit(kind, worker, error=why)
        for shard, lease in list(holder.leases.items()):
            blamed = shard in holder.begun and kind == "died"
            self._losses[shard] += shard in holder.begun and kind == "lost"
            if self._losses[shard] >= _LOSSES:
                blamed, why = True, f"{why}, {_LOSSES} times while at this shard"
                self._failures[shard] = ATTEMPTS
            self._give_back(worker, lease, why, blamed=blamed)
        del self._holders[worker]

    def overdue(self) -> list[int]:
        """Give back the shards of workers that made no progress for the lease's time.

        Returns:
            Workers that had been overdue before and still are: no use waiting for them.
        """
        hopeless, now = [], self._clock()
        for worker, holder in self._holders.items():
            if not holder.opened or now - holder.since < self._lease_seconds:
                continue
            if holder.overdue:
                hopeless.append(worker)
            elif holder.leases:
                holder.overdue, holder.since = True, now
                self._emit("overdue", worker, error=f"no progress for {self._lease_seconds:g} s")
                for lease in list(holder.leases.values()):
                    why = f"no progress for {self._lease_seconds:g} s (see --lease-seconds)"
                    self._give_back(worker, lease, why, blamed=lease.shard in holder.begun)
        return hopeless

    def _part(self, worker: int, message: Message) -> None:
        self._drop(worker, message.shard)
        self._outage, self._quiet_until, self._backoff = None, 0.0, _BACKOFF[0]
        first = message.shard in self._open
        self._open.discard(message.shard)
        self.failed.pop(message.shard, None)
        self._emit("part" if first else "late", worker, shard=message.shard, part=message.part)

    def _failed(self, worker: int, message: Message) -> None:
        assert message.error is not None
        if isinstance(message.error, StopRun):
            raise message.error
        lease = self._holders[worker].leases.get(message.shard)
        if lease is None:  # taken away when it was overdue
            return
        self._emit("failed", worker, shard=message.shard, attempt=lease.attempt, error=str(message.error))
        if isinstance(message.error, Unreachable):
            self._wait_out(message.error)
        self._give_back(worker, lease, str(message.error), blamed=not isinstance(message.error, Unreachable))

    def _wait_out(self, error: Unreachable) -> None:
        """Nobody gets a lease for a while; after too long a time without success the run ends."""
        now = self._clock()
        if self._outage is None:
            self._outage = now
        if now - self._outage > _PATIENCE:
            raise StopRun(f"nothing could be committed for {_PATIENCE / 60:g} minutes: {error}")
        if now >= self._quiet_until:
            self._quiet_until = now + self._backoff
            self._backoff = min(2 * self._backoff, _BACKOFF[1])
            self._see(Event("outage", error=str(error)))

    def _give_back(self, worker: int, lease: Lease, why: str, *, blamed: bool) -> None:
        self._drop(worker, lease.shard)
        shard = lease.shard
        if shard not in self._open:
            return
        self._failures[shard] += blamed
        if self._failures[shard] >= ATTEMPTS:
            self._open.discard(shard)
            self.failed[shard] = why
            self._emit("set_aside", worker, shard=shard, error=why)
        elif not blamed and lease.attempt == 1:
            self._waiting.appendleft(lease)
        else:
            self._waiting.append(Lease(shard, lease.attempt + 1))

    def _drop(self, worker: int, shard: int) -> None:
        holder = self._holders[worker]
        holder.leases.pop(shard, None)
        holder.begun.discard(shard)

    def _emit(self, kind: str, worker: int, **facts: object) -> None:
        self._see(Event(kind, worker=self._holders[worker].slot, **facts))  # type: ignore[arg-type]
