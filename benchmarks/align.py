"""The alignment stage: its loops against plain Python and SQL, how it reads, where its time goes, how it grows.

    python -m benchmarks.align CAPTURE --student TOKENIZER [--tokens 1000000] [--only cut,steps]

``CAPTURE`` is a finished capture of real text; larger ones are made of its samples under new ids. Writes
results/align.json, where parts that were not measured now stay as they were, and results/align.md from it. CPU time is
of the whole process, user and system, all threads; comparisons are measured in turn in one process. Nothing here is
timed in tests.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from benchmarks import align_cut, align_growth, align_project, align_read, align_steps, align_udf
from benchmarks.align_corpus import build
from benchmarks.align_turns import Figures
from benchmarks.machine import machine, machine_line
from xtoken.pipeline.align import align
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_PART = align_read.DEFAULT_PART


@dataclass(frozen=True)
class Setting:
    """What is measured: ``tokens`` of a comparison, ``millions`` of the largest corpus, ``turns`` of each."""

    capture: str
    student: str
    tokens: int
    millions: float
    turns: int
    folder: Path

    @cached_property
    def runs(self) -> align_growth.Runs:
        """Shared by all that need large corpora."""
        return align_growth.Runs(self.capture, self.student, self.folder, self._scaled(10))

    def cut(self) -> Figures:
        """Both sides' ends of a real align."""
        targets, url = str(self.folder / "targets"), str(self.folder / "ends.parquet")
        align(AlignConfig(captures=[self.capture], student=self.student, out=targets, losses=["ce"]), Silent())
        tokens = align_cut.ends_file(self.capture, targets, url, self.tokens)
        return align_cut.measure(url, tokens, self.turns)

    def project(self) -> Figures:
        """A million entries, in rows of the first samples."""
        return align_project.measure(self.capture, self.student, self.tokens // 25, max(2, self.turns - 2))

    def read(self) -> Figures:
        """Parts of two sizes; and who calls the kernel."""
        sizes = align_read.measure(self.capture, self.folder, self.tokens, self.turns)
        out = self.folder / "udf"
        build(self.capture, out, self.tokens, max(1, round(self.tokens / DEFAULT_PART)))
        return {"sizes": sizes, "function": align_udf.measure(str(out), self.student, self.turns)}

    def steps(self) -> Figures:
        """The samples of the capture, once, in parts of the size that ``precompute`` makes if nothing else is said."""
        tokens, out = size_of(self.capture), self.folder / "steps"
        build(self.capture, out, tokens, max(1, round(tokens / DEFAULT_PART)))
        return align_steps.measure(str(out), self.student, max(2, self.turns - 2))

    def scaling(self) -> Figures:
        """Half a million tokens to eight."""
        return align_growth.scaling(self.runs, [self._scaled(millions) for millions in (0.5, 1, 2, 4, 8)])

    def memory(self) -> Figures:
        """One million tokens to ten."""
        return align_growth.memory(self.runs, [self._scaled(millions) for millions in (1, 4, 10)], self._scaled(0.5))

    def _scaled(self, millions: float) -> int:
        return round(millions * self.millions / 10 * 1e6)


MEASURES: dict[str, Callable[[Setting], Figures]] = {
    "cut": Setting.cut,
    "project": Setting.project,
    "read": Setting.read,
    "steps": Setting.steps,
    "scaling": Setting.scaling,
    "memory": Setting.memory,
}


def report_read(found: Figures) -> list[str]:
    """Markdown."""
    return [*align_read.report(found["sizes"]), *align_udf.report(found["function"])]


REPORTS: dict[str, Callable[[Figures], list[str]]] = {
    "cut": align_cut.report,
    "project": align_project.report,
    "read": report_read,
    "steps": align_steps.report,
    "scaling": align_growth.report_scaling,
    "memory": align_growth.report_memory,
}


def markdown(everything: Figures) -> str:
    """The whole report."""
    lines = ["# The alignment stage", ""]
    for name, report in REPORTS.items():
        if name in everything:
            part = everything[name]
            lines += report(part["found"])
            lines += [f"Measured in {part['seconds']:.0f} s on {part['where']}; {part['capture']}.", ""]
    return "\n".join([*lines, "Made by `python -m benchmarks.align`.", ""])


def size_of(capture: str) -> int:
    """Teacher tokens."""
    return sum(part.tokens for part in read_manifest(capture, CaptureManifest).parts)


def described(capture: str, student: str) -> str:
    """Teacher, student and size, without where they lie."""
    manifest = read_manifest(capture, CaptureManifest)
    tokens, codec = size_of(capture), manifest.codec
    teacher = f"{Path(manifest.teacher.model).name}, k {codec.k}, min_p {codec.min_p}"
    return f"teacher {teacher}, {tokens:,} tokens of real text; student's tokenizer {Path(student).name}"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture")
    parser.add_argument("--student", required=True, help="tokenizer of the student")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="size of the comparisons (cut, project, read)")
    parser.add_argument("--millions", type=float, default=10.0, help="tokens of the largest corpus (scaling, memory)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default=",".join(MEASURES), help="parts to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write json and Markdown."""
    asked = options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    asked.out.mkdir(exist_ok=True)
    file = asked.out / "align.json"
    everything: Figures = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(asked.capture, asked.student, asked.tokens, asked.millions, asked.turns, Path(folder))
        for name in asked.only.split(","):
            began = time.perf_counter()
            found = MEASURES[name](setting)
            took = time.perf_counter() - began
            where = {"where": machine_line(), "machine": machine(), "capture": described(asked.capture, asked.student)}
            everything[name] = {"found": found, "seconds": took, **where}
            print("\n".join(REPORTS[name](found)))
            file.write_text(json.dumps(everything, indent=1) + "\n")
    (asked.out / "align.md").write_text(markdown(everything))


if __name__ == "__main__":
    main()
