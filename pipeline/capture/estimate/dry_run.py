"""precompute --dry-run: everything that can be checked, and what the run would take; nothing is written to --out."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtoken.pipeline.capture.estimate.like import Likeness, read_likeness
from xtoken.pipeline.capture.estimate.pilot import Pilot, Reading, take_pilot
from xtoken.pipeline.capture.monitor.event_log import log_path
from xtoken.pipeline.capture.monitor.status import committed_indices, duration
from xtoken.pipeline.capture.plan import check_files, load_plan, settle_plan
from xtoken.pipeline.capture.precompute import refuse_places
from xtoken.pipeline.capture.run_identity import check_settings, run_settings
from xtoken.pipeline.executors.fleet import Fleet, fleet_here, fleet_of_ray
from xtoken.pipeline.store.figures import bos_figure
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.teachers import check_backend, check_reach
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig, RunGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Progress


@dataclass(frozen=True)
class _Work:
    """Bytes of text of each shard that this run, or this cell of it, is to do, and which are committed."""

    sizes: dict[int, int]
    done: set[int]

    @property
    def text_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def left(self) -> int:
        """Bytes of text that are not committed."""
        return sum(size for index, size in self.sizes.items() if index not in self.done)


def dry_run(config: PrecomputeConfig, progress: Progress) -> dict[str, Any]:
    """Say what ``precompute`` with these settings would do, from a pilot that is really scored or another capture.

    Args:
        config: what would run. With ``--ray``, the cluster is asked for its machines, and where they have GPUs the
            pilot runs on one of them; else it runs on this machine. Without ``--out`` nothing is done yet.
        progress: shows bytes of text.

    Returns:
        Figures: shards, tokens, bytes on disk, hours, GPU hours and cost, of all workers that would run; with
        ``--pilot`` also bytes of each column and 95 % intervals, which end in ``low`` and ``high``.

    Raises:
        XtokenError: what would stop the run before its first shard: input, settings, folder, teacher or cluster; or
            ``like`` is not a capture.
    """
    if config.out:
        return _planned(config, progress)
    with tempfile.TemporaryDirectory(prefix="xtoken-dry-run-") as scratch:
        found = _planned(config.model_copy(update={"out": f"{scratch}/out"}), progress)
    return {name: value for name, value in found.items() if name != "disk_bytes_free"} | {
        "log": config.run.log or "none"
    }


def _planned(config: PrecomputeConfig, progress: Progress) -> dict[str, Any]:
    refuse_places(config)
    if config.chat.generate is not None:
        raise XtokenError(
            f"--dry-run scores a part of the corpus, and answers that the teacher has yet to write are not there (a "
            f"prompt takes at most {config.chat.samples} x --generate {config.chat.generate} tokens); run the same "
            "command with --limit 50 and another --out instead: it says tokens, bytes and hours, which grow with the "
            "number of prompts"
        )
    folder = Folder(config.out)
    if config.run.like is None:
        check_backend(config.teacher, config.codec)
        check_reach(config.teacher)
    reading = Reading.of(config) if config.run.like is None else None
    said = _check_settings(config, folder, reading) if reading is not None else {}
    if (plan := load_plan(folder)) is not None:
        settle_plan(folder, config.corpus, config.run.shard_bytes, progress)
        check_files(config.out, plan, config.corpus)
    fleet = fleet_of_ray(config.run, config.teacher) if config.run.ray is not None and config.run.like is None else None
    basis: Pilot | Likeness
    if config.run.like is None:
        basis = _pilot(config, fleet, progress, reading)
    else:
        basis = read_likeness(config.corpus, config.run.shard_bytes, config.run.like, progress)
    sizes = [shard.text_bytes for shard in plan.shards] if plan is not None else basis.pool.sizes
    which, count = config.run.cells
    mine = {index: size for index, size in enumerate(sizes) if index % count == which}
    work = _Work(mine, committed_indices(folder) & mine.keys())
    return {
        "dry_run": "nothing was written",
        "plan": "there" if plan is not None else "would be made",
        **basis.pool.listing.figures,
        **said,
        **((basis.chat or {}) if isinstance(basis, Pilot) else {}),
        "shards": len(work.sizes),
        "shards_done": len(work.done),
        "shards_left": len(work.sizes) - len(work.done),
        **_disk(folder, work, basis),
        **_speed(config.run, config.teacher, work, basis, fleet),
        **(basis.figures(work.text_bytes) if config.run.pilot else {}),
        "log": str(log_path(config.run, folder) or "none"),
    }


def _speed(
    run: RunGroup, teacher: TeacherGroup, work: _Work, basis: Pilot | Likeness, fleet: Fleet | None
) -> dict[str, Any]:
    if isinstance(basis, Likeness):
        return {**basis.time, "settings": basis.settings}
    return _time(run, teacher, work, basis, fleet or fleet_here(run, teacher, basis.device))


def _pilot(config: PrecomputeConfig, fleet: Fleet | None, progress: Progress, reading: Reading | None) -> Pilot:
    if fleet is not None and fleet.gpus and config.run.ray != "local":
        from xtoken.pipeline.capture.estimate.ray_pilot import take_pilot_on_ray

        return take_pilot_on_ray(config, config.run.pilot_tokens, fleet.gpus, progress)
    with tempfile.TemporaryDirectory(prefix="xtoken-dry-run-") as scratch:
        return take_pilot(config.model_copy(update={"out": scratch}), config.run.pilot_tokens, progress, reading)


def _check_settings(config: PrecomputeConfig, folder: Folder, reading: Reading) -> dict[str, str]:
    """Refuse what precompute refuses, without leaving the record of settings that it leaves; a word about BOS."""
    table, chat = reading.tokenizer.table, reading.chat
    student = load_tokenizer(config.student).table if config.student is not None else None
    settings = run_settings(config, table, student, chat.settings if chat is not None else None)
    check_settings(folder, settings, type(config))
    return bos_figure(table.info, shown=settings["bos"]) if chat is None else {}


def _disk(folder: Folder, work: _Work, basis: Pilot | Likeness) -> dict[str, Any]:
    per_byte = basis.tokens_per_byte.value
    sizes = {
        "documents": basis.pool.documents,
        "text_bytes": work.text_bytes,
        "tokens": round(work.text_bytes * per_byte),
        "tokens_left": round(work.left * per_byte),
        "bytes_per_token": round(basis.bytes_per_token, 3),
        "disk_bytes": round(work.text_bytes * per_byte * basis.bytes_per_token + basis.vocab),
        "disk_bytes_left": round(work.left * per_byte * basis.bytes_per_token),
    }
    return sizes | ({"disk_bytes_free": _free(Path(folder.at("")))} if folder.local else {})


def _free(path: Path) -> int:
    """Room on the disk that a folder is on, or would be."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _time(run: RunGroup, teacher: TeacherGroup, work: _Work, pilot: Pilot, fleet: Fleet) -> dict[str, Any]:
    """Hours of wall clock, GPUs and their cost; every worker has the pilot's speed."""
    figures: dict[str, Any] = {
        "workers": fleet.workers,
        "gpus": round(fleet.workers * fleet.gpus, 3),
        "rows_per_s_of_one": pilot.rate,
        **({"workers_that_add_speed": fleet.engines} if run.pilot else {}),
        "measured_on": pilot.device,
    }
    if fleet.gpus and pilot.device == "cpu" and teacher.takes_gpus:
        return figures | {
            "hours": "unknown: the pilot ran on a CPU and workers have GPUs; try on a machine that has one"
        }
    tokens = work.left * pilot.costs.tokens.value
    # no more workers than shards
    engines = fleet.engines * min(1.0, (len(work.sizes) - len(work.done)) / fleet.workers)
    hours = (pilot.start_up + tokens / (pilot.rate * engines)) / 3600 if engines else 0.0
    gpu_hours = hours * fleet.gpus * min(fleet.workers, len(work.sizes) - len(work.done))
    figures |= {"hours": round(hours, 4), "time": duration(hours * 3600), "gpu_hours": round(gpu_hours, 4)}
    if run.gpu_price is None:
        return figures
    return figures | {"cost": round(gpu_hours * run.gpu_price, 2)}
