"""A run's figures as Prometheus metrics of the Ray cluster: its dashboards and alerts see them.

Every node of a cluster serves the metrics of its own processes; these come from the node of the driver. Ray puts
``ray_`` before their names.
"""

from collections import Counter

from xtoken.pipeline.executors.protocol import Event

_FAILURES = ("failed", "died", "lost", "overdue", "outage")
_ENDINGS = ("retired", "died", "lost", "released")
_OUTCOMES = {"part": "committed", "late": "late", "set_aside": "set_aside"}
_STATES = ("starting", "open")


class RayMetrics:
    """A ``Watch`` that counts; it must be made while Ray is connected.

    ======================================= ==========================================================================
    xtoken_tokens_total                     teacher tokens committed
    xtoken_worker_tokens_total{worker}      the same by slot
    xtoken_shards_total{outcome}            committed, set_aside (quarantined), late (another attempt had been first)
    xtoken_failures_total{kind}             failed, died, lost (with its machine), overdue, outage (of the storage)
    xtoken_shards_left                      neither committed nor quarantined
    xtoken_workers{state}                   starting (or waiting for a machine), open
    ======================================= ==========================================================================
    """

    def __init__(self, shards: int) -> None:
        from ray.util.metrics import Counter as Total
        from ray.util.metrics import Gauge

        self._tokens = Total("xtoken_tokens_total", "Teacher tokens committed.")
        self._worker_tokens = Total("xtoken_worker_tokens_total", "Teacher tokens committed, by worker.", ("worker",))
        self._shards = Total("xtoken_shards_total", "Shards by what became of them.", ("outcome",))
        self._failures = Total("xtoken_failures_total", "What went wrong.", ("kind",))
        self._shards_left = Gauge("xtoken_shards_left", "Shards neither committed nor quarantined.")
        self._workers = Gauge("xtoken_workers", "Workers by state.", ("state",))
        self._left = shards
        self._state: dict[int, str] = {}

    def see(self, event: Event) -> None:
        """See ``xtoken.pipeline.executors.protocol.Watch``."""
        outcome = _OUTCOMES.get(event.kind)
        if outcome is not None:
            self._shards.inc(1, {"outcome": outcome})
            self._left -= outcome != "late"
        if event.kind == "part" and event.part is not None and event.part.tokens:
            self._tokens.inc(event.part.tokens)
            self._worker_tokens.inc(event.part.tokens, {"worker": str(event.worker)})
        if event.kind in _FAILURES:
            self._failures.inc(1, {"kind": event.kind})
        if event.kind in ("starting", "opened"):
            self._state[event.worker] = "open" if event.kind == "opened" else "starting"
        elif event.kind in _ENDINGS:
            self._state.pop(event.worker, None)

    def tick(self) -> None:
        """See ``pipeline.executors.protocol.Watch``; states are set here: a rush of events costs nothing."""
        self._shards_left.set(self._left)
        count = Counter(self._state.values())
        for state in _STATES:
            self._workers.set(count[state], {"state": state})
