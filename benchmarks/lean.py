"""What targets take on disk in version 6 of their schema and before, what rounding costs, and how fast both are read.

    python -m benchmarks.lean CAPTURE --student TOKENIZER              # writes results/lean.{json,md}

The same command aligns the capture in both versions. Loaders run in turn, each in a process of its own; times are CPU
time of that process, so a busy machine makes them worse, but for both alike. Nothing here is timed in tests.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader import in_process
from benchmarks.machine import machine, machine_line
from tests.in_process import InThisProcess
from xtoken.pipeline.align import form
from xtoken.pipeline.align.run import align
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.inspect import bytes_per_token
from xtoken.pipeline.store.reader import iter_targets
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.losses import LOSSES, GapColumns, gap_columns
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.tables import LEAN_TARGETS, targets
from xtoken.schemas.ui.progress import Silent

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = ["p-kl", "h-kl", "gold", "uld", "alm", "strict", "byte-prefix"]
SMALL = 0.05  # bytes per token of a column that has no line
UNMOVED = 1e-5  # nats: float32 rounding of a few
Figures = dict[str, Any]


def aligned(capture: str, student: str, out: str, version: int) -> TargetManifest:
    """Targets for all losses in a version of their schema."""
    config = AlignConfig(captures=[capture], student=student, out=out, losses=NAMES)
    with mock.patch.object(form, "WRITTEN", version):
        return align(config, Silent(), executor=InThisProcess())


def rounding(old: str, new: str) -> Figures:
    """KL(old || new) of each column in steps over its targets with entries, and the share that did not move."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for before, after in zip(iter_targets(old), iter_targets(new), strict=True):
        for gaps in gap_columns(NAMES):
            kl, moved = _kl(before, after, gaps)
            found.setdefault(gaps.logprob, []).append(np.stack([kl, moved]))
    figures = {}
    for name, parts in found.items():
        kl, moved = np.concatenate(parts, axis=1)
        summed = (kl.mean(), np.quantile(kl, 0.99), kl.max(), (moved <= UNMOVED).mean())
        figures[name] = dict(zip(("mean", "p99", "max", "unmoved"), map(float, summed), strict=True))
    return figures


def _kl(before: Any, after: Any, gaps: GapColumns) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """KL of each target with entries, both sides over what they add up to, and the most that an entry moved."""
    count = flat(before, gaps.count)
    owner = np.repeat(np.arange(len(count)), count)
    entries, tails = [], []
    for side in (before, after):
        entry = flat(side, gaps.logprob).astype(np.float64)
        tail = flat(side, gaps.tail).astype(np.float64) if gaps.tail else np.full(len(count), -np.inf)
        # a target without entries may have no tail mass either
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.log(np.bincount(owner, np.exp(entry), len(count)) + np.exp(tail))
            tails.append(tail - scale)
        entries.append(entry - scale[owner])
    kl = np.bincount(owner, np.exp(entries[0]) * (entries[0] - entries[1]), len(count))
    here = np.isfinite(tails[0]) & np.isfinite(tails[1])
    kl[here] += np.exp(tails[0][here]) * (tails[0][here] - tails[1][here])
    worst = np.zeros(len(count))
    np.maximum.at(worst, owner, abs(entries[0] - entries[1]))
    return kl[count > 0], worst[count > 0]


def by_loss(sizes: dict[int, dict[str, float]]) -> Figures:
    """Bytes per student token of targets for one loss: what all tables have and the loss's own columns."""
    return {
        loss: {version: sum(size[name] for name in targets([loss], version).names) for version, size in sizes.items()}
        for loss in NAMES
    }


def loaders(roots: dict[int, str], turns: int) -> Figures:
    """Tokens per CPU second of loaders for p-kl, in turn."""
    runs: dict[int, list[Figures]] = {version: [] for version in roots}
    for _ in range(turns):
        for version, root in roots.items():
            runs[version].append({**in_process("timed", root, 1, True), **in_process("stages", root)})
    return {
        version: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for version, found in runs.items()
    }


