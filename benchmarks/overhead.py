"""What the Python side of a capture costs beside the engine: CPU time per teacher token, by stage, and its growth.

    python -m benchmarks.corpus corpus.jsonl --scale 9
    python -m benchmarks.rows few.jsonl .cache/models/gemma-3-270m gemma.npz      # and smollm2-135m: rows to hand out
    python -m benchmarks.overhead corpus.jsonl gemma.npz smollm2.npz              # writes results/overhead.{json,md}

The engine answers at once, with a block of rows that a real model gave; everything else is what ``xtoken precompute``
does in a worker: read, tokenize and cut into windows, pack, write Parquet, read back and check, sha256, commit. CPU
time is of the whole process, user and system, all threads. Nothing here is timed in tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine, machine_line
from xtoken.pipeline.capture.plan import Plan, SliceReader, make_plan
from xtoken.pipeline.capture.run_identity import codec_info
from xtoken.pipeline.capture.token_codes import corpus_codes
from xtoken.pipeline.capture.worker import CaptureWorker, sample_batches
from xtoken.pipeline.corpus import Window, all_windows
from xtoken.pipeline.executors.protocol import Lease, Message
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import Packed, encode
from xtoken.pipeline.store.codes import Codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.writer import Sample, group_rows, write_parquet
from xtoken.pipeline.teachers.base import Batch, TeacherRows, stream_batches
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import Part, TeacherInfo
from xtoken.schemas.ui.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"gemma": "gemma-3-270m", "smollm2": "smollm2-135m"}
SETTINGS = ((32, 512), (32, 2048), (64, 512))  # K, tokens of a window
SIZES = (10_000, 100_000, 1_000_000, 3_000_000)  # tokens
BLOCK, MIN_P, BATCH_TOKENS = 30_000, 0.003, 16_384
# Shards small enough that the middle size fills several: memory must not depend on how many there are.
GROWTH_SHARD = 1 << 17
TARGET = 150_000
PASSES = 3
Figures = dict[str, Any]
T = TypeVar("T")


class InstantTeacher:
    """A ``Teacher`` that hands out stretches of a block of recorded rows, whatever it is asked about."""

    def __init__(self, path: Path, k: int) -> None:
        found = np.load(path)
        ids, logprob = (np.ascontiguousarray(found[name][:BLOCK, :k]) for name in ("ids", "logprob"))
        single = (found[name][:BLOCK].copy() for name in ("target_logprob", "space_logprob"))
        self._block = (ids, logprob, *single)
        self._rank = np.ones(len(ids), np.int32)
        self._at = 0
        self.name, self.k = path.stem, k
        self.settings: dict[str, str | int | float | bool] = {}
        self.info = TeacherInfo(
            model=path.stem,
            backend="instant",
            vocab_rows=int(ids.max()) + 1,
            context=1 << 20,
            dtype="float32",
            head_dtype="float32",
            device="none",
            capture_path="recorded",
            engine_version="none",
        )

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Views of the block: no arithmetic, no copies."""
        return [self._next(len(ids) - 1) for ids in batch]

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """See ``Teacher``."""
        return stream_batches(self, batches)

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> None:  # noqa: ARG002
        """There is none."""
        return

    def _next(self, rows: int) -> TeacherRows:
        self._at = self._at if self._at + rows <= len(self._rank) else 0
        cut = slice(self._at, self._at + rows)
        self._at += rows
        ids, logprob, target, space = (array[cut] for array in self._block)
        return TeacherRows(ids, logprob, target, self._rank[cut], space_logprob=space)


Loaded = tuple[TextTokenizer, InstantTeacher]


def model_of(name: str) -> Path:
    """Folder of the model whose rows ``NAME.npz`` holds."""
    return ROOT / ".cache" / "models" / MODELS[name]


def load(rows: Path, k: int) -> Loaded:
    """Tokenizer and engine, as a worker has them open."""
    return load_tokenizer(str(model_of(rows.stem))), InstantTeacher(rows, k)


@dataclass
class Capture:
    """A planned capture of one corpus, without its driver."""

    config: PrecomputeConfig
    tokenizer: TextTokenizer
    teacher: InstantTeacher
    plan: Plan
    codes: Codes

    @classmethod
    def of(cls, corpus: Path, loaded: Loaded, out: Path, max_tokens: int, shard_bytes: int = 1 << 20) -> "Capture":
        """Plan it as ``precompute`` does."""
        tokenizer, teacher = loaded
        config = PrecomputeConfig.from_flat(
            corpus=str(corpus),
            id_field="id",
            teacher=str(model_of(teacher.name)),
            out=str(out),
            k=teacher.k,
            min_p=MIN_P,
            max_tokens=max_tokens,
            batch_tokens=BATCH_TOKENS,
        )
        plan = make_plan(config.corpus, shard_bytes, Silent())
        Folder(config.out).make("")
        return cls(config, tokenizer, teacher, plan, corpus_codes(config.corpus, plan, tokenizer))

    def worker(self) -> CaptureWorker:
        """A worker in this process, its engine the instant one."""
        return CaptureWorker(self.config, self.plan, self.tokenizer, self.teacher, None, self.codes)

    def run(self) -> list[Part]:
        """Have a worker do all shards."""
        return drive(self.worker(), len(self.plan.shards))


