"""What the trainer's data side costs: CPU and wall time per student token from stored targets to micro-batches.

    xtoken align CAPTURE --student TOKENIZER --for p-kl --entries 32 --out TARGETS
    python -m benchmarks.loader TARGETS                                # writes results/loader.{json,md}

Times are of a loader that has turned over its windows twice (until then the process's memory grows, and the kernel
takes time for each new page), in a process of its own, median of some. CPU time is of the whole process, user and
system, all threads; nothing trains meanwhile. Nothing here is timed in tests.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_inputs import filled, grown
from benchmarks.machine import machine, machine_line
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import split_micros
from xtoken.trainer.data.packing import Shape, packed_shapes, padded_shapes
from xtoken.trainer.data.samples import read_samples
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.ragged import Columns, running

RESULTS = Path(__file__).resolve().parent / "results"
K, MAX_TOKENS, STEP_TOKENS, MICRO_TOKENS = 32, 1024, 32_768, 8_192
WARM_TOKENS, TIMED_TOKENS, PASSES = 1_500_000, 1_500_000, 3
GROUPS = 40
SKEWED = ((16_384, 2_048), (32_768, 8_192), (262_144, 16_384))
Figures = dict[str, Any]


class PklColumns(Loss):
    """Asks for the columns of p-kl; nothing is trained here."""

    columns = Columns.of("p-kl")

    def terms(self, view: View) -> Any:
        """Never asked for."""
        raise NotImplementedError


def opened(root: str) -> tuple[Sources, Layout]:
    """A folder and how its samples are laid out."""
    targets = Targets(root)
    return Sources([targets]), Layout(0, MAX_TOKENS, targets.manifest.student.size, (PklColumns(),))


def timed(root: str, threads: int, packing: bool) -> Figures:
    """One loader, warmed up and then asked for steps as fast as it gives them."""
    sources, layout = opened(root)
    before = _peak_mib()
    options = {"step_tokens": STEP_TOKENS, "micro_tokens": MICRO_TOKENS, "seed": 1}
    with Loader(sources, layout, packing=packing, threads=threads, **options) as loader:
        warm = 0
        while warm < WARM_TOKENS:
            warm += loader.step().tokens
        tokens = inputs = padded = entries = 0
        cpu, wall = time.process_time(), time.perf_counter()
        while tokens < TIMED_TOKENS:
            batch = loader.step()
            tokens, inputs, padded = tokens + batch.tokens, inputs + batch.predicted, padded + batch.padded
            entries += sum(len(micro.targets[0].columns["pkl_ids"]) for micro in batch.micros)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "tokens_per_cpu_s": tokens / cpu,
        "tokens_per_s": tokens / wall,
        "entries_per_token": entries / tokens,
        "waste": 1 - inputs / padded,
        "rss_before_mib": before,
        "rss_mib": _peak_mib(),
    }


def stages(root: str) -> Figures:
    """CPU microseconds per token of reading, checking and laying out, one after the other in one thread."""
    sources, layout = opened(root)
    micros: dict[str, list[float]] = {name: [] for name in ("read", "check", "pack", "pad")}
    for _ in range(PASSES + 1):
        spent, tokens = dict.fromkeys(micros, 0.0), 0
        for unit in sources.groups[:GROUPS]:
            stored, spent["read"] = _clock(lambda unit=unit: list(sources.read(unit, layout)), spent["read"])
            samples, spent["check"] = _clock(lambda stored=stored: read_samples(stored, layout), spent["check"])
            for name, pack in (("pack", MAX_TOKENS), ("pad", None)):
                _, spent[name] = _clock(
                    lambda samples=samples, pack=pack: split_micros(samples, MICRO_TOKENS, layout.losses, pack),
                    spent[name],
                )
            tokens += sum(sample.inputs for sample in samples)
        for name, seconds in spent.items():
            micros[name].append(seconds / tokens * 1e6)
    return {name: statistics.median(values[1:]) for name, values in micros.items()}


def _clock(work: Callable[[], Any], before: float) -> tuple[Any, float]:
    began = time.process_time()
    result = work()
    return result, before + time.process_time() - began


def _peak_mib() -> float:
    """Of this program; getrusage would count the parent's up to exec."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def in_process(call: str, *arguments: Any) -> Figures:
    """The same in a process of its own; the median of each figure over some."""
    command = [sys.executable, "-m", "benchmarks.loader", "--call", json.dumps([call, *arguments])]
    passes = PASSES if call == "timed" else 1
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(passes)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def skewed_waste(step_tokens: int, micro_tokens: int) -> Figures:
    """Share of filling over 16 steps of log-normal lengths, 8 to 1024."""
    lengths = np.clip(np.random.default_rng(1).lognormal(4.6, 1.0, 40_000), 8, MAX_TOKENS).astype(int)
    ends = np.searchsorted(running(lengths), np.arange(0, 17) * step_tokens).tolist()
    steps = [lengths[low:high].tolist() for low, high in pairwise(ends)]
    packed = [packed_shapes(sizes, micro_tokens, MAX_TOKENS) for sizes in steps]
    padded = [padded_shapes(sizes, micro_tokens) for sizes in steps]
    return {
        "step_tokens": step_tokens,
        "micro_tokens": micro_tokens,
        "pack": 1 - sum(map(sum, steps)) / sum(map(_inputs, packed)),
        "pad": 1 - sum(map(sum, steps)) / sum(map(_inputs, padded)),
    }


