"""Time and memory of ``align`` against the size of the corpus and the number of its shards, each run a process.

Time is that of the worker from its first 250,000 tokens to its last, so that what a process does once is left out (and
what fills the tokenizer's cache of words); memory is the worker's peak, which the system keeps. The corpus is a real
capture's samples over and over under new ids.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.align_corpus import build, head
from benchmarks.align_turns import Figures
from xtoken.pipeline.align import align
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest

ROOT = Path(__file__).resolve().parent.parent
SHARD_TOKENS = 1 << 16
WARM_TOKENS = 250_000
MEMORY_LIMIT = "512MB"
ALL_SIX = "p-kl,h-kl,gold,uld,alm,byte-prefix"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Watch:
    """A ``Progress`` that reads the worker's CPU time and peak memory from the system at each part."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def start(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        """Nothing to do."""

    def note(self, text: str) -> None: ...

    def advance(self, amount: int, **figures: float | str) -> None:  # noqa: ARG002
        """A part of so many tokens is committed."""
        workers = multiprocessing.active_children()
        assert len(workers) == 1, "one worker is measured"
        process = Path(f"/proc/{workers[0].pid}")
        times = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        self.cpu.append((int(times[11]) + int(times[12])) / _TICKS)
        self.wall.append(time.perf_counter())
        self.tokens.append(amount)
        status = (process / "status").read_text(encoding="utf-8").splitlines()
        self.peaks.append(next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:")))

    def finish(self) -> None:
        """Nothing to do."""

    def warm(self) -> int:
        """The part after which time counts; at least one is left, in corpora too small to mean anything."""
        done, part = 0, 0
        while part < len(self.tokens) - 2 and done + self.tokens[part] < WARM_TOKENS:
            done, part = done + self.tokens[part], part + 1
        return part


def run_here(capture: str, student: str, losses: str) -> Figures:
    """One ``align`` with one worker, which is a process of its own."""
    watch, began = Watch(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path(capture).parent) as out:
        config = AlignConfig(
            captures=[capture], student=student, out=out, losses=losses.split(","), memory_limit=MEMORY_LIMIT
        )
        align(config, watch)
        seconds = time.perf_counter() - began
    manifest = read_manifest(capture, CaptureManifest)
    warm = watch.warm()
    counted = sum(watch.tokens[warm + 1 :])
    return {
        "tokens": sum(watch.tokens),
        "shards": len(watch.tokens),
        "losses": losses,
        "megabytes": sum(part.file_bytes for part in manifest.parts) / 1e6,
        "cpu": (watch.cpu[-1] - watch.cpu[warm]) / counted * 1e6,
        "wall": (watch.wall[-1] - watch.wall[warm]) / counted * 1e6,
        "whole_run": seconds,
        "peak": watch.peaks[-1],
        "peak_of_first_part": watch.peaks[0],
        "cpu_of_parts": [round(after - before, 2) for before, after in pairwise(watch.cpu)],
    }


def fresh(capture: Path, student: str, losses: str) -> Figures:
    """``run_here`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.align_growth", str(capture), student, "--for", losses]
    found: Figures = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    return found


class Runs:
    """Runs on the first so many tokens of one large capture, which is built when it is first asked for; none twice."""

    def __init__(self, capture: str, student: str, folder: Path, most: int) -> None:
        self._capture, self._student, self._folder, self._most = capture, student, folder, most
        self._done: dict[tuple[int, str], Figures] = {}

    def first(self, tokens: int, losses: str = "p-kl") -> Figures:
        """Align the first so many tokens, in shards of equal size whatever the size."""
        whole, part = self._folder / "whole", self._folder / f"first-{tokens}"
        if not whole.exists():
            build(self._capture, whole, self._most, max(2, self._most // SHARD_TOKENS))
        if not part.exists():
            head(whole, part, tokens)
        if (tokens, losses) not in self._done:
            self._done[tokens, losses] = fresh(part, self._student, losses)
        return self._done[tokens, losses]

    def shards(self, tokens: int, shards: int) -> Figures:
        """Align so many tokens in so many shards."""
        out = self._folder / f"shards-{shards}"
        build(self._capture, out, tokens, shards)
        return fresh(out, self._student, "p-kl")


def scaling(runs: Runs, sizes: list[int]) -> Figures:
    """P-KL by size of the corpus, and a middle size in few shards and in many."""
    middle = sizes[len(sizes) // 2]
    return {
        "by_size": [runs.first(size) for size in sizes],
        "by_shards": [runs.shards(middle, shards) for shards in (8, 128)],
    }


def memory(runs: Runs, sizes: list[int], few: int) -> Figures:
    """Peaks by size under P-KL, and of all six losses at small sizes."""
    wanted = [*((size, "p-kl") for size in sizes), *((few * n, ALL_SIX) for n in (1, 2, 4))]
    return {"limit": MEMORY_LIMIT, "runs": [runs.first(size, losses) for size, losses in wanted]}


def report_scaling(found: Figures) -> list[str]:
    """Markdown."""
    lines = ["## Growth with the corpus, one worker, P-KL", ""]
    lines += ["Wanted: time per token within 10 % of its mean over the sizes.", "", *_head()]
    middle = sum(one["cpu"] for one in found["by_size"]) / len(found["by_size"])
    lines += [_row(one, f"{one['cpu'] / middle - 1:+.1%}") for one in found["by_size"]]
    lines += ["", "The same tokens in few shards and in many:", "", *_head()]
    first = found["by_shards"][0]["cpu"]
    return [*lines, *(_row(one, f"{one['cpu'] / first - 1:+.1%}") for one in found["by_shards"]), ""]


def report_memory(found: Figures) -> list[str]:
    """Markdown."""
    lines = [f"## Memory, one worker, --memory-limit {found['limit']}", ""]
    lines += ["Peak resident memory of the worker, Python and libraries in it; DuckDB has no place to spill to.", ""]
    return [*lines, *_head("losses"), *(_row(one, one["losses"]) for one in found["runs"]), ""]


def _head(last: str = "off") -> list[str]:
    names = ["tokens", "shards", "capture", "CPU us per token", "wall us per token", "whole run"]
    names += ["peak after the first part", "peak", last]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _row(one: Figures, last: str) -> str:
    cells = [f"{one['tokens']:,}", str(one["shards"]), f"{one['megabytes']:.0f} MB", f"{one['cpu']:.2f}"]
    cells += [f"{one['wall']:.2f}", f"{one['whole_run']:.1f} s"]
    cells += [*(f"{one[name] / 2**20:.0f} MiB" for name in ("peak_of_first_part", "peak")), last]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """One run, printed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture")
    parser.add_argument("student")
    parser.add_argument("--for", dest="losses", default="p-kl")
    options = parser.parse_args()
    print(json.dumps(run_here(options.capture, options.student, options.losses)))


if __name__ == "__main__":
    main()
