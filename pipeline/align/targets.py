"""From a batch of capture rows and the student's tokens to a batch of the target table.

Shapes: N samples, S student tokens, R teacher rows, C chunks, K kept entries (all samples of a batch together),
U teacher vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.align.chunks import Chunks, cut
from pipeline.align.kernels import MASS_CLASSES, hkl_targets, pkl_targets, realised
from pipeline.project.projection import Projection, Unreached
from pipeline.store.checks import flat, list_lengths
from pipeline.store.codec import Unpacked, decode
from pipeline.store.writer import list_column
from pipeline.tokens import Encoded
from schemas.tables import targets

_PPM = 1_000_000


@dataclass(frozen=True)
class Maps:
    """W as the kernels need it: arrays [U] over the teacher's vocabulary (see ``Projection``)."""

    route_U: NDArray[np.int32]
    column_U: NDArray[np.int8]
    pair_U: NDArray[np.int32]

    @classmethod
    def of(cls, projection: Projection, unreached: Unreached) -> "Maps":
        """Maps of one projection under one policy for unreached teacher tokens."""
        return cls(projection.routes(unreached), projection.columns_by_kind(), projection.common_student())


@dataclass(frozen=True)
class Joined:
    """One sample with both tokenizations: its place in the batch, the student's tokens, and the chunks."""

    at: int
    encoded: Encoded
    chunks: Chunks


def join(batch: pa.RecordBatch, encoded: Sequence[Encoded | None], eos_id: int | None) -> list[Joined]:
    """Chunks of each sample of a capture batch that the student could encode.

    Args:
        batch: columns of ``sql/read_part.sql``.
        encoded: the student's tokens of each sample; None = skipped.
        eos_id: the student's eos.
    """
    ends, stops = flat(batch, "teacher_end"), np.cumsum(list_lengths(batch, "teacher_end"))
    teacher_eos = batch["teacher_eos"].to_pylist()
    found = []
    for at, (mine, theirs) in enumerate(zip(encoded, np.split(ends, stops[:-1]), strict=True)):
        if mine is not None:
            student_eos = bool(len(mine.ids)) and int(mine.ids[-1]) == eos_id
            chunks = cut(mine.ends, theirs, student_eos=student_eos, teacher_eos=bool(teacher_eos[at]))
            found.append(Joined(at, mine, chunks))
    return found


def target_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], maps: Maps, losses: Sequence[str], step: float
) -> tuple[pa.RecordBatch, Counter[str]]:
    """Rows of ``schemas.tables.targets(losses)`` for these samples, and counts for ``Part.counts``.

    Counts: ``chunks`` with bytes or eos, ``chunks_1_1`` among them, ``chunks_with_row``, ``snapped`` samples and, under
    P-KL, ``mass_*_ppm``: teacher mass in millionths of a chunk that is exact, reached by pieces only, moved, lost, and
    not kept (rest); divide by 1e6 times ``chunks_with_row`` for shares.
    """
    rows = _Rows.of(batch, step)
    row_C = np.concatenate([rows.of_chunks(sample) for sample in samples] or [np.zeros(0, np.int64)])
    schema = targets(losses)
    columns: dict[str, Any] = {
        "sample_id": batch["sample_id"].take(pa.array([sample.at for sample in samples], pa.int64())),
        "student_ids": [sample.encoded.ids for sample in samples],
        "student_end": [sample.encoded.ends for sample in samples],
        "chunk_student_end": [sample.chunks.student_end for sample in samples],
        "chunk_teacher_end": [sample.chunks.teacher_end for sample in samples],
        "teacher_logprob": [rows.realised(sample) for sample in samples],
    }
    counts = _counts(samples, row_C)
    chunks_N = np.array([len(sample.chunks.student_end) for sample in samples], np.int64)
    if "p-kl" in losses:
        found, mass_C5 = _pkl(rows.unpacked, row_C, maps, chunks_N)
        columns.update(found)
        for name, share in zip(MASS_CLASSES, mass_C5.sum(axis=0).tolist(), strict=True):
            counts[f"mass_{name}_ppm"] = round(share * _PPM)
    if "h-kl" in losses:
        columns.update(_hkl(rows.unpacked, row_C, maps, chunks_N))
    arrays = [
        columns[name] if name == "sample_id" else list_column(columns[name], name, schema) for name in schema.names
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema), counts


