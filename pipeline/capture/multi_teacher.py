"""What the verb precompute does: one teacher, or teacher after teacher over one plan, and what it took in figures.

Several teachers have a folder each, and their captures join sample by sample.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.capture.monitor.dashboard import run_figures
from xtoken.pipeline.capture.monitor.status import read_status
from xtoken.pipeline.capture.plan import PLAN_FILE, load_plan
from xtoken.pipeline.capture.precompute import precompute
from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.store.figures import capture_figures
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.pipeline.store.skip_records import BAD_FILE, SKIPPED_FILE, count_reasons
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import PartlyDone, XtokenError
from xtoken.schemas.status import RunStatus
from xtoken.schemas.ui.progress import Progress

R = TypeVar("R")
# Of a teacher's figures, those that a table of teachers shows.
_COLUMNS = ("tokens", "shards", "shards_done", "bytes_per_token", "disk_bytes", "hours", "gpus", "gpu_hours", "cost")


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of one teacher: a result, or the error that ended its run."""

    config: PrecomputeConfig
    result: R | None = None
    error: XtokenError | None = None


def run_teachers(configs: Sequence[PrecomputeConfig], progress: Progress) -> dict[str, Any]:
    """Capture one teacher's rows, or several teachers' below ``--out``; under ``--dry-run``, say what that would take.

    Args:
        configs: alike but for the teacher.
        progress: shows bytes of corpus text.

    Returns:
        Figures of the capture; of several, a row for each.

    Raises:
        PartlyDone: one of several teachers failed; the others' captures stand.
        XtokenError: as ``precompute``.
    """
    if len(configs) == 1:
        return _run_one(configs[0], progress)
    outcomes = list(one_after_the_other(each_below(configs), lambda config: _run_one(config, progress)))
    figures = {"teachers": [_row(outcome) for outcome in outcomes]}
    if any(outcome.error is not None for outcome in outcomes):
        asked = [(outcome.config.teacher.teacher, outcome.error) for outcome in outcomes]
        raise PartlyDone.of_several(asked, "teachers failed, the others' captures stand", figures)
    return figures


def _run_one(config: PrecomputeConfig, progress: Progress) -> dict[str, Any]:
    if config.run.dry_run:
        return dry_run(config, progress)
    began = time.monotonic()
    manifest, run = precompute(config, progress), _own_status(config)
    return {
        **(_cell_figures(config.run.cell, run) if manifest is None else capture_figures(manifest)),
        **(run_figures(run) if run is not None else {}),
        "seconds": round(time.monotonic() - began, 1),
        **_files(config),
        **_skipped(config),
        "out": config.out,
    }


def _skipped(config: PrecomputeConfig) -> dict[str, Any]:
    """Conversations that are no samples, by reason, and where each is named."""
    reasons = count_reasons(Folder(config.out), SKIPPED_FILE)
    return {"skipped": reasons, "skipped_named_in": Folder(config.out).url(SKIPPED_FILE)} if reasons else {}


def _files(config: PrecomputeConfig) -> dict[str, Any]:
    """What is read and what is not; nothing where a finished capture outlived its corpus."""
    plan = load_plan(Folder(config.out))
    with suppress(XtokenError):
        return Corpus(config.corpus, plan.names if plan is not None else ()).listing.figures
    return {}


def _own_status(config: PrecomputeConfig) -> RunStatus | None:
    """What this process's dashboard wrote; None where storage did not take it."""
    status = read_status(config.out, config.run.cell)
    ours = status is not None and (status.host, status.pid) == (socket.gethostname(), os.getpid())
    return status if ours else None


def _cell_figures(cell: str | None, run: RunStatus | None) -> dict[str, Any]:
    done = {} if run is None else {"shards": run.shards, "shards_done": run.shards_done, "tokens": run.tokens}
    return {"cell": cell, **done, "next": "when all cells are done, the same command without --cell seals them"}


def _row(outcome: "Outcome[dict[str, Any]]") -> dict[str, Any]:
    result = outcome.result or {}
    shown = {name: result[name] for name in (*_COLUMNS, "seconds") if name in result}
    said = "failed" if outcome.error is not None else "planned" if outcome.config.run.dry_run else "done"
    return {"teacher": outcome.config.teacher.teacher, "outcome": said, **shown, "out": outcome.config.out}


def each_below(configs: Sequence[PrecomputeConfig]) -> list[PrecomputeConfig]:
    """The same runs, each with a folder below ``--out`` that is named like its teacher.

    Raises:
        XtokenError: two of them would have the same name.
    """
    names = names_below([config.teacher.teacher for config in configs], configs[0].out or "--out", "--teacher ")
    return [
        config.model_copy(update={"out": f"{config.out.rstrip('/')}/{name}" if config.out else ""})
        for config, name in zip(configs, names, strict=True)
    ]


def names_below(sources: Sequence[str], out: str, said: str = "") -> list[str]:
    """A folder's name for each source, made of the last part of its id, path or URL.

    Args:
        sources: ids, paths or URLs.
        out: where the folders will be.
        said: what stands before a source on the command line.

    Raises:
        XtokenError: two of them would have the same name.
    """
    names: dict[str, str] = {}
    folders = []
    for source in sources:
        name = teacher_name(source)
        if name.casefold() in names:
            raise XtokenError(
                f"{said}{names[name.casefold()]} and {said}{source} would both go to the folder "
                f"{name} of {out}; run them by themselves, with an --out each"
            )
        names[name.casefold()] = source
        folders.append(name)
    return folders


def teacher_name(teacher: str) -> str:
    """A folder's name made of the last part of a model's id or path."""
    last = teacher.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "teacher"


def one_after_the_other(
    configs: Sequence[PrecomputeConfig], run: Callable[[PrecomputeConfig], R]
) -> Iterator[Outcome[R]]:
    """Run them; an error of one teacher costs the others nothing, unless it would befall them all (``StopRun``).

    Args:
        configs: of ``each_below``.
        run: of one; it makes the plan where there is none, which the next ones are given.
    """
    for config in configs:
        try:
            if not config.run.dry_run:
                share_plan(config, configs)
            yield Outcome(config, result=run(config))
        except StopRun as error:
            yield Outcome(config, error=error)
            return
        except XtokenError as error:
            yield Outcome(config, error=error)


def share_plan(config: PrecomputeConfig, configs: Sequence[PrecomputeConfig]) -> None:
    """Give a teacher's folder the plan that another one has, byte for byte.

    Raises:
        XtokenError: it has another plan already.
    """
    folder, others = Folder(config.out), [Folder(other.out) for other in configs if other is not config]
    source = next((other for other in others if other.exists(PLAN_FILE)), None)
    if source is None:
        return
    folder.make("")
    if source.exists(BAD_FILE) and not folder.exists(PLAN_FILE):
        folder.replace(BAD_FILE, source.read(BAD_FILE))
    if folder.create(PLAN_FILE, source.read(PLAN_FILE)):
        return
    mine, its = load_plan(folder), load_plan(source)
    if mine is not None and its is not None and mine.hash != its.hash:
        raise XtokenError(
            f"{folder.root} and {source.root} were planned from different documents, so their captures do not join; "
            "remove one of the folders"
        )
