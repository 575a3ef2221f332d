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
class _Seat:
    """A slot, with the worker that has it now or had it last."""

    slot: int
    rate: Rate
    place: str = ""
    state: str = "starting"
    since: datetime = field(default_factory=utc_now)
    opened: float | None = None  # when, by the board's clock; None where no engine is open
    shard: int | None = None
    told: dict[int, int] = field(default_factory=dict)  # bytes done of each shard that it has

    def turn(self, state: str) -> None:
        """Another state, from now on."""
        if state != self.state:
            self.state, self.since = state, utc_now()


class Crew:
    """All workers, by slot. Times are seconds on the board's clock."""

    def __init__(self) -> None:
        self.restarts = 0
        self.open = 0  # workers whose engine is open
        self._seats: dict[int, _Seat] = {}
        self._seconds = 0.0  # of engines that are closed again

    @property
    def shards(self) -> set[int]:
        """Shards that somebody has."""
        return {shard for seat in self._seats.values() for shard in seat.told}

    def seconds(self, now: float) -> float:
        """Worker-seconds with an open engine."""
        return self._seconds + sum(now - seat.opened for seat in self._seats.values() if seat.opened is not None)

    def see(self, event: Event, now: float, size: int) -> None:
        """Take an event; ``size`` is the bytes of text of its shard."""
        if event.worker < 0:
            return
        seat = self._seats.get(event.worker)
        if seat is None or event.kind == "starting":
            self.restarts += seat is not None
            seat = self._seats[event.worker] = _Seat(event.worker, Rate(now, _MINUTE))
        if event.kind == "opened":
            self.open += seat.opened is None
            seat.opened, seat.place, seat.rate = now, event.place, Rate(now, _MINUTE)
            seat.turn("idle")
        elif event.kind == "leased":
            seat.told.setdefault(event.shard, 0)
        elif event.kind in ("begun", "told"):
            _on(seat, event, now)
        elif event.kind in _CLOSED:
            _off(seat, event, now, size)
        elif event.kind == "overdue" or event.kind in _ENDS:
            seat.told.clear()
            seat.shard = None
            seat.turn(event.kind)
        if event.kind in _ENDS and seat.opened is not None:
            self._seconds, seat.opened, self.open = self._seconds + now - seat.opened, None, self.open - 1

    def rows(self, now: float, tokens_per_byte: float | None) -> list[WorkerStatus]:
        """One row per worker, by slot; those that were let go because nothing was left are out."""
        seats = [seat for _, seat in sorted(self._seats.items()) if seat.state != "released"]
        return [_row(seat, now, tokens_per_byte) for seat in seats]


def _on(seat: _Seat, event: Event, now: float) -> None:
    """A worker is at a shard."""
    if event.kind == "told":
        before = seat.told.get(event.shard, 0)
        seat.told[event.shard] = max(before, event.done)
        seat.rate.add(now, max(0, event.done - before))
        seat.shard = event.shard
    elif seat.shard is None:
        seat.shard = event.shard
    seat.turn("working")


def _off(seat: _Seat, event: Event, now: float, size: int) -> None:
    """A worker is done with a shard."""
    before = seat.told.pop(event.shard, 0)
    if event.kind != "failed":
        seat.rate.add(now, max(0, size - before))
    if seat.shard == event.shard:
        seat.shard = min(seat.told, default=None)
    seat.turn("working" if seat.told else "idle")


def _row(seat: _Seat, now: float, tokens_per_byte: float | None) -> WorkerStatus:
    known = tokens_per_byte is not None and seat.opened is not None
    speed = round(seat.rate.per_second(now) * (tokens_per_byte or 0.0), 1) if known else None
    return WorkerStatus(
        slot=seat.slot, place=seat.place, shard=seat.shard, state=seat.state, tokens_per_s=speed, since=seat.since
    )
