"""What the store costs on real rows: bytes per token by column, mass not kept, KL of the codec, speed; and its rivals.

    python -m benchmarks.corpus corpus.jsonl
    python -m benchmarks.rows corpus.jsonl .cache/models/gemma-3-270m gemma.npz      # and smollm2-135m
    python -m benchmarks.codec gemma.npz smollm2.npz                                 # writes results/codec.{json,md}

Every figure is over all rows of the file, in windows of up to 512 tokens, written by the product's writer and read back
by its reader. Nothing here is timed in tests; speed is the median of five passes in CPU seconds of one process.

Shapes: R rows, E entries per row of the raw file, K kept entries, N windows, U vocabulary.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from benchmarks.machine import machine, machine_line
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import NO_TAIL, Packed, decode, encode
from xtoken.pipeline.store.codes import Codes, codes_by_use, inverse, restore_ids
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.inspect import column_bytes
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, capture_batch, write_parquet
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.manifest import CodecInfo

CAPTURE = open_codec(CodecInfo(k=64)).schema()

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"gemma": "gemma-3-270m", "smollm2": "smollm2-135m"}
GRID_K, GRID_P = (8, 16, 32, 64, 128), (0.0, 0.001, 0.003, 0.01)
PASSES = 5
Figures = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """A file of ``benchmarks.rows``, and what of it a capture would hold beside the rows."""

    name: str
    rows: TeacherRows
    target_R: NDArray[np.int32]
    end_R: NDArray[np.int32]
    stop_N: NDArray[np.int64]
    table: TokenTable
    codes: Codes

    @classmethod
    def load(cls, path: Path) -> "Raw":
        """Read a file named after one of ``MODELS``."""
        found, table = np.load(path), load_tokenizer(str(ROOT / ".cache" / "models" / MODELS[path.stem])).table
        target_R, stop_N = found["target"], np.cumsum(found["rows"]).astype(np.int64)
        spans = zip(np.concatenate([[0], stop_N[:-1]]), stop_N, strict=True)
        end_R = np.concatenate([np.cumsum(table.lengths[target_R[a:b]]) for a, b in spans]).astype(np.int32)
        rows = TeacherRows(
            ids=found["ids"],
            logprob=found["logprob"],
            target_logprob=found["target_logprob"],
            target_rank=np.ones(len(target_R), np.int32),
            space_logprob=found["space_logprob"],
        )
        return cls(path.stem, rows, target_R, end_R, stop_N, table, codes_by_use([target_R], table.size))

    def packed(self, k: int, min_p: float, step: float = 1 / 32) -> Packed:
        """All rows under one setting."""
        return encode(self._first(k), k=k, min_p=min_p, vocab_size=self.table.size, step=step)

    def _first(self, k: int) -> TeacherRows:
        rows = self.rows
        return TeacherRows(rows.ids[:, :k], rows.logprob[:, :k], rows.target_logprob, rows.target_rank)

    def samples(self, packed: Packed) -> Iterator[Sample]:
        """One sample per window, without its text (which costs the same under every codec)."""
        entry = np.concatenate([[0], np.cumsum(packed.kept, dtype=np.int64)])
        start = 0
        for number, stop in enumerate(self.stop_N.tolist()):
            cut, kept = slice(start, stop), slice(entry[start], entry[stop])
            rows = Packed(packed.kept[cut], packed.topk_ids[kept], packed.topk_gap[kept], packed.rest_gap[cut])
            assert self.rows.space_logprob is not None
            yield Sample(
                sample_id=f"corpus:{number}#0",
                text=None,
                teacher_ids=self.target_R[cut],
                teacher_end=self.end_R[cut],
                packed=rows,
                realised_logprob=self.rows.target_logprob[cut],
                space_logprob=self.rows.space_logprob[cut],
                first_row=0,
                complete=False,
                snapped=False,
            )
            start = stop


def write(raw: Raw, packed: Packed, url: str, codes: Codes | None) -> None:
    """The product's file of these rows."""
    samples = list(raw.samples(packed))
    batches = (capture_batch(samples[at : at + ROW_GROUP], CAPTURE, codes) for at in range(0, len(samples), ROW_GROUP))
    write_parquet(url, CAPTURE, batches)


