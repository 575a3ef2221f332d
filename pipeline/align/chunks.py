"""Chunks: the smallest spans of a sample that both tokenizations cut at the same bytes.

Shapes: N samples, S student tokens, T teacher tokens, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.align.kernels import boundaries_batch
from xtoken.pipeline.tokens import Encoded


@dataclass(frozen=True)
class Chunks:
    """Chunks of one sample; chunk c covers student tokens ``student_end[c-1]:student_end[c]``, teacher likewise.

    Attributes:
        student_end: int32 [C].
        teacher_end: int32 [C].
        lead: the first chunk holds only zero-width tokens (a dummy prefix) set aside; it has no target.
    """

    student_end: NDArray[np.int32]
    teacher_end: NDArray[np.int32]
    lead: bool

    @property
    def one_to_one(self) -> int:
        """Chunks of one token on either side."""
        return int(self.is_one_to_one.sum())

    @property
    def is_one_to_one(self) -> NDArray[np.bool_]:
        """bool [C]: chunks of one token on either side, eos of both included, the lead not."""
        student = np.diff(self.student_end, prepend=np.int32(0))
        teacher = np.diff(self.teacher_end, prepend=np.int32(0))
        single_C: NDArray[np.bool_] = (student == 1) & (teacher == 1)
        single_C[: int(self.lead)] = False
        return single_C


def cut(
    student_end_S: NDArray[np.int32], teacher_end_T: NDArray[np.int32], *, student_eos: bool, teacher_eos: bool
) -> Chunks:
    """Chunks of a sample from both sides' byte ends.

    Zero-width tokens at the start are set aside in a chunk of their own. An eos token that closes a complete
    document on both sides is a chunk of its own, by role; on one side only it has no counterpart and is dropped,
    like everything after the last common boundary.

    Args:
        student_end_S: cumulative byte ends, non-decreasing.
        teacher_end_T: likewise, of the same text.
        student_eos: the last student token is its eos (zero bytes wide).
        teacher_eos: likewise for the teacher.
    """
    sides = [np.asarray(end, np.int32) for end in (student_end_S, teacher_end_T)]
    spans = [np.array([0, len(end)], np.int64) for end in sides]
    (chunks,) = _cut_all(sides[0], spans[0], sides[1], spans[1], np.array([student_eos]), np.array([teacher_eos]))
    return chunks


def _cut_all(
    student_end_S: NDArray[np.int32],
    student_offset_N: NDArray[np.int64],
    teacher_end_T: NDArray[np.int32],
    teacher_offset_N: NDArray[np.int64],
    student_eos_N: NDArray[np.bool_],
    teacher_eos_N: NDArray[np.bool_],
) -> list[Chunks]:
    """``cut`` of all samples of a batch; arguments as of ``boundaries_batch``."""
    offset_N, s_end_C, t_end_C, lead_N, decreasing = boundaries_batch(
        student_end_S, student_offset_N, teacher_end_T, teacher_offset_N, student_eos_N, teacher_eos_N
    )
    assert decreasing < 0, f"byte ends must not decrease, as those of sample {decreasing} of the batch do"
    spans = zip(offset_N[:-1].tolist(), offset_N[1:].tolist(), lead_N.tolist(), strict=True)
    return [Chunks(s_end_C[first:last], t_end_C[first:last], lead) for first, last, lead in spans]


@dataclass(frozen=True)
class Joined:
    """One sample with both tokenizations: its place in the batch, the student's tokens, and the chunks."""

    at: int
    encoded: Encoded
    chunks: Chunks


def join(batch: pa.RecordBatch, encoded: Sequence[Encoded | None], eos_id: int | None) -> list[Joined]:
    """Chunks of each sample of a capture batch that the student could encode.

    Args:
        batch: columns of ``CaptureParts.read``.
        encoded: the student's tokens of each sample; None = skipped.
        eos_id: the student's eos.
    """
    known = [(at, mine) for at, mine in enumerate(encoded) if mine is not None]
    if not known:
        return []
    at_N = np.array([at for at, _ in known])
    theirs = batch["teacher_end"].take(pa.array(at_N))
    cuts = _cut_all(
        np.concatenate([mine.ends for _, mine in known]),
        _offsets([len(mine.ends) for _, mine in known]),
        theirs.flatten().to_numpy(),
        _offsets(pc.list_value_length(theirs).to_numpy()),
        np.array([bool(len(mine.ids)) and int(mine.ids[-1]) == eos_id for _, mine in known]),
        batch["teacher_eos"].to_numpy(zero_copy_only=False)[at_N],
    )
    return [Joined(at, mine, chunks) for (at, mine), chunks in zip(known, cuts, strict=True)]


def _offsets(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def chunks_per_sample(samples: Sequence[Joined]) -> NDArray[np.int64]:
    """int64 [N]."""
    return np.array([len(sample.chunks.student_end) for sample in samples], np.int64)