def measure(capture: str, student: str, turns: int, scratch: Path) -> Figures:
    """All figures."""
    roots = {version: str(scratch / f"v{version}") for version in (LEAN_TARGETS - 1, LEAN_TARGETS)}
    manifests = {version: aligned(capture, student, root, version) for version, root in roots.items()}
    sizes = {version: bytes_per_token(root, manifests[version]) for version, root in roots.items()}
    source = read_manifest(capture, CaptureManifest)
    theirs = bytes_per_token(capture, source)
    bare = sum(size for name, size in theirs.items() if name not in ("all", "text", "space_logprob"))
    tokens = sum(part.tokens for part in manifests[LEAN_TARGETS].parts)
    return {
        "machine": machine(),
        "teacher": Path(source.teacher.model).name,
        "student": Path(manifests[LEAN_TARGETS].student.name).name,
        "student_tokens": tokens,
        "teacher_tokens": sum(part.tokens for part in source.parts),
        "capture": {"all": theirs["all"], "without_text_and_space": bare},
        "columns": sizes,
        "by_loss": by_loss(sizes),
        "rounding": rounding(*roots.values()),
        "loader": loaders(roots, turns),
    }


def page(found: Figures) -> str:
    """The figures in Markdown."""
    old, new = found["columns"]
    share = found["student_tokens"] / found["teacher_tokens"]
    lines = [
        "# Targets on disk",
        "",
        f"`python -m benchmarks.lean CAPTURE --student TOKENIZER` on {machine_line()}. {found['teacher']}'s rows of "
        f"{found['teacher_tokens']:,} tokens for {found['student_tokens']:,} tokens of {found['student']}. Bytes per "
        f"student token ({share:.2f} per token of the teacher); the capture has {found['capture']['all']:.1f} per "
        f"token of its own, {found['capture']['without_text_and_space']:.1f} without text and `space_logprob`.",
        "",
        "| targets for | before | version 6 | of before | version 6, per teacher token |",
        "|---|---|---|---|---|",
        *(
            f"| {loss} | {one[old]:.1f} | {one[new]:.1f} | {one[new] / one[old]:.2f} | {one[new] * share:.1f} |"
            for loss, one in found["by_loss"].items()
        ),
        "",
        "| column (version 6) | before | version 6 |",
        "|---|---|---|",
        *_columns(found["columns"][old], found["columns"][new]),
        "",
        f"KL(before || version 6) in nats, of targets with entries; unmoved: no value by more than {UNMOVED:g}.",
        "",
        "| entries | mean | 99 % | largest | unmoved |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {one['mean']:.1e} | {one['p99']:.1e} | {one['max']:.1e} | {one['unmoved']:.1%} |"
            for name, one in found["rounding"].items()
        ),
        "",
        "The loader for p-kl, one thread, medians of processes in turn (`benchmarks/loader.py`); CPU microseconds:",
        "",
        "| targets | tokens per CPU second | read, per token | check | lay out | peak MiB |",
        "|---|---|---|---|---|---|",
        *(_loader_row("version 6" if at == new else "before", one) for at, one in found["loader"].items()),
    ]
    return "\n".join(lines) + "\n"


def _loader_row(name: str, one: Figures) -> str:
    stages = " | ".join(f"{one[stage]:.3f}" for stage in ("read", "check", "pack"))
    return f"| {name} | {one['tokens_per_cpu_s']:,.0f} | {stages} | {one['rss_mib']:.0f} |"


def _columns(old: dict[str, float], new: dict[str, float]) -> list[str]:
    pairs = zip(targets(NAMES, LEAN_TARGETS - 1).names, targets(NAMES, LEAN_TARGETS).names, strict=True)
    return [f"| {now} | {old[name]:.2f} | {new[now]:.2f} |" for name, now in pairs if old[name] >= SMALL]


def main() -> None:
    """Measure, write results, print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capture")
    parser.add_argument("--student", required=True)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    assert set(NAMES) <= LOSSES.keys()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments.capture, arguments.student, arguments.turns, Path(scratch))
    (RESULTS / "lean.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "lean.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
