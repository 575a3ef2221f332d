"""Chunks: the smallest spans of a sample that both tokenizations cut at the same bytes.

Shapes: N samples, S student tokens, T teacher tokens, C chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.align.kernels import boundaries
from pipeline.store.columns import flat, list_lengths
from pipeline.tokens import Encoded


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
        student = np.diff(self.student_end, prepend=np.int32(0))
        teacher = np.diff(self.teacher_end, prepend=np.int32(0))
        return int(((student == 1) & (teacher == 1))[int(self.lead) :].sum())


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
    student, teacher = _body(student_end_S, student_eos), _body(teacher_end_T, teacher_eos)
    s_end, t_end = boundaries(student, teacher)
    lead = (np.searchsorted(student, 0, side="right"), np.searchsorted(teacher, 0, side="right"))
    has_lead = bool(lead[0] or lead[1])
    if has_lead:
        s_end, t_end = np.insert(s_end, 0, lead[0]), np.insert(t_end, 0, lead[1])
    if student_eos and teacher_eos and _covered(s_end, student) and _covered(t_end, teacher):
        s_end, t_end = np.append(s_end, len(student_end_S)), np.append(t_end, len(teacher_end_T))
    chunks = Chunks(s_end.astype(np.int32), t_end.astype(np.int32), has_lead)
    _check(chunks)
    return chunks


def _body(end: NDArray[np.int32], eos: bool) -> NDArray[np.int32]:
    assert not len(end) or (end[0] >= 0 and bool((np.diff(end) >= 0).all())), "byte ends must not decrease"
    return end[: len(end) - int(eos)]


def _covered(cuts: NDArray[np.int32], body: NDArray[np.int32]) -> bool:
    return int(cuts[-1]) == len(body) if len(cuts) else not len(body)


def _check(chunks: Chunks) -> None:
    skip = int(chunks.lead)
    for end in (chunks.student_end, chunks.teacher_end):
        start = end[0] if chunks.lead else 0
        assert (np.diff(end[skip:], prepend=start) > 0).all(), "chunks must advance on both sides"


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
    ends, stops = flat(batch, "teacher_end"), np.cumsum(list_lengths(batch, "teacher_end"))
    teacher_eos = batch["teacher_eos"].to_pylist()
    found = []
    for at, (mine, theirs) in enumerate(zip(encoded, np.split(ends, stops[:-1]), strict=True)):
        if mine is not None:
            student_eos = bool(len(mine.ids)) and int(mine.ids[-1]) == eos_id
            chunks = cut(mine.ends, theirs, student_eos=student_eos, teacher_eos=bool(teacher_eos[at]))
            found.append(Joined(at, mine, chunks))
    return found


def chunks_per_sample(samples: Sequence[Joined]) -> NDArray[np.int64]:
    """int64 [N]."""
    return np.array([len(sample.chunks.student_end) for sample in samples], np.int64)
