"""Chunks: the smallest spans of a sample that both tokenizations cut at the same bytes.

Shapes: N samples, S student tokens, T teacher tokens, C chunks, M pairs of spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
        gap: bool [C], chunks without a target, perhaps without a token of one side. Of a text only the first may be
            one: tokens of no bytes (a dummy prefix). Of a conversation what the template writes, what is not taught,
            and what the two renderings do not share.
    """

    student_end: NDArray[np.int32]
    teacher_end: NDArray[np.int32]
    gap: NDArray[np.bool_]

    @property
    def count(self) -> int:
        """Chunks that are no gap."""
        return int((~self.gap).sum())

    @property
    def one_to_one(self) -> int:
        """Chunks of one token on either side."""
        return int(self.is_one_to_one.sum())

    @property
    def is_one_to_one(self) -> NDArray[np.bool_]:
        """bool [C]: chunks of one token on either side, eos of both included, gaps not."""
        student = np.diff(self.student_end, prepend=np.int32(0))
        teacher = np.diff(self.teacher_end, prepend=np.int32(0))
        single_C: NDArray[np.bool_] = (student == 1) & (teacher == 1) & ~self.gap
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
    gap_C = np.zeros(len(s_end_C), np.bool_)
    gap_C[offset_N[:-1][lead_N]] = True
    spans = [slice(first, last) for first, last in pairwise(offset_N.tolist())]
    return [Chunks(s_end_C[span], t_end_C[span], gap_C[span]) for span in spans]


@dataclass(frozen=True)
class Joined:
    """One sample with both tokenizations.

    Attributes:
        at: its place in the batch.
        encoded: the student's tokens, with their ends in the text of the capture.
        chunks: they partition a conversation; behind the last of a text some tokens may be left.
        learn: of a conversation, bool [S]: the student's tokens that are taught; None of a text.
        lost_bytes: of a conversation, how many taught bytes of the teacher's the student cannot have.
    """

    at: int
    encoded: Encoded
    chunks: Chunks
    learn: NDArray[np.bool_] | None = None
    lost_bytes: int = 0


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
        offsets_of([len(mine.ends) for _, mine in known]),
        theirs.flatten().to_numpy(),
        offsets_of(pc.list_value_length(theirs).to_numpy()),
        np.array([bool(len(mine.ids)) and int(mine.ids[-1]) == eos_id for _, mine in known]),
        batch["teacher_eos"].to_numpy(zero_copy_only=False)[at_N],
    )
    return [Joined(at, mine, chunks) for (at, mine), chunks in zip(known, cuts, strict=True)]


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of some consecutive lists starts, and where the last ends, int64 [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def gaps(samples: Sequence[Joined]) -> NDArray[np.bool_]:
    """bool [C]: which chunks of all samples are gaps."""
    return np.concatenate([np.zeros(0, np.bool_), *(sample.chunks.gap for sample in samples)])


def chunks_per_sample(samples: Sequence[Joined]) -> NDArray[np.int64]:
    """int64 [N]."""
    return np.array([len(sample.chunks.student_end) for sample in samples], np.int64)
