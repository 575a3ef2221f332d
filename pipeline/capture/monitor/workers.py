"""The workers of a run as its events show them: where they are, what they do, how fast, and for how long."""

from dataclasses import dataclass, field
from datetime import datetime

from xtoken.pipeline.capture.monitor.event_log import utc_now
from xtoken.pipeline.capture.monitor.rate import Rate
from xtoken.pipeline.executors.protocol import Event
from xtoken.schemas.status import WorkerStatus

_MINUTE = 60.0
_ENDS = ("retired", "died", "lost", "released")
_CLOSED = ("part", "late", "failed")


@dataclass
class _Slot:
    """A slot, with the worker that has it now or had it last; ``number`` is the slot's."""

    number: int
    rate: Rate
    place: str = ""
    state: str = "starting"
    since: datetime = field(default_factory=utc_now)
    opened: float | None = None  # when, by the dashboard's clock; None where no engine is open
    shard: int | None = None
    progress: dict[int, int] = field(default_factory=dict)  # bytes done of each shard that it has

    def turn(self, state: str) -> None:
        """Another state, from now on."""
        if state != self.state:
            self.state, self.since = state, utc_now()


class WorkerTable:
    """All workers, by slot. Times are seconds on the dashboard's clock."""

    def __init__(self) -> None:
        self.restarts = 0
        self.open = 0  # workers whose engine is open
        self._slots: dict[int, _Slot] = {}
        self._seconds = 0.0  # of engines that are closed again

    @property
    def shards(self) -> set[int]:
        """Shards that somebody has."""
        return {shard for slot in self._slots.values() for shard in slot.progress}

    def seconds(self, now: float) -> float:
        """Worker-seconds with an open engine."""
        return self._seconds + sum(now - slot.opened for slot in self._slots.values() if slot.opened is not None)

    def see(self, event: Event, now: float, size: int) -> None:
        """Take an event; ``size`` is the bytes of text of its shard."""
        if event.worker < 0:
            return
        slot = self._slots.get(event.worker)
        if slot is None or event.kind == "starting":
            self.restarts += slot is not None
            slot = self._slots[event.worker] = _Slot(event.worker, Rate(now, _MINUTE))
        if event.kind == "opened":
            self.open += slot.opened is None
            slot.opened, slot.place, slot.rate = now, event.place, Rate(now, _MINUTE)
            slot.turn("idle")
        elif event.kind == "leased":
            slot.progress.setdefault(event.shard, 0)
        elif event.kind in ("begun", "progress"):
            _on(slot, event, now)
        elif event.kind in _CLOSED:
            _off(slot, event, now, size)
        elif event.kind == "overdue" or event.kind in _ENDS:
            slot.progress.clear()
            slot.shard = None
            slot.turn(event.kind)
        if event.kind in _ENDS and slot.opened is not None:
            self._seconds, slot.opened, self.open = self._seconds + now - slot.opened, None, self.open - 1

    def rows(self, now: float, tokens_per_byte: float | None) -> list[WorkerStatus]:
        """One row per worker, by slot; those that were let go because nothing was left are out."""
        slots = [slot for _, slot in sorted(self._slots.items()) if slot.state != "released"]
        return [_row(slot, now, tokens_per_byte) for slot in slots]


def _on(slot: _Slot, event: Event, now: float) -> None:
    """A worker is at a shard."""
    if event.kind == "progress":
        before = slot.progress.get(event.shard, 0)
        slot.progress[event.shard] = max(before, event.done)
        slot.rate.add(now, max(0, event.done - before))
        slot.shard = event.shard
    elif slot.shard is None:
        slot.shard = event.shard
    slot.turn("working")


def _off(slot: _Slot, event: Event, now: float, size: int) -> None:
    """A worker is done with a shard."""
    before = slot.progress.pop(event.shard, 0)
    if event.kind != "failed":
        slot.rate.add(now, max(0, size - before))
    if slot.shard == event.shard:
        slot.shard = min(slot.progress, default=None)
    slot.turn("working" if slot.progress else "idle")


def _row(slot: _Slot, now: float, tokens_per_byte: float | None) -> WorkerStatus:
    known = tokens_per_byte is not None and slot.opened is not None
    speed = round(slot.rate.per_second(now) * (tokens_per_byte or 0.0), 1) if known else None
    return WorkerStatus(
        slot=slot.number, place=slot.place, shard=slot.shard, state=slot.state, tokens_per_s=speed, since=slot.since
    )
