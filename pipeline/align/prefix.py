"""Byte-prefix targets: the teacher's rows in the student's tokens, at every boundary of the student's.

phi_c(t) is the longest student token that a teacher token t, without the bytes c already emitted, starts with. At a
boundary of both sequences c is empty (root); inside a teacher token the kept tokens that start with c take part
(interior), renormalised by their mass: what of REST would start with c is unknown and left out.

Shapes: N samples, S student tokens, C chunks, U teacher vocabulary, V student vocabulary, M student text tokens,
B bytes of all teacher tokens together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.blanks import Shifted
from xtoken.pipeline.align.chunks import Joined, chunks_per_sample
from xtoken.pipeline.align.kernels_prefix import boundary_rows, child_entries, longest_prefixes, prefix_entries
from xtoken.pipeline.align.kernels_targets import merged
from xtoken.pipeline.project.projection import ROLE, Projection
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.tokens import TokenTable


@dataclass(frozen=True)
class PrefixMaps:
    """Both vocabularies as the kernels need them.

    Attributes:
        teacher, student: token tables.
        phi_B: int32, phi at every byte of the teacher's tokens, -1 = none.
        role_U: int32, the student's special token of the same role, or -1.
        rank_U: int32, place of each teacher token in the order of bytes.
        alone_U: bool, a teacher text token without a student token of equal bytes.
        sorted_student: uint8, bytes of the student's text tokens in order of (bytes, id).
        sorted_M: int64 [M + 1], where each of them starts.
    """

    teacher: TokenTable
    student: TokenTable
    phi_B: NDArray[np.int32]
    role_U: NDArray[np.int32]
    rank_U: NDArray[np.int32]
    alone_U: NDArray[np.bool_]
    sorted_student: NDArray[np.uint8]
    sorted_M: NDArray[np.int64]

    @classmethod
    def of(cls, student: TokenTable, teacher: TokenTable, projection: Projection) -> "PrefixMaps":
        """Maps of a pair; W says which special tokens correspond."""
        data, offsets_M, id_M = _sorted_text(student)
        phi_B = longest_prefixes(teacher.data, teacher.offsets, data, offsets_M, id_M)
        role_U = np.full(teacher.size, -1, np.int32)
        role_U[projection.teacher_id[projection.kind == ROLE]] = projection.student_id[projection.kind == ROLE]
        pieces = teacher.pieces()
        rank_U = np.empty(teacher.size, np.int32)
        rank_U[sorted(range(teacher.size), key=pieces.__getitem__)] = np.arange(teacher.size, dtype=np.int32)
        filled = np.flatnonzero(teacher.lengths > 0)
        first = phi_B[teacher.offsets[filled]]
        alone_U = np.zeros(teacher.size, np.bool_)
        alone_U[filled] = (first < 0) | (student.lengths[first] < teacher.lengths[filled])
        return cls(teacher, student, phi_B, role_U, rank_U, alone_U, data, offsets_M)


def _sorted_text(table: TokenTable) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
    """Text tokens in order of (bytes, id): bytes, offsets [M + 1], and the id that stands for the bytes of each [M]."""
    pieces, stands_for = table.pieces(), table.by_bytes()
    text = [i for i, data in enumerate(pieces) if data and table.role[i] is None]
    found = sorted(pieces[i] for i in text)
    offsets_M = np.array([0, *accumulate(map(len, found))], np.int64)
    id_M = np.array([stands_for[data] for data in found], np.int32)
    return np.frombuffer(b"".join(found), np.uint8), offsets_M, id_M


def prefix_columns(
    batch: pa.RecordBatch,
    samples: Sequence[Joined],
    shifted: Shifted,
    start_C: NDArray[np.int64],
    maps: PrefixMaps,
    *,
    roots_only: bool = False,
) -> dict[str, NDArray[Any]]:
    """The columns of byte-prefix, all samples one after the other.

    Args:
        batch: columns of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        shifted: the teacher's rows, at the targets' temperature.
        start_C: row of each chunk's first teacher token, -1 = none.
        maps: of the pair.
        roots_only: rows are draws. Interior targets would be ratios of them and child groups depend on which tokens
            were drawn, so there are none; roots hold no REST, whose share of the student depends on that too.
    """
    row_S, token_S, before_S = _boundaries(batch, samples, start_C, shifted, maps)
    rows = shifted.rows
    if roots_only:
        row_S[before_S > 0] = -1
    teacher, student = maps.teacher, maps.student
    vocab = (teacher.data, teacher.offsets)
    raw_S, raw_K, rawp_K, rest_S = prefix_entries(
        row_S, token_S, before_S, rows.offsets, rows.ids, rows.logprob, rows.rest, *vocab, maps.phi_B, maps.role_U
    )
    count_S, ids_K, logprob_K = merged(raw_S, raw_K, rawp_K)
    if roots_only:
        rest_S[count_S > 0] = -np.inf
    tokens_N = np.array([len(sample.encoded.ids) for sample in samples], np.int64)
    last_S = np.zeros(len(row_S), np.bool_)
    last_S[np.cumsum(tokens_N)[tokens_N > 0] - 1] = True
    child_S, low_K, high_K, mass_K = child_entries(
        np.full_like(row_S, -1) if roots_only else row_S,
        before_S,
        np.concatenate([np.zeros(0, np.int32), *(sample.encoded.ids for sample in samples)]),
        last_S,
        rows.offsets,
        rows.ids,
        rows.logprob,
        *vocab,
        maps.rank_U,
        maps.alone_U,
        *(student.data, student.offsets, maps.sorted_student, maps.sorted_M),
    )
    return {
        "prefix_count": count_S,
        "prefix_ids": ids_K,
        "prefix_logprob": logprob_K,
        "prefix_rest_logprob": rest_S,
        "child_count": child_S,
        "child_low": low_K,
        "child_high": high_K,
        "child_logprob": mass_K,
    }


def _boundaries(
    batch: pa.RecordBatch,
    samples: Sequence[Joined],
    start_C: NDArray[np.int64],
    shifted: Shifted,
    maps: PrefixMaps,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """``boundary_rows`` of all samples, one after the other, with shifted roots."""
    stops = np.cumsum(list_lengths(batch, "teacher_ids"))
    ids = np.split(flat(batch, "teacher_ids"), stops[:-1])
    ends = np.split(flat(batch, "teacher_end"), stops[:-1])
    starts = np.split(start_C, np.cumsum(chunks_per_sample(samples)))
    found = [
        boundary_rows(
            sample.encoded.ends,
            ends[sample.at],
            sample.chunks.student_end,
            sample.chunks.teacher_end,
            start,
            ids[sample.at],
            np.frombuffer(batch["text"][sample.at].as_py().encode(), np.uint8),
            maps.teacher.data,
            maps.teacher.offsets,
        )
        for sample, start in zip(samples, starts, strict=False)  # after the last sample nothing is left
    ]
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    rows, tokens, before = zip(empty, *found, strict=True)
    row_S, before_S = np.concatenate(rows), np.concatenate(before)
    _shift_roots(row_S, before_S, samples, shifted)
    return row_S, np.concatenate(tokens), before_S


def _shift_roots(
    row_S: NDArray[np.int64], before_S: NDArray[np.int32], samples: Sequence[Joined], shifted: Shifted
) -> None:
    """Mend the first student token of each shifted chunk.

    Where the teacher brings a blank, it has emitted that one byte when the student begins; where the student does, its
    tokens are compared with those of a shifted row.
    """
    tokens_N = np.array([len(sample.encoded.ids) for sample in samples], np.int64)
    base_C = np.repeat(np.cumsum(tokens_N) - tokens_N, chunks_per_sample(samples))
    first_C = np.concatenate([np.zeros(0, np.int64), *(_starts(sample.chunks.student_end) for sample in samples)])
    mine_C = shifted.moved_C & ~shifted.brought_C
    row_S[(base_C + first_C)[mine_C]] = shifted.prefix_C[mine_C]
    before_S[(base_C + first_C)[shifted.brought_C]] = 1


def _starts(end_C: NDArray[np.int32]) -> NDArray[np.int64]:
    starts: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), end_C[:-1].astype(np.int64)])
    return starts[: len(end_C)]
