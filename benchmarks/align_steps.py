"""A part of targets from beginning to end beside what the student's tokenizer alone takes, and where the time goes.

In a process of its own for each way of running: one thread (TOKENIZERS_PARALLELISM=false), or as libraries choose.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.align_clock import STEPS, TOKENIZE, Clock
from benchmarks.align_turns import Figures, in_turn
from xtoken.pipeline.align.stage import AlignJob, AlignWorker, phi_of
from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {
    "p-kl": ["p-kl"],
    "h-kl": ["h-kl"],
    "byte-prefix": ["byte-prefix"],
    "all six": ["p-kl", "h-kl", "gold", "uld", "alm", "byte-prefix"],
}
BARE, OFFSETS, ENCODE = "tokenizers, ids only", "tokenizers, ids and offsets", "our encode: ids and checked byte ends"
BOTH = "tokenizers, ids only, student's and teacher's"
ALIGN = "align"
Texts = list[tuple[list[str], list[bool]]]


def open_worker(capture: str, student: str, losses: list[str], projection: Projection) -> AlignWorker:
    """A worker as the executor opens it, in this process."""
    manifest = read_manifest(capture, CaptureManifest)
    config = AlignConfig(captures=[capture], student=student, out="unused", losses=losses, memory_limit="512MB")
    phi_B = phi_of(losses, load_vocab(capture), load_tokenizer(student))
    return AlignJob(config, capture, "", projection, manifest.codec, phi_B).open()


def align_all(worker: AlignWorker, parts: list[int], folder: Path) -> int:
    """Build every part into a fresh folder; chunks made."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        here = replace(worker, job=replace(worker.job, out=out))
        return sum(here.run(part, 1).rows for part in parts)


def bare_both(student: Any, teacher: Any, texts: Texts) -> int:
    """Tokens of both sides (see ``bare``)."""
    return bare(student, texts) + bare(teacher, texts)


def bare(backend: Any, texts: Texts) -> int:
    """Tokens as the library alone gives them, batch by batch."""
    found = 0
    for batch, _ in texts:
        found += sum(len(one.ids) for one in backend.encode_batch_fast(batch, add_special_tokens=False))
    return found


def offsets(backend: Any, texts: Texts) -> int:
    """Tokens and the characters that each spans: what aligning on character offsets would read (see ``bare``)."""
    found = 0
    for batch, _ in texts:
        found += sum(len(one.ids) for one in backend.encode_batch(batch, add_special_tokens=False) if one.offsets)
    return found


def encode(tokenizer: Any, texts: Texts) -> int:
    """Tokens and byte ends as the stage takes them."""
    return sum(
        len(one.ids) for batch, completes in texts for one in tokenizer.encode_batch(batch, completes, keep_text=True)
    )


def texts_of(capture: str) -> Texts:
    """Texts of the capture in the stage's batches."""
    return [
        (batch["text"].to_pylist(), batch["complete"].to_pylist())
        for batch in iter_capture(capture, ["text", "complete"])
    ]


def measure_here(capture: str, student: str, turns: int, *, steps: bool) -> Figures:
    """All losses and both ways of tokenizing, in this process."""
    manifest, texts = read_manifest(capture, CaptureManifest), texts_of(capture)
    tokens, parts = sum(part.tokens for part in manifest.parts), [part.index for part in manifest.parts]
    w = build_w(load_tokenizer(student).table, load_vocab(capture))
    workers = {name: open_worker(capture, student, losses, w) for name, losses in LOSSES.items()}
    tokenizer: Any = workers["p-kl"].tokenizer
    library = tokenizer._backend
    # the folder that the capture was made with
    teacher: Any = load_tokenizer(manifest.teacher.model)
    works = {BARE: partial(bare, library, texts), BOTH: partial(bare_both, library, teacher._backend, texts)}
    works[OFFSETS] = partial(offsets, library, texts)
    works[ENCODE] = partial(encode, tokenizer, texts)
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            works[f"{ALIGN} {name}"] = partial(align_all, worker, parts, Path(folder))
        found, results = in_turn(works, tokens, turns)
        clocked = workers if steps else {}
        by_name = {name: by_step(worker, parts, Path(folder), tokens) for name, worker in clocked.items()}
    figures = {"tokens": tokens, "parts": len(parts), "student_tokens": results[BARE], "microseconds": found}
    return {**figures, "steps": by_name}