def drive(worker: CaptureWorker, shards: int) -> list[Part]:
    """Have a worker do all shards; the one place that knows how a worker is driven."""
    parts: list[Part] = []

    def send(message: Message) -> None:
        if message.error is not None:
            raise XtokenError(f"shard {message.shard}: {message.error}")
        if message.part is not None:
            parts.append(message.part)

    worker.serve((Lease(shard) for shard in range(shards)), send)
    assert len(parts) == shards, "a shard got lost"
    return parts


@dataclass
class Stages:
    """CPU seconds by stage, one shard after the other, nothing overlapped."""

    capture: Capture
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def run(self) -> Figures:
        """Microseconds per token of every stage."""
        worker, reader = self.capture.worker(), SliceReader(self.capture.config.corpus, self.capture.plan)
        for shard in self.capture.plan.shards:
            documents = self._lap("read", partial(reader.read, shard))
            pieces = self._lap("tokenize, cut", partial(self._windows, documents))
            prompts = [self._prompt(worker, piece) for piece in pieces]
            rows = self.capture.teacher.rows(prompts)
            self._lap("pack", partial(self._encode, rows))
            samples = [worker.sample(piece, one) for piece, one in zip(pieces, rows, strict=True)]
            self._store(samples)
            self.tokens += sum(len(piece.encoded.ids) for piece in pieces)
        return {name: seconds / self.tokens * 1e6 for name, seconds in self.seconds.items()}

    def _lap(self, name: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        found = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return found

    def _windows(self, documents: Any) -> list[Window]:
        return all_windows(documents, self.capture.tokenizer, self.capture.config.codec.max_tokens)

    def _prompt(self, worker: CaptureWorker, piece: Window) -> NDArray[np.int32]:
        return np.concatenate([worker.context, piece.encoded.ids])

    def _encode(self, rows: Sequence[TeacherRows]) -> list[Packed]:
        codec, size = self.capture.config.codec, self.capture.tokenizer.table.size
        return [encode(one, k=codec.k, min_p=codec.min_p, vocab_size=size) for one in rows]

    def _store(self, samples: list[Sample]) -> None:
        codec, name, folder = codec_info(self.capture.config.codec), "stage.parquet", Folder(str(self.folder))
        schema, url = open_codec(codec).schema(), folder.url(name)
        batches = self._lap("columns", lambda: list(sample_batches(samples, schema, self.capture.codes)))
        self._lap("write", lambda: write_parquet(url, schema, batches, group_rows(len(samples))))
        check = CaptureCheck(self.capture.tokenizer.table.size, codec)
        self._lap("read back, check", lambda: check(url))
        self._lap("sha256", lambda: folder.sha256(name))


def one_setting(corpus: Path, loaded: Loaded, max_tokens: int) -> Figures:
    """Median CPU time of the worker over all shards, and of each stage alone."""
    totals, stages, walls = [], [], []
    for _ in range(PASSES):
        with tempfile.TemporaryDirectory() as work:
            taken = Capture.of(corpus, loaded, Path(work) / "out", max_tokens)
            cpu, wall = time.process_time(), time.perf_counter()
            parts = taken.run()
            totals.append(time.process_time() - cpu)
            walls.append(time.perf_counter() - wall)
            stages.append(Stages(taken, Path(work)).run())
    tokens = sum(part.tokens for part in parts)
    return {
        "k": loaded[1].k,
        "max_tokens": max_tokens,
        "tokens": tokens,
        "samples": sum(part.samples for part in parts),
        "entries": sum(part.entries for part in parts) / sum(part.rows for part in parts),
        "bytes": sum(part.file_bytes for part in parts) / tokens,
        "per_cpu_second": tokens / statistics.median(totals),
        "best_per_cpu_second": tokens / min(totals),
        "per_second": tokens / statistics.median(walls),
        "microseconds": {name: statistics.median(one[name] for one in stages) for name in stages[0]},
    }


def speeds(corpus: Path, rows: Path) -> Figures:
    """All settings of one teacher."""
    warm_up(corpus, load(rows, SETTINGS[0][0]))
    found = [one_setting(corpus, load(rows, k), max_tokens) for k, max_tokens in SETTINGS]
    return {"teacher": MODELS[rows.stem], "settings": found}


def warm_up(corpus: Path, loaded: Loaded) -> None:
    """Capture a little: what a process does once, such as importing, is no cost per token."""
    with tempfile.TemporaryDirectory() as work:
        small = Path(work) / "small.jsonl"
        corpus_of(corpus, small, loaded[0], 2_000)
        Capture.of(small, loaded, Path(work) / "out", SETTINGS[0][1]).run()


def corpus_of(source: Path, out: Path, tokenizer: TextTokenizer, tokens: int) -> int:
    """Write a corpus of about so many tokens: the source's documents, over and over under new ids; its tokens."""
    documents = [json.loads(line)["text"][:20_000] for line in source.read_text(encoding="utf-8").splitlines()]
    lengths = [len(one.ids) for one in tokenizer.encode_batch(documents, [True] * len(documents))]
    written = number = 0
    with out.open("w", encoding="utf-8") as file:
        while written < tokens:
            at = number % len(documents)
            share = min(1.0, (tokens - written) / lengths[at])
            text = documents[at][: max(1, int(share * len(documents[at])))]
            file.write(json.dumps({"id": f"d{number}", "text": text}, ensure_ascii=False) + "\n")
            written, number = written + max(1, int(share * lengths[at])), number + 1
    return written


def growth(source: Path, rows: Path, tokens: int) -> Figures:
    """CPU time of plan, codes and worker on a corpus of so many tokens, and how far memory grows; in this process."""
    k, max_tokens = SETTINGS[0]
    loaded = load(rows, k)
    warm_up(source, loaded)
    with tempfile.TemporaryDirectory() as work:
        corpus = Path(work) / "corpus.jsonl"
        corpus_of(source, corpus, loaded[0], tokens)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
        began = time.process_time()
        taken = Capture.of(corpus, loaded, Path(work) / "out", max_tokens, GROWTH_SHARD)
        planned = time.process_time()
        parts = taken.run()
        done = time.process_time()
    return {
        "tokens": sum(part.tokens for part in parts),
        "shards": len(parts),
        "plan_seconds": planned - began,
        "worker_seconds": done - planned,
        "start": before,
        "peak": _status("VmHWM"),
    }


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def fresh(source: Path, rows: Path, tokens: int) -> Figures:
    """``growth`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead", str(source), str(rows), "--growth", str(tokens)]
    found: Figures = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    return found


def table(found: Figures) -> list[str]:
    """A teacher's figures in Markdown."""
    lines = [
        f"## {found['teacher']}",
        "",
        "| K | window | tokens | entries | bytes per token | tokens per CPU second |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for one in found["settings"]:
        lines.append(
            f"| {one['k']} | {one['max_tokens']} | {one['tokens']:,} | {one['entries']:.1f} | {one['bytes']:.1f} "
            f"| **{one['per_cpu_second']:,.0f}** (best {one['best_per_cpu_second']:,.0f}) |"
        )
    names = list(found["settings"][0]["microseconds"])
    lines += ["", f"| microseconds per token | {' | '.join(names)} | sum |", "|---" * (len(names) + 2) + "|"]
    for one in found["settings"]:
        stages = [one["microseconds"][name] for name in names]
        cells = " | ".join(f"{value:.2f}" for value in (*stages, sum(stages)))
        lines.append(f"| K {one['k']}, windows of {one['max_tokens']} | {cells} |")
    return [*lines, ""]


def growth_table(found: list[Figures], teacher: str) -> list[str]:
    """CPU time and memory against the size of the corpus."""
    lines = [f"## Growth with the corpus, {teacher}, K 32, windows of 512, shards of {GROWTH_SHARD >> 10} KiB", ""]
    lines += ["| tokens | shards | worker, CPU seconds | microseconds per token | plan and codes | peak memory |"]
    lines += ["|---" * 6 + "|"]
    for one in found:
        each = one["worker_seconds"] / one["tokens"] * 1e6
        lines.append(
            f"| {one['tokens']:,} | {one['shards']} | {one['worker_seconds']:.2f} | {each:.2f} "
            f"| {one['plan_seconds']:.2f} s | {(one['peak'] - one['start']) / 2**20:.0f} MiB above the start |"
        )
    lines += [
        "",
        "Each size in a process of its own. The plan reads the whole corpus once; codes tokenize at most 4 MiB",
    ]
    return [*lines, "of it, however large it is.", ""]


def main() -> None:
    """Measure, print, write json and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("rows", type=Path, nargs="+", help="files of benchmarks.rows, named after the teacher")
    parser.add_argument("--growth", type=int, help="only this: one size, in this process, as JSON")
    options = parser.parse_args()
    if options.growth is not None:
        print(json.dumps(growth(options.corpus, options.rows[0], options.growth)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = [speeds(options.corpus, rows) for rows in options.rows]
    grown = [fresh(options.corpus, options.rows[-1], size) for size in SIZES]
    head = ["# The Python side of a capture beside its engine", ""]
    head += [f"Target: {TARGET:,} tokens per CPU second at K 32 (all threads, user and system), text stored, min_p"]
    head += [f"{MIN_P}. Medians of {PASSES} passes over real text in 16 languages and code, rows of real models."]
    head += [f"Made by `python -m benchmarks.overhead` on {machine_line()}.", ""]
    tables = [line for one in found for line in table(one)]
    text = "\n".join([*head, *tables, *growth_table(grown, MODELS[options.rows[-1].stem])])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.md").write_text(text)
    everything = {"machine": machine(), "teachers": found, "growth": grown}
    (RESULTS / "overhead.json").write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