def read(url: str, id_of_code: Codes | None) -> float:
    """Read and decode a file as align does; returns a number that depends on all of it."""
    total = 0.0
    columns = ["kept", "topk_codes", "topk_gap", "rest_gap"]
    for stored in pq.ParquetFile(url).iter_batches(batch_size=ROW_GROUP, columns=columns):
        batch = restore_ids(stored, id_of_code)
        kept, ids, gap, rest = (flat(batch, name) for name in ("kept", "topk_ids", "topk_gap", "rest_gap"))
        total += float(decode(kept, ids, gap, rest).logprob[-1])
    return total


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Median CPU time of this process over ``PASSES`` passes."""
    found = []
    for _ in range(PASSES):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return sorted(found)[PASSES // 2]


def mass_not_kept(raw: Raw, packed: Packed) -> tuple[float, float]:
    """Mean and root mean square over rows, from the exact entries."""
    p_RE = np.exp(raw.rows.logprob.astype(np.float64))
    kept_RE = np.arange(p_RE.shape[1]) < packed.kept[:, None]
    rest_R = np.clip(1 - (p_RE * kept_RE).sum(axis=1), 0, 1)
    return float(rest_R.mean()), float(np.sqrt((rest_R**2).mean()))


def codec_kl(raw: Raw, packed: Packed, step: float = 1 / 32) -> tuple[float, float]:
    """Mean and 99th percentile of KL(exact || stored) over rows; REST is a cell of both, stored rows normalised."""
    found = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap, step)
    kept_RE = np.arange(raw.rows.logprob.shape[1]) < packed.kept[:, None]
    exact_K = raw.rows.logprob.astype(np.float64)[kept_RE]
    starts_R = found.offsets[:-1]
    kept_R = np.add.reduceat(np.exp(exact_K), starts_R)
    rest_R = np.where(packed.rest_gap == NO_TAIL, 0.0, np.clip(1 - kept_R, 1e-12, 1))
    total_R = np.add.reduceat(np.exp(found.logprob), starts_R) + np.exp(found.tail_logprob)
    inner_R = np.add.reduceat(np.exp(exact_K) * (exact_K - found.logprob), starts_R)
    safe_R = np.where(rest_R > 0, found.tail_logprob, 0.0)
    kl_R = inner_R + rest_R * (np.log(np.maximum(rest_R, 1e-12)) - safe_R) + np.log(total_R)
    return float(kl_R.mean()), float(np.quantile(kl_R, 0.99))


def setting(raw: Raw, folder: Path, k: int, min_p: float, codes: Codes | None) -> Figures:
    """Bytes, mass and KL of one setting."""
    packed, url = raw.packed(k, min_p), str(folder / "part.parquet")
    write(raw, packed, url, codes)
    rows = len(raw.target_R)
    with open(url, "rb") as file:
        columns = {name: size / rows for name, size in column_bytes(file, url).items()}
    mean, rms = mass_not_kept(raw, packed)
    kl, kl99 = codec_kl(raw, packed)
    return {
        "k": k,
        "min_p": min_p,
        "kept": float(packed.kept.mean(dtype=np.float64)),
        "bytes": sum(columns.values()),
        "columns": columns,
        "not_kept": mean,
        "not_kept_rms": rms,
        "kl": kl,
        "kl_p99": kl99,
    }


def speed(raw: Raw, folder: Path, k: int, min_p: float) -> Figures:
    """Tokens per CPU second: encode and write, read and decode."""
    url, packed, rows = str(folder / "speed.parquet"), raw.packed(k, min_p), len(raw.target_R)
    id_of_code = inverse(raw.codes)
    encoding = cpu_seconds(lambda: raw.packed(k, min_p))
    writing = cpu_seconds(lambda: write(raw, packed, url, raw.codes))
    reading = cpu_seconds(lambda: read(url, id_of_code))
    return {"encode": rows / encoding, "write": rows / writing, "read": rows / reading}


def list_bytes(raw: Raw, columns: dict[str, tuple[NDArray[Any], NDArray[np.int64]]], **options: Any) -> float:
    """Bytes per token of list columns (values, per-row lengths) in Parquet with these options and zstd 1."""
    spans = [np.concatenate([[0], raw.stop_N[:-1]]), raw.stop_N]
    arrays = {}
    for name, (values, length_R) in columns.items():
        running = np.concatenate([[0], np.cumsum(length_R)])
        offsets = np.concatenate([[0], np.cumsum(running[spans[1]] - running[spans[0]])]).astype(np.int32)
        arrays[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd", compression_level=1, row_group_size=ROW_GROUP, **options)
    return sum(column_bytes(sink, "lists").values()) / len(raw.target_R)


def rivals(raw: Raw, k: int) -> Figures:
    """The same K entries of every row in the formats of others: rows only, bytes per token."""
    ids, logprob = raw.rows.ids[:, :k].ravel(), raw.rows.logprob[:, :k].ravel()
    length = np.full(len(raw.target_R), k, np.int64)
    plain = {"use_dictionary": False, "write_statistics": False}
    default: Figures = {"write_statistics": False}
    lists = {"ids": (ids, length), "logprob": (logprob, length)}
    halves = {"ids": (ids, length), "logprob": (logprob.astype(np.float16), length)}
    return {
        "lists int32 + float32": list_bytes(raw, lists, **plain),
        "lists int32 + float32, dictionary": list_bytes(raw, lists, **default),
        "lists int32 + float16": list_bytes(raw, halves, **plain),
        "fixed width + zstd": fixed_width(raw, k),
    }


def fixed_width(raw: Raw, k: int) -> float:
    """Ids in as many bits as the vocabulary needs, float16 values, packed and compressed per 32 windows."""
    bits = max(1, (raw.table.size - 1).bit_length())
    compressor, total, start = zstandard.ZstdCompressor(level=1), 0, 0
    for stop in [*raw.stop_N[ROW_GROUP - 1 :: ROW_GROUP].tolist(), len(raw.target_R)]:
        ids = raw.rows.ids[start:stop, :k].ravel()
        packed = np.packbits((ids[:, None] >> np.arange(bits)) & 1)
        total += len(compressor.compress(packed.tobytes()))
        total += len(compressor.compress(raw.rows.logprob[start:stop, :k].astype(np.float16).tobytes()))
        start = stop
    return total / len(raw.target_R)


def adaptive(raw: Raw, packed: Packed) -> Figures:
    """Bytes per token under adaptive order-0 models: what no coder without context gets much below.

    Counts are those of all windows before; gaps have a model for each power of two of the rank.
    """
    entry_N = np.concatenate([[0], np.cumsum(packed.kept, dtype=np.int64)])[np.concatenate([[0], raw.stop_N])]
    rank_K = np.arange(len(packed.topk_ids)) - np.repeat(
        np.cumsum(packed.kept, dtype=np.int64) - packed.kept, packed.kept
    )
    by_rank_K, rows = np.log2(rank_K + 1).astype(np.int64), len(raw.target_R)
    ids = code_bytes(packed.topk_ids, np.zeros_like(by_rank_K), entry_N, raw.table.size)
    return {"ids": ids / rows, "gaps": code_bytes(packed.topk_gap, by_rank_K, entry_N, 1 << 12) / rows}


def code_bytes(value_K: NDArray[Any], context_K: NDArray[np.int64], entry_N: NDArray[np.int64], size: int) -> float:
    """Bytes of all values, window after window, under counts (from 0.02 each) of what came before."""
    count = np.full((int(context_K.max()) + 1, size), 0.02)
    bits, value_K = 0.0, np.minimum(value_K.astype(np.int64), size - 1)
    for start, stop in pairwise(entry_N):
        context, value = context_K[start:stop], value_K[start:stop]
        bits -= float(np.log2(count[context, value] / count.sum(axis=1)[context]).sum())
        np.add.at(count, (context, value), 1.0)
    return bits / 8


def equal_mass(raw: Raw, folder: Path, naive: float) -> list[Figures]:
    """The store at the mass not kept of a fixed K = 32, by mean and by root mean square, against naive lists."""
    mean, rms = mass_not_kept(raw, raw.packed(32, 0.0))
    found = []
    for by, wanted in ((0, mean), (1, rms)):
        low, high = 1e-4, 0.05
        for _ in range(20):
            middle = (low * high) ** 0.5
            above = mass_not_kept(raw, raw.packed(128, middle))[by] > wanted
            low, high = (low, middle) if above else (middle, high)
        figures = setting(raw, folder, 128, low, raw.codes)
        found.append({"by": ("mean", "rms")[by], **figures, "of_naive": figures["bytes"] / naive})
    return found


def naive_lists(raw: Raw, k: int) -> float:
    """Everything a capture says but text, in plain lists."""
    one = np.ones(len(raw.target_R), np.int64)
    assert raw.rows.space_logprob is not None
    others = {
        "teacher_ids": (raw.target_R, one),
        "teacher_end": (raw.end_R, one),
        "realised_logprob": (raw.rows.target_logprob, one),
        "space_logprob": (raw.rows.space_logprob, one),
    }
    plain = {"use_dictionary": False, "write_statistics": False}
    return rivals(raw, k)["lists int32 + float32"] + list_bytes(raw, others, **plain)


def measure(path: Path, folder: Path) -> Figures:
    """All figures of one teacher."""
    raw = Raw.load(path)
    naive = naive_lists(raw, 32)
    default = raw.packed(64, 0.003)
    return {
        "teacher": MODELS[raw.name],
        "rows": len(raw.target_R),
        "windows": len(raw.stop_N),
        "grid": [setting(raw, folder, k, p, raw.codes) for k in GRID_K for p in GRID_P],
        "default_with_ids": setting(raw, folder, 64, 0.003, None),
        "steps": {str(n): step_figures(raw, n) for n in (16, 32, 64)},
        "adaptive": adaptive(raw, default),
        "naive_32": naive,
        "rivals_32": rivals(raw, 32),
        "equal_mass": equal_mass(raw, folder, naive),
        "speed": speed(raw, folder, 64, 0.003),
    }


def step_figures(raw: Raw, steps: int) -> Figures:
    """Gaps' bytes per token and the codec's KL at ``1 / steps`` nat."""
    packed = raw.packed(64, 0.003, 1 / steps)
    length = packed.kept.astype(np.int64)
    encodings = {"column_encoding": {"gap.list.element": "BYTE_STREAM_SPLIT"}, "use_dictionary": False}
    kl, kl99 = codec_kl(raw, packed, 1 / steps)
    return {"gap_bytes": list_bytes(raw, {"gap": (packed.topk_gap, length)}, **encodings), "kl": kl, "kl_p99": kl99}


def table(found: Figures) -> list[str]:
    """A teacher's figures in Markdown."""
    lines = [f"## {found['teacher']}, {found['rows']:,} rows", ""]
    lines += [
        "| k | min_p | entries | not kept, mean (rms) | bytes per token | tokens of it | values | KL mean | p99 |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for one in [*found["grid"], found["default_with_ids"]]:
        columns = one["columns"]
        name = f"{one['k']}" if one is not found["default_with_ids"] else "64, ids instead of codes"
        lines.append(
            f"| {name} | {one['min_p']} | {one['kept']:.1f} | {one['not_kept']:.3f} ({one['not_kept_rms']:.3f}) "
            f"| {one['bytes']:.1f} | {columns['topk_codes']:.1f} | {columns['topk_gap']:.1f} "
            f"| {one['kl']:.1e} | {one['kl_p99']:.1e} |"
        )
    lines += ["", f"Plain lists of 32 entries, and all other columns plain: {found['naive_32']:.1f} bytes per token."]
    for one in found["equal_mass"]:
        lines.append(
            f"At their mass not kept ({one['by']}): min_p {one['min_p']:.4f}, {one['kept']:.1f} entries, "
            f"{one['bytes']:.1f} bytes per token, {one['of_naive']:.3f} of the lists."
        )
    lines += ["", "| rows of 32 entries as | bytes per token |", "|---|---|"]
    lines += [f"| {name} | {size:.1f} |" for name, size in found["rivals_32"].items()]
    lines += ["", "Columns at the default (k 64, min_p .003): " + ", ".join(_columns(found)) + "."]
    ids, gaps = found["adaptive"]["ids"], found["adaptive"]["gaps"]
    lines += [f"Adaptive order-0 models need {ids:.1f} bytes per token for ids and {gaps:.1f} for gaps."]
    for n, one in found["steps"].items():
        gaps, kl, kl99 = one["gap_bytes"], one["kl"], one["kl_p99"]
        lines += [f"At a step of 1/{n} nat gaps take {gaps:.1f} bytes per token, KL {kl:.1e} (p99 {kl99:.1e})."]
    speeds = (f"{verb} {rate:,.0f}" for verb, rate in found["speed"].items())
    return [*lines, f"Tokens per CPU second at the default: {', '.join(speeds)} (read: and decode).", ""]


def _columns(found: Figures) -> list[str]:
    (default,) = (one for one in found["grid"] if (one["k"], one["min_p"]) == (64, 0.003))
    return [f"{name} {size:.2f}" for name, size in sorted(default["columns"].items(), key=lambda item: -item[1])]


def main() -> None:
    """Measure every file named, write json and Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(Path(name), Path(folder)) for name in sys.argv[1:]]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "codec.json").write_text(json.dumps({"machine": machine(), "teachers": found}, indent=1) + "\n")
    head = [
        "# Bytes of the store on real rows",
        "",
        "Prose, a technical book in 16 languages and Python code; all columns but text. Codes follow from the tokens",
        "of the same text, as `xtoken precompute` takes them from its corpus. Made by `python -m benchmarks.codec` on",
        f"{machine_line()}.",
        "",
    ]
    (RESULTS / "codec.md").write_text("\n".join([*head, *(line for one in found for line in table(one))]))


if __name__ == "__main__":
    main()
