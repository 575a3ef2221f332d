"""Bytes per token of every setting: raw rows through the codec and the product's writer.

Counted are the columns that say the teacher's row (kept, codes, gaps, REST; or drawn, codes, counts, entropy), not the
text, ids and log-probabilities that every setting stores alike. Raw files hold the first 128 entries and 200 draws of
a row. Independent draws are taken from these. Systematic draws need whole rows: here what is behind the 128 is shared
evenly by those of the 200 draws that fell there, which are real ids of the real tail.

Shapes: R rows, E entries of a raw row, K kept entries.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity_rows import Setting, kept_rows, packed, points, tail_counts
from xtoken.pipeline.store.codecs import open_codec, record_of
from xtoken.pipeline.store.codecs.sampled import PackedDraws
from xtoken.pipeline.store.codecs.topk import Packed
from xtoken.pipeline.store.codes import Codes, codes_by_use
from xtoken.pipeline.store.inspect import column_bytes
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, capture_batch, write_parquet
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.codecs import CODECS

ROWS = {"topk": ("kept", "topk_codes", "topk_gap", "rest_gap"), "sampled": ("drawn", "draw_codes", "draw_count")}
WINDOWS = 64  # two full groups of rows: some 30,000 tokens


@dataclass(frozen=True)
class Raw:
    """Some windows of a file of ``benchmarks.rows``.

    Attributes:
        head: the first entries of each row. draws_RN: its draws.
        rows_N: rows of each window. codes: by use, over the whole file.
        size: U, the vocabulary.
    """

    head: TeacherRows
    draws_RN: NDArray[np.int32]
    rows_N: NDArray[np.int32]
    codes: Codes
    size: int

    @classmethod
    def load(cls, path: Path, size: int) -> "Raw":
        """Windows evenly from the file."""
        found = np.load(path)
        stops = np.cumsum(found["rows"])
        count = min(WINDOWS, len(stops))
        chosen = [(2 * i + 1) * len(stops) // (2 * count) for i in range(count)]
        rows = np.concatenate([np.arange(stops[at] - found["rows"][at], stops[at]) for at in chosen])
        ids, logprob, draws = found["ids"][rows], found["logprob"][rows], found["draws"][rows]
        nothing = np.zeros(len(rows), np.float32)
        head = TeacherRows(ids, logprob, nothing, nothing.astype(np.int32))
        return cls(head, draws, found["rows"][chosen], codes_by_use([found["target"]], size), size)


def bytes_per_token(raw: Raw, setting: Setting) -> dict[str, float]:
    """Bytes of the row columns and entries or different draws, per token, and over how many rows."""
    found = _bytes_and_entries(raw, setting)
    return {"bytes": found[0], "entries": found[1], "counted": len(raw.draws_RN)}


def _bytes_and_entries(raw: Raw, setting: Setting) -> tuple[float, float]:
    if setting.family in ("topk", "drop"):
        found = packed(raw.head, setting, raw.size)
        return _written(raw, found, "topk"), float(found.kept.mean())
    if setting.family != "head+tail":
        draws = _packed_draws(_draws(raw, setting))
        entropy = 4.0 * 3 / 4  # float32 of 16 significant bits: one byte of four is empty
        return _written(raw, draws, "sampled") + entropy, float(draws.drawn.mean())
    head, tail = packed(raw.head, setting, raw.size), _packed_draws(_draws(raw, setting))
    size = _written(raw, head, "topk") + _written(raw, tail, "sampled")
    return size, float(head.kept.mean() + tail.drawn.mean())


def _draws(raw: Raw, setting: Setting) -> list[NDArray[np.int64]]:
    """Ids drawn in each row."""
    if setting.family == "independent":
        return list(raw.draws_RN[:, : setting.draws])
    count_R, kept = np.full(len(raw.draws_RN), setting.draws), None
    if setting.family == "head+tail":
        kept = kept_rows(raw.head, setting, raw.size)
        count_R = tail_counts(kept, setting)
    found = []
    for row, at in enumerate(points("systematic", count_R, 0, 0)):
        ids, p = _sparse(raw, row)
        if kept is not None:
            p = np.where(np.isin(ids, kept.ids[kept.offsets[row] : kept.offsets[row + 1]]), 0.0, p)
        up_to = np.cumsum(p)
        none = up_to[-1] <= 0
        found.append(
            ids[:0] if none else ids[np.searchsorted(up_to, at * up_to[-1], side="right").clip(0, len(ids) - 1)]
        )
    return found


def _sparse(raw: Raw, row: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids in ascending order and probabilities of a row, what is behind the head shared by the draws there."""
    ids, p = raw.head.ids[row].astype(np.int64), np.exp(raw.head.logprob[row].astype(np.float64))
    tail = raw.draws_RN[row][~np.isin(raw.draws_RN[row], ids)]
    seen, times = np.unique(tail, return_counts=True)
    share = times * max(0.0, 1.0 - p.sum()) / max(len(tail), 1)
    ids, p = np.concatenate([ids, seen]), np.concatenate([p, share])
    order = np.argsort(ids)
    return ids[order], p[order]


def _packed_draws(drawn: Sequence[NDArray[np.int64]]) -> PackedDraws:
    """As the codec orders them: most draws first, then ascending."""
    found = []
    for ids in drawn:
        seen, times = np.unique(ids, return_counts=True)
        order = np.lexsort((seen, -times))
        found.append((seen[order], times[order]))
    ids, times = (np.concatenate(part) for part in zip(*found, strict=True))
    count_R = np.array([len(seen) for seen, _ in found], np.uint16)
    return PackedDraws(count_R, ids.astype(np.int32), times.astype(np.uint16), np.zeros(len(count_R), np.float32))


def _written(raw: Raw, rows: Packed | PackedDraws, codec: str) -> float:
    """Compressed bytes of the codec's row columns per token."""
    schema = open_codec(record_of(codec, CODECS[codec].settings())).schema()
    samples = list(_samples(raw, rows))
    batches = (
        capture_batch(samples[at : at + ROW_GROUP], schema, raw.codes) for at in range(0, len(samples), ROW_GROUP)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/part.parquet"
        write_parquet(path, schema, batches)
        with open(path, "rb") as file:
            sizes: Counter[str] = column_bytes(file, path)
    return sum(sizes[name] for name in ROWS[codec]) / int(raw.rows_N.sum())


def _samples(raw: Raw, rows: Packed | PackedDraws) -> Iterator[Sample]:
    """One per window."""
    per_row = rows.kept if isinstance(rows, Packed) else rows.drawn
    entry_R, start = np.concatenate([[0], np.cumsum(per_row, dtype=np.int64)]), 0
    for number, stop in enumerate(np.cumsum(raw.rows_N).tolist()):
        cut, kept = slice(start, stop), slice(entry_R[start], entry_R[stop])
        if isinstance(rows, Packed):
            part: Packed | PackedDraws = Packed(
                rows.kept[cut], rows.topk_ids[kept], rows.topk_gap[kept], rows.rest_gap[cut]
            )
        else:
            part = PackedDraws(rows.drawn[cut], rows.draw_ids[kept], rows.draw_count[kept], rows.entropy[cut])
        ids, nothing = np.zeros(stop - start, np.int32), np.zeros(stop - start, np.float32)
        yield Sample(f"{number}#0", None, ids, ids, part, nothing, nothing, 0, False, False)
        start = stop