class Backend:
    """The library's tokenizer, its time counted as a step."""

    def __init__(self, backend: Any, clock: Clock) -> None:
        self._backend = backend
        self.encode_batch_fast = clock.timed(backend.encode_batch_fast, TOKENIZE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def by_step(worker: AlignWorker, parts: list[int], folder: Path, tokens: int) -> Figures:
    """Microseconds of CPU per teacher token of every step, of the lesser of two passes; and names not found."""
    passes: list[dict[str, float]] = []
    for _ in range(2):
        clock, tokenizer = Clock(), worker.tokenizer
        backend = vars(tokenizer)["_backend"]
        vars(tokenizer)["_backend"] = Backend(backend, clock)
        try:
            with clock.over(STEPS) as missing:
                align_all(worker, parts, folder)
        finally:
            vars(tokenizer)["_backend"] = backend
        passes.append({name: seconds / tokens * 1e6 for name, seconds in clock.seconds.items()})
    return {"microseconds": min(passes, key=lambda one: sum(one.values())), "missing": missing}


def fresh(capture: str, student: str, turns: int, *, one_thread: bool) -> Figures:
    """``measure_here`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.align_steps", capture, student, "--turns", str(turns)]
    parallel = {"TOKENIZERS_PARALLELISM": "false" if one_thread else "true"}
    command += ["--one-thread"] if one_thread else []
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env={**os.environ, **parallel})
    found: Figures = json.loads(done.stdout)
    return found


def measure(capture: str, student: str, turns: int) -> Figures:
    """Both ways of running."""
    return {
        "one thread": fresh(capture, student, turns, one_thread=True),
        "threads as libraries choose": fresh(capture, student, turns, one_thread=False),
    }


def report(found: Figures) -> list[str]:
    """Markdown."""
    lines = ["## From capture to targets, beside the student's tokenizer", ""]
    for name, one in found.items():
        us = one["microseconds"]
        lines += [f"{one['tokens']:,} teacher tokens, {one['student_tokens']:,} student tokens, {one['parts']} parts,"]
        lines += [f"{name}; microseconds per teacher token. Targets built, written, checked and published.", ""]
        lines += ["| | CPU | wall clock | CPU, of the student's ids | of both sides' ids | of ids and offsets |"]
        lines += ["|---" * 6 + "|"]
        for work, took in us.items():
            ratios = [took["cpu"] / us[name]["cpu"] for name in (BARE, BOTH, OFFSETS)]
            cells = " | ".join(f"{value:.2f}" for value in (took["cpu"], took["wall"], *ratios))
            lines.append(f"| {work} | {cells} |")
        lines += [""]
    return [*lines, *step_lines(found["one thread"]["steps"])]


def step_lines(steps: Figures) -> list[str]:
    """A row for each step, a column for each choice of losses."""
    found = {losses: one["microseconds"] for losses, one in steps.items()}
    names = sorted({name for one in found.values() for name in one}, key=lambda name: -found["all six"].get(name, 0.0))
    lines = ["Where it goes, one thread, CPU microseconds per teacher token:", ""]
    lines += [f"| step | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        cells = " | ".join(f"{one[name]:.3f}" if name in one else "" for one in found.values())
        lines.append(f"| {name} | {cells} |")
    sums = " | ".join(f"{sum(one.values()):.3f}" for one in found.values())
    lines += [f"| sum | {sums} |", ""]
    missing = sorted({name for one in steps.values() for name in one["missing"]})
    return [*lines, f"No clock for {', '.join(missing)}: not in the product.", ""] if missing else lines


def main() -> None:
    """Measure in this process and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capture")
    parser.add_argument("student")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one-thread", action="store_true")
    options = parser.parse_args()
    if options.one_thread:
        pa.set_cpu_count(1)
        pa.set_io_thread_count(1)
    print(json.dumps(measure_here(options.capture, options.student, options.turns, steps=options.one_thread)))


if __name__ == "__main__":
    main()
