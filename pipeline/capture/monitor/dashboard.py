"""The dashboard of a capture: what its driver shows on the terminal, in status.json and in the log.

It sees every event of a run (see ``xtoken.pipeline.executors.protocol``) and decides nothing.
"""

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from xtoken.pipeline.capture.monitor.event_log import RunLog, log_path, utc_now
from xtoken.pipeline.capture.monitor.rate import Rate
from xtoken.pipeline.capture.monitor.status_file import StatusFile
from xtoken.pipeline.capture.monitor.workers import WorkerTable
from xtoken.pipeline.capture.plan import Plan
from xtoken.pipeline.capture.run_identity import read_teacher
from xtoken.pipeline.corpus import Listing
from xtoken.pipeline.executors.fleet import gpus_of_worker
from xtoken.pipeline.executors.protocol import Event
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.capture import RunGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError, last_words
from xtoken.schemas.manifest import Part, code_version
from xtoken.schemas.status import RunStatus, suffixed
from xtoken.schemas.ui.progress import Progress

_EVERY = 5.0  # seconds between two writings of the status
_MINUTE, _LONG = 60.0, 600.0  # windows of the rate that is shown, and of the one that foretells the end
_NAMED, _SHORT = 100, 500  # quarantined shards that are named, characters of an error
_FAILURES = ("failed", "died", "overdue")


