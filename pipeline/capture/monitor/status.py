"""status: how a capture gets on, from what lies in its folder; whoever can read that can ask."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from xtoken.pipeline.capture.plan import PLAN_FILE, Plan, load_plan
from xtoken.pipeline.capture.run_identity import RUN_FILE
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import COMMITS, read_commit
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import in_parallel
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, read_manifest
from xtoken.schemas.status import LIVE, RunStatus, is_status, parse_status, suffixed

_SILENT = 30.0  # seconds without a word after which a driver is doubted; it writes every 5
_RECORD = re.compile(r"part-(\d{5,9})\.json")
_RESUMES = "the same command resumes"


@dataclass(frozen=True)
class _State:
    """What lies in a capture's folder.

    Attributes:
        statuses: of the drivers that fill it now, or did last.
        ages: seconds since each was written.
        every: also those of drivers that shared the work otherwise before.
        records: indices of committed shards.
    """

    folder: Folder
    plan: Plan | None
    manifest: CaptureManifest | None
    statuses: list[RunStatus]
    ages: list[float]
    every: list[RunStatus]
    records: set[int]

    @property
    def live(self) -> list[RunStatus]:
        """Statuses of drivers that are at work and have written lately."""
        both = zip(self.statuses, self.ages, strict=True)
        return [status for status, age in both if status.phase in LIVE and age <= _SILENT]

    @property
    def shards(self) -> int:
        """All shards, as far as is known."""
        if self.plan is not None:
            return len(self.plan.shards)
        return max(len(self.records), sum(one.shards for one in self.statuses))

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.shards > 0 and len(self.records) >= self.shards

    @property
    def sealed(self) -> bool:
        """Whether there is nothing left to do."""
        return self.complete and self.manifest is not None


def read_status(out: str, cell: str | None = None) -> RunStatus | None:
    """What the driver of a capture, or of one cell of it, wrote last; None where there is nothing.

    Raises:
        XtokenError: it is damaged, or the storage cannot be asked.
    """
    folder, name = Folder(out), suffixed("status", "json", cell)
    try:
        return parse_status(folder.url(name), folder.read(name))
    except FileNotFoundError:
        return None


def goes_on(figures: dict[str, Any]) -> bool:
    """Whether more may happen to a capture of which ``status`` said this."""
    return figures["phase"] in (*LIVE, "silent")


def status(path: str, now: datetime | None = None) -> dict[str, Any]:
    """How a capture stands: phase, figures, and a row for each driver, worker and quarantined shard.

    Args:
        path: folder or URL that precompute writes, or wrote.
        now: the time; left out, that of this machine.

    Raises:
        XtokenError: no capture is there.
    """
    state = _look(path, now or datetime.now(UTC))
    live = state.live
    return {
        "phase": _phase(state),
        "says": _says(state),
        **_shard_figures(state),
        "tokens": _tokens(state),
        **_speed(live),
        **_trouble(state),
        "drivers": [_driver(one, age) for one, age in zip(state.statuses, state.ages, strict=True)],
        "workers": [row for one in live for row in _workers(one, now or datetime.now(UTC))],
        "set_aside": _quarantined_rows(state),
    }


def _look(path: str, now: datetime) -> _State:
    folder = Folder(path)
    names = set(folder.names())
    if not names & {RUN_FILE, PLAN_FILE, MANIFEST} and not any(map(is_status, names)):
        raise XtokenError(f"{path} holds no capture{_below(folder, names)}; name the --out of a precompute")
    every = [one for name in sorted(names) if is_status(name) for one in _read(folder, name)]
    statuses = _current(every)
    return _State(
        folder=folder,
        plan=load_plan(folder),
        manifest=read_manifest(path, CaptureManifest) if MANIFEST in names else None,
        statuses=statuses,
        ages=[max(0.0, (now - one.updated).total_seconds()) for one in statuses],
        every=every,
        records=committed_indices(folder),
    )


def committed_indices(folder: Folder) -> set[int]:
    """Shards that have a commit record; the records are not read."""
    return {int(match[1]) for name in folder.names(COMMITS) if (match := _RECORD.fullmatch(name))}


def _below(folder: Folder, names: set[str]) -> str:
    """Several teachers write a folder each."""
    captures = [name for name in sorted(names)[:100] if folder.exists(f"{name}/{RUN_FILE}")]
    return f" itself, the folders {', '.join(captures)} below it do" if captures else ""


def _read(folder: Folder, name: str) -> Iterator[RunStatus]:
    try:
        yield parse_status(folder.url(name), folder.read(name))
    except FileNotFoundError:  # gone since it was listed
        return


def _current(statuses: Sequence[RunStatus]) -> list[RunStatus]:
    """The drivers that share the work as the latest one does: runs without cells, or with so many, leave theirs."""
    if not statuses:
        return []
    latest = max(statuses, key=lambda one: one.updated)
    return [one for one in statuses if _cells(one) == _cells(latest)]


def _cells(one: RunStatus) -> str:
    return (one.cell or "1/1").rpartition("/")[2]


def _phase(state: _State) -> str:
    if state.live:
        phases = {one.phase for one in state.live}
        return next(phase for phase in ("running", "sealing", "planning") if phase in phases)
    if state.sealed:
        return "done"
    if any(one.phase in LIVE for one in state.statuses):
        return "silent"
    if state.statuses and (last := max(state.statuses, key=lambda one: one.updated)).phase != "done":
        return last.phase
    if state.plan is None:
        return "planning"
    return "unsealed" if state.complete else "incomplete"


def _says(state: _State) -> str:
    """What a person should know or do."""
    if state.sealed and not state.live:
        return "complete; 'xtoken verify' checks every byte"
    both = zip(state.statuses, state.ages, strict=True)
    lines = [line for one, age in both if (line := _complaint(one, age)) is not None]
    if state.complete and not state.live:
        lines.append("every shard is committed; the same command, without --cell, writes the manifest")
    elif not state.statuses:
        lines.append(f"no driver has written here: it is planning, or ended before it ran a shard; then {_RESUMES}")
    elif not lines and not state.live:
        lines.append(f"shards are left and no driver is at work; {_RESUMES}")
    return "\n".join(lines or ["at work"])


def _complaint(one: RunStatus, age: float) -> str | None:
    """What is wrong with a driver."""
    driver = f"the driver of {one.pid} on {one.host}"
    if one.phase in LIVE and age > _SILENT:
        return f"{driver} has not written for {age:,.0f} s: it has ended or hangs; {_RESUMES}"
    if one.phase in ("failed", "interrupted"):
        error = f": {one.error.splitlines()[0]}" if one.error else ""
        return f"{driver} ended ({one.phase}{error}); {_RESUMES}"
    return None


def _shard_figures(state: _State) -> dict[str, Any]:
    done, live = len(state.records), state.live
    text = state.plan.corpus.text_bytes if state.plan is not None else sum(one.text_bytes for one in state.statuses)
    return {
        "shards": state.shards or None,
        "shards_done": done,
        "shards_in_flight": sum(one.shards_in_flight for one in live),
        "shards_set_aside": max(len(_quarantined_errors(state)), sum(one.shards_set_aside for one in live)),
        "share_done": round(_bytes_done(state) / text, 4) if text else None,
    }


def _bytes_done(state: _State) -> int:
    if state.plan is not None:
        sizes = {shard.index: shard.text_bytes for shard in state.plan.shards}
        committed = sum(sizes.get(index, 0) for index in state.records)
        # of shards that are at work, only the drivers know
        return max(committed, sum(one.text_bytes_done for one in state.statuses) if state.live else 0)
    return sum(one.text_bytes_done for one in state.statuses)


def _tokens(state: _State) -> int:
    """Tokens that are committed. A live driver's word is 5 s old at most; else the records are asked."""
    if state.manifest is not None and len(state.manifest.parts) == len(state.records):
        return sum(part.tokens for part in state.manifest.parts)
    if state.live or (state.statuses and sum(one.shards_done for one in state.statuses) == len(state.records)):
        return sum(one.tokens for one in state.statuses)
    folder = state.folder
    parts = in_parallel(lambda index: read_commit(folder, index), sorted(state.records), folder.root)
    return sum(part.tokens for part in parts if part is not None)