@dataclass(frozen=True)
class _Rows:
    """The teacher rows of a batch, decoded; sample n has rows ``offset_N[n]:offset_N[n + 1]``."""

    unpacked: Unpacked
    realised_R: NDArray[np.float32]
    offset_N: NDArray[np.int64]
    first_N: NDArray[np.int64]

    @classmethod
    def of(cls, batch: pa.RecordBatch, step: float) -> "_Rows":
        kept, ids, gap, rest = (flat(batch, name) for name in ("kept", "topk_ids", "topk_gap", "rest_gap"))
        unpacked = decode(kept, ids, gap, rest, step)
        offset_N = np.concatenate([np.zeros(1, np.int64), np.cumsum(list_lengths(batch, "kept"))])
        return cls(unpacked, flat(batch, "realised_logprob"), offset_N, batch["first_row"].to_numpy().astype(np.int64))

    def spans(self, sample: Joined) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of each chunk's teacher tokens within its sample; a negative start has no row."""
        end_C = sample.chunks.teacher_end.astype(np.int64) - self.first_N[sample.at]
        start_C = np.concatenate([[-self.first_N[sample.at]], end_C[:-1]]) if len(end_C) else end_C
        if sample.chunks.lead:
            start_C[0] = -1
        return start_C, end_C

    def of_chunks(self, sample: Joined) -> NDArray[np.int64]:
        """Row in the batch that predicts each chunk's first teacher token, -1 = none."""
        start_C, _ = self.spans(sample)
        return np.where(start_C < 0, -1, start_C + self.offset_N[sample.at])

    def realised(self, sample: Joined) -> NDArray[np.float32]:
        """The teacher's log-probability of each chunk as it stands in the text."""
        low, high = self.offset_N[sample.at], self.offset_N[sample.at + 1]
        start_C, end_C = self.spans(sample)
        values: NDArray[np.float32] = realised(self.realised_R[low:high], start_C, end_C, high - low)
        return values


def _counts(samples: Sequence[Joined], row_C: NDArray[np.int64]) -> Counter[str]:
    return Counter(
        chunks=sum(len(sample.chunks.student_end) - int(sample.chunks.lead) for sample in samples),
        chunks_1_1=sum(sample.chunks.one_to_one for sample in samples),
        chunks_with_row=int((row_C >= 0).sum()),
        snapped=sum(sample.encoded.snapped for sample in samples),
    )


def _pkl(
    rows: Unpacked, row_C: NDArray[np.int64], maps: Maps, chunks_N: NDArray[np.int64]
) -> tuple[dict[str, list[NDArray[Any]]], NDArray[np.float64]]:
    count_C, ids_K, logprob_K, rest_C, mass_C5 = pkl_targets(
        row_C, rows.offsets, rows.ids, rows.logprob, rows.rest_logprob, maps.route_U, maps.column_U
    )
    columns = {
        "pkl_count": _per_sample(count_C, chunks_N),
        "pkl_ids": _per_sample(ids_K, _entries(count_C, chunks_N)),
        "pkl_logprob": _per_sample(logprob_K, _entries(count_C, chunks_N)),
        "pkl_rest_logprob": _per_sample(rest_C, chunks_N),
    }
    return columns, mass_C5


def _hkl(
    rows: Unpacked, row_C: NDArray[np.int64], maps: Maps, chunks_N: NDArray[np.int64]
) -> dict[str, list[NDArray[Any]]]:
    common_C, ids_K, common_K, other_C, other_K = hkl_targets(
        row_C, rows.offsets, rows.ids, rows.logprob, rows.rest_logprob, maps.pair_U
    )
    return {
        "hkl_common_count": _per_sample(common_C, chunks_N),
        "hkl_common_ids": _per_sample(ids_K, _entries(common_C, chunks_N)),
        "hkl_common_logprob": _per_sample(common_K, _entries(common_C, chunks_N)),
        "hkl_other_count": _per_sample(other_C, chunks_N),
        "hkl_other_logprob": _per_sample(other_K, _entries(other_C, chunks_N)),
    }


def _entries(count_C: NDArray[np.int32], chunks_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entries of each sample, [N], from entries of each chunk."""
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(count_C, dtype=np.int64)])
    stops = np.cumsum(chunks_N)
    entries: NDArray[np.int64] = running[stops] - running[stops - chunks_N]
    return entries


def _per_sample(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(lengths_N)[:-1]) if len(lengths_N) else []