def _inputs(shapes: list[Shape]) -> int:
    return sum(len(shape.rows) * shape.width for shape in shapes)


def measure(root: Path, scratch: Path) -> Figures:
    """All figures."""
    full = filled(root, scratch / "filled", K)
    four = grown(full, scratch / "four", 4)
    cases = [(name, str(at), threads, packing) for name, at, threads, packing in _cases(root, full, four)]
    runs = []
    for name, at, threads, packing in cases:
        runs.append({"targets": name, "threads": threads, "batching": "pack" if packing else "pad"})
        runs[-1] |= in_process("timed", at, threads, packing)
        print(runs[-1], flush=True)
    return {
        "machine": machine(),
        "settings": {"max_tokens": MAX_TOKENS, "step_tokens": STEP_TOKENS, "micro_tokens": MICRO_TOKENS},
        "samples": Targets(str(root)).samples,
        "runs": runs,
        "stages": {"as aligned": in_process("stages", str(root)), "filled": in_process("stages", str(full))},
        "skewed": [skewed_waste(*sizes) for sizes in SKEWED],
    }


def _cases(root: Path, full: Path, four: Path) -> list[tuple[str, Path, int, bool]]:
    filled_cases = [("filled", full, threads, packing) for threads in (1, 2) for packing in (True, False)]
    return [*filled_cases, ("filled, 4 times", four, 1, True), ("as aligned", root, 1, True)]


def page(found: Figures) -> str:
    """The figures in Markdown."""
    lines = [
        "# The loader",
        "",
        f"`python -m benchmarks.loader TARGETS` on {machine_line()}. P-KL columns of targets aligned with "
        f"`--entries {K}` ({found['samples']:,} samples); `filled`: every chunk with entries has {K}, made from the "
        f"same. Steps of {STEP_TOKENS:,} tokens, passes of {MICRO_TOKENS:,}, medians of {PASSES} processes. CPU time: "
        "user and system, all threads.",
        "",
        "| targets | entries per token | threads | batching | tokens per CPU second | tokens per second | filling | "
        "peak MiB (before) |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {run['targets']} | {run['entries_per_token']:.1f} | {run['threads']} | {run['batching']} | "
            f"{run['tokens_per_cpu_s']:,.0f} | {run['tokens_per_s']:,.0f} | {run['waste']:.2%} | "
            f"{run['rss_mib']:.0f} ({run['rss_before_mib']:.0f}) |"
            for run in found["runs"]
        ),
        "",
        "CPU microseconds per token by stage, one thread, row group by row group:",
        "",
        "| targets | read | check | lay out, pack | lay out, pad |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {one['read']:.3f} | {one['check']:.3f} | {one['pack']:.3f} | {one['pad']:.3f} |"
            for name, one in found["stages"].items()
        ),
        "",
        "Filling of log-normal lengths from 8 to 1024 (mu 4.6, sigma 1), 16 steps:",
        "",
        "| tokens of a step | inputs of a pass | pack | pad, sorted by length |",
        "|---|---|---|---|",
        *(
            f"| {one['step_tokens']:,} | {one['micro_tokens']:,} | {one['pack']:.2%} | {one['pad']:.2%} |"
            for one in found["skewed"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write results, print the page; or, in a process of its own, one figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="?", type=Path)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        name, *values = json.loads(arguments.call)
        print(json.dumps({"timed": timed, "stages": stages}[name](*values)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.targets.parent) as scratch:
        found = measure(arguments.targets, Path(scratch))
    (RESULTS / "loader.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "loader.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