class Dashboard:
    """A ``Watch`` of one run; as a context manager it closes itself with the outcome.

    Bytes of text are the measure of progress; an attempt that starts anew moves nothing until it is past the one
    before.

    Attributes:
        text_bytes: bytes of text of the run's shards.
        text_bytes_done: those of them that are committed.
    """

    def __init__(
        self,
        folder: Folder,
        plan: Plan,
        run: RunGroup,
        teacher: TeacherGroup,
        done: Mapping[int, Part],
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            folder: the capture's, where the status is written.
            plan: all shards.
            run: how it runs; with ``--cell``, only its shards count.
            teacher: what runs.
            done: what was committed before, whoever did it.
            progress: shows the bytes of text done and the main figures.
            clock: seconds that never go back.

        Raises:
            XtokenError: the log cannot be written.
        """
        self._folder, self._run, self._teacher, self._progress, self._clock = folder, run, teacher, progress, clock
        which, count = run.cells
        self._sizes = {shard.index: shard.text_bytes for shard in plan.shards if shard.index % count == which}
        self._done = {index for index in done if index in self._sizes}
        self.text_bytes = sum(self._sizes.values())
        self.text_bytes_done = sum(self._sizes[index] for index in self._done)
        self._tokens = sum(done[index].tokens for index in self._done)
        # tokens of bytes of text, of every cell: what tells how many a byte makes
        self._known = [sum(part.tokens for part in done.values()), sum(part.text_bytes for part in done.values())]
        self._moved: dict[int, int] = {}  # bytes done of shards that are not committed
        self._unshown = 0  # bytes that the terminal does not show yet: it is written once a second, not at every event
        self._quarantined: dict[int, str] = {}
        self._workers, self._counts, self._last_failure = WorkerTable(), Counter[str](), ""
        self._began, self._began_utc, self._phase, self._error = clock(), utc_now(), "running", ""
        self._gpus: float | None = None
        self._minute: Rate | None = None  # both begin with the first worker that is ready
        self._long: Rate | None = None
        self._opened = 0.0
        self._log = RunLog(log_path(run, folder))
        self._status_file = StatusFile(folder, suffixed("status", "json", run.cell))
        self._due, self._closed = self._began, False
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._live_on, name="xtoken-heartbeat", daemon=True)
        self._log.write("run", **self._who(), plan=plan.hash, shards=len(self._sizes), done=len(self._done))

    def log_corpus(self, listing: Listing) -> None:
        """Log which files are read, and how many are left out, by what they are."""
        self._log.write("corpus", **listing.figures)

    def see(self, event: Event) -> None:
        """See ``Watch``."""
        now, size = self._clock(), self._sizes.get(event.shard, 0)
        if event.kind != "progress":
            self._log.write(event.kind, **_facts(event))
        self._workers.see(event, now, size)
        self._counts[event.kind] += 1
        if event.kind == "opened":
            self._ready(now)
        elif event.kind == "progress":
            self._advance(event.shard, min(event.done, size), now)
        elif event.kind == "part" and event.part is not None:
            self._part(event.shard, event.part, now)
        elif event.kind == "set_aside":
            self._quarantined[event.shard] = event.error
        if event.kind in _FAILURES:
            self._last_failure = event.error and last_words(event.error)

    def tick(self) -> None:
        """See ``Watch``."""
        self._show()
        if self._clock() >= self._due and not self._status_file.busy:
            self._due = self._clock() + _EVERY
            self._status_file.post(self._written())

    def enter(self, phase: str) -> None:
        """Another phase begins, in which ``see`` gets no events: ``sealing``."""
        self._phase = phase
        self._log.write("phase", phase=phase)
        self._status_file.post(self._written())
        if not self._beat.is_alive():
            self._beat.start()

    def close(self, outcome: str, error: str = "") -> None:
        """Record how it ended: ``done``, ``failed`` or ``interrupted``; the first call counts."""
        if self._closed:
            return
        self._closed = True
        self._over.set()
        if self._beat.is_alive():
            self._beat.join()
        if self._unshown:
            self._show()
        self._phase, self._error = outcome, error[:_SHORT]
        self._log.write("end", outcome=outcome, error=error, **self.figures())
        self._log.close()
        self._status_file.last(self._written())

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close("done")
        else:
            self.close("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed", str(error))

    def figures(self) -> dict[str, Any]:
        """What the run took, in few figures."""
        return run_figures(self.status())

    def status(self) -> RunStatus:
        """How it stands now."""
        now, ratio = self._clock(), self._tokens_per_byte
        seconds = self._workers.seconds(now)
        return RunStatus(
            **self._who(),
            phase=self._phase,
            error=self._error,
            began=self._began_utc,
            updated=utc_now(),
            seconds=round(now - self._began, 1),
            shards=len(self._sizes),
            shards_done=len(self._done),
            shards_in_flight=len(self._workers.shards),
            text_bytes=self.text_bytes,
            text_bytes_done=self.text_bytes_done + sum(self._moved.values()),
            tokens=self._tokens,
            **self._rates(now),
            worker_seconds=round(seconds, 1),
            gpu_seconds=round(seconds * (self._gpus or 0.0), 1),
            failures={kind: self._counts[kind] for kind in _FAILURES if self._counts[kind]},
            restarts=self._workers.restarts,
            lost_machines=self._counts["lost"],
            outages=self._counts["outage"],
            log_lines_lost=self._log.lost,
            last_failure=self._last_failure,
            set_aside={shard: last_words(self._quarantined[shard]) for shard in sorted(self._quarantined)[:_NAMED]},
            shards_set_aside=len(self._quarantined),
            workers=self._workers.rows(now, ratio),
        )

    def _live_on(self) -> None:
        """Write now and then that the driver is alive, where nobody calls ``tick``."""
        while not self._over.wait(_EVERY):
            self._status_file.post(self._written())

    @property
    def _tokens_per_byte(self) -> float | None:
        tokens, text_bytes = self._known
        return tokens / text_bytes if tokens and text_bytes else None

    def _who(self) -> dict[str, Any]:
        return {
            "xtoken_version": code_version(),
            "cell": self._run.cell,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _ready(self, now: float) -> None:
        """A worker is ready; the first one tells what engines run on."""
        if self._minute is None:
            self._minute, self._long, self._opened = Rate(now, _MINUTE), Rate(now, _LONG), now
            self._due = now  # from here on there is something to see
        if self._gpus is None:
            with contextlib.suppress(XtokenError, OSError, ValueError):
                self._gpus = gpus_of_worker(self._run, self._teacher, read_teacher(self._folder).device)

    def _part(self, shard: int, part: Part, now: float) -> None:
        size = self._sizes.get(shard, 0)
        self._advance(shard, size, now)
        self._moved.pop(shard, None)
        self._quarantined.pop(shard, None)  # somebody late had it after all
        if shard in self._sizes and shard not in self._done:
            self._done.add(shard)
            self.text_bytes_done += size
            self._tokens += part.tokens
            self._known = [self._known[0] + part.tokens, self._known[1] + part.text_bytes]
        self._show()

    def _advance(self, shard: int, done: int, now: float) -> None:
        more = done - self._moved.get(shard, 0)
        if more > 0 and shard not in self._done:
            self._moved[shard] = done
            for rate in (self._minute, self._long):
                if rate is not None:
                    rate.add(now, more)
            self._unshown += more

    def _rates(self, now: float) -> dict[str, float | None]:
        """Tokens per second, and seconds left."""
        ratio, minute, long = self._tokens_per_byte, self._minute, self._long
        if minute is None or long is None:
            return {}
        mean = minute.count / (now - self._opened) if now > self._opened else 0.0
        rates = {"tokens_per_s": minute.per_second(now), "tokens_per_s_mean": mean}
        speed, left = long.per_second(now), self._left()
        return {
            **{name: round(rate * ratio, 1) if ratio is not None else None for name, rate in rates.items()},
            "seconds_left": round(left / speed, 1) if speed else None,
        }

    def _left(self) -> int:
        """Bytes of text that no worker has done yet."""
        running = sum(self._moved.values()) - sum(self._moved.get(shard, 0) for shard in self._quarantined)
        quarantined = sum(self._sizes.get(shard, 0) for shard in self._quarantined)
        return self.text_bytes - self.text_bytes_done - running - quarantined

    def _show(self) -> None:
        """Bring the terminal up to date."""
        self._progress.advance(self._unshown, **self._shown())
        self._unshown = 0

    def _shown(self) -> dict[str, float | str]:
        shown: dict[str, float | str] = {"shards": f"{len(self._done)}/{len(self._sizes)}"}
        ratio = self._tokens_per_byte
        if ratio is not None and self._minute is not None:
            shown["tok/s"] = self._minute.per_second(self._clock()) * ratio
        shown["workers"] = self._workers.open
        failures = sum(self._counts[kind] for kind in (*_FAILURES, "lost"))
        return shown | ({"failures": failures} if failures else {})

    def _written(self) -> bytes:
        return self.status().model_dump_json(exclude_defaults=True).encode() + b"\n"


def run_figures(status: RunStatus) -> dict[str, Any]:
    """What a run took: time, time of GPUs (or of workers, where there are none), and what went wrong."""
    hours = {"gpu_hours": status.gpu_seconds} if status.gpu_seconds else {"worker_hours": status.worker_seconds}
    wrong = {**status.failures, "restarts": status.restarts, "lost_machines": status.lost_machines}
    wrong |= {"outages": status.outages, "set_aside": status.shards_set_aside}
    return {
        "seconds": status.seconds,
        **{name: round(seconds / 3600, 4) for name, seconds in hours.items()},
        "went_wrong": {name: count for name, count in wrong.items() if count},
    }


def _facts(event: Event) -> dict[str, Any]:
    """An event as a line of the log."""
    numbers = {"worker": event.worker, "shard": event.shard}
    part = event.part
    return {
        **{name: number for name, number in numbers.items() if number >= 0},
        "attempt": event.attempt or None,
        "place": event.place,
        "error": event.error,
        **({} if part is None else {"tokens": part.tokens, "file_bytes": part.file_bytes}),
    }