def _speed(live: Sequence[RunStatus]) -> dict[str, Any]:
    if not live:
        return {}
    left = [one.seconds_left for one in live if one.seconds_left is not None]
    return {
        "tokens_per_s": round(sum(one.tokens_per_s or 0.0 for one in live), 1),
        "tokens_per_s_mean": round(sum(one.tokens_per_s_mean or 0.0 for one in live), 1),
        "seconds_left": max(left) if left else None,
        "time_left": duration(max(left)) if left else "not known yet",
        "workers_open": sum(row.state in ("idle", "working", "overdue") for one in live for row in one.workers),
    }


def _trouble(state: _State) -> dict[str, Any]:
    """Time taken and what went wrong, in the last run of every driver that is known."""
    statuses = state.every
    if not statuses:
        return {}
    kinds = sorted({kind for one in statuses for kind in one.failures})
    failures = {kind: sum(one.failures.get(kind, 0) for one in statuses) for kind in kinds}
    last = next((one.last_failure for one in reversed(statuses) if one.last_failure), None)
    return {
        "worker_hours": round(sum(one.worker_seconds for one in statuses) / 3600, 4),
        "gpu_hours": round(sum(one.gpu_seconds for one in statuses) / 3600, 4),
        "failures": failures,
        "restarts": sum(one.restarts for one in statuses),
        "lost_machines": sum(one.lost_machines for one in statuses),
        "outages": sum(one.outages for one in statuses),
        **({"last_failure": last} if last is not None else {}),
    }


def _driver(one: RunStatus, age: float) -> dict[str, Any]:
    return {
        "cell": one.cell or "all",
        "phase": one.phase,
        "host": one.host,
        "pid": one.pid,
        "shards": f"{one.shards_done}/{one.shards}",
        "began": one.began.isoformat(timespec="seconds"),
        "written_s_ago": round(age),
        "xtoken": one.xtoken_version,
    }


def _workers(one: RunStatus, now: datetime) -> Iterator[dict[str, Any]]:
    for row in one.workers:
        yield {
            **({"cell": one.cell} if one.cell is not None else {}),
            "worker": row.slot,
            "place": row.place,
            "state": row.state,
            "shard": "" if row.shard is None else row.shard,
            "tokens_per_s": "" if row.tokens_per_s is None else row.tokens_per_s,
            "for_s": max(0, round((now - row.since).total_seconds())),
        }


def _quarantined_errors(state: _State) -> dict[int, str]:
    """Quarantined shards that nobody has committed since."""
    # a run that is at work tries those of the one before again
    errors = dict(state.manifest.set_aside) if state.manifest is not None and not state.live else {}
    for one in state.statuses:
        errors |= one.set_aside
    return {shard: error for shard, error in sorted(errors.items()) if shard not in state.records}


def _quarantined_rows(state: _State) -> list[dict[str, Any]]:
    return [{"shard": shard, "error": error} for shard, error in _quarantined_errors(state).items()]


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``2 d 3 h``, ``1 h 20 min``, ``45 s``."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
