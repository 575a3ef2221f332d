"""The loops of align that no array expression says well, compiled by numba: chunks and rows.

Shapes: S student tokens, T teacher tokens, C chunks, R teacher rows, K kept entries of all rows together. All
logarithms are natural.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled


@compiled
def boundaries(
    student_end_S: NDArray[np.int32], teacher_end_T: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut where both sequences end a token at the same byte above 0.

    Args:
        student_end_S: cumulative byte ends, non-decreasing; of equal ends the last token counts.
        teacher_end_T: likewise.

    Returns:
        Student and teacher index after each common boundary, int32 [C] each, strictly increasing.
    """
    most = min(len(student_end_S), len(teacher_end_T))
    s_end, t_end = np.empty(most, np.int32), np.empty(most, np.int32)
    s = t = cuts = 0
    # A merge of two sorted lists: the side that is behind takes a step, and where both end at one byte is a cut.
    while s < len(student_end_S) and t < len(teacher_end_T):
        a, b = student_end_S[s], teacher_end_T[t]
        # of several tokens that end at one byte the last one counts: those without width lie before the cut
        if a < b or (s + 1 < len(student_end_S) and student_end_S[s + 1] == a):
            s += 1
        elif b < a or (t + 1 < len(teacher_end_T) and teacher_end_T[t + 1] == b):
            t += 1
        else:
            s, t = s + 1, t + 1
            if a > 0:  # byte 0 is no end of a chunk: what lies there is the lead
                s_end[cuts], t_end[cuts] = s, t
                cuts += 1
    return s_end[:cuts], t_end[:cuts]


@compiled
def boundaries_batch(
    student_end_S: NDArray[np.int32],
    student_offset_N: NDArray[np.int64],
    teacher_end_T: NDArray[np.int32],
    teacher_offset_N: NDArray[np.int64],
    student_eos_N: NDArray[np.bool_],
    teacher_eos_N: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_], int]:
    """Chunks of N samples, as ``chunks.cut`` describes them.

    Args:
        student_end_S, teacher_end_T: byte ends of all samples' tokens, one sample after the other.
        student_offset_N, teacher_offset_N: where each sample's start, [N + 1].
        student_eos_N, teacher_eos_N: whether a sample's last token is eos.

    Returns:
        int64 [N + 1], where each sample's chunks start; int32 [C] each, student and teacher tokens of the sample up to
        the end of each chunk; bool [N], whether the first chunk holds only zero-width tokens; and the first sample
        whose ends decrease, or -1.
    """
    samples = len(student_eos_N)
    offset_N, lead_N = np.zeros(samples + 1, np.int64), np.zeros(samples, np.bool_)
    # a chunk has a token of either side, but for the lead and eos of each sample
    most = min(len(student_end_S), len(teacher_end_T)) + 2 * samples
    s_end_C, t_end_C = np.empty(most, np.int32), np.empty(most, np.int32)
    chunks = 0
    for n in range(samples):
        mine = student_end_S[student_offset_N[n] : student_offset_N[n + 1]]
        theirs = teacher_end_T[teacher_offset_N[n] : teacher_offset_N[n + 1]]
        if _decreases(mine) or _decreases(theirs):
            return offset_N, s_end_C[:chunks], t_end_C[:chunks], lead_N, n
        first, s_all, t_all = chunks, len(mine) - student_eos_N[n], len(theirs) - teacher_eos_N[n]
        s_lead, t_lead = _leading_zeros(mine, s_all), _leading_zeros(theirs, t_all)
        # tokens 0 bytes wide before the text make a chunk of their own, without a target
        if s_lead or t_lead:
            s_end_C[chunks], t_end_C[chunks], lead_N[n] = s_lead, t_lead, True
            chunks += 1
        s_end, t_end = boundaries(mine[:s_all], theirs[:t_all])
        s_end_C[chunks : chunks + len(s_end)], t_end_C[chunks : chunks + len(s_end)] = s_end, t_end
        chunks += len(s_end)
        s_last, t_last = (s_end_C[chunks - 1], t_end_C[chunks - 1]) if chunks > first else (0, 0)
        # eos of both sides is a chunk where nothing is left between the last cut and it, else it would hide tokens
        if student_eos_N[n] and teacher_eos_N[n] and s_last == s_all and t_last == t_all:
            s_end_C[chunks], t_end_C[chunks] = len(mine), len(theirs)
            chunks += 1
        offset_N[n + 1] = chunks
    return offset_N, s_end_C[:chunks], t_end_C[:chunks], lead_N, -1


@compiled
def _decreases(end: NDArray[np.int32]) -> bool:
    """Whether byte ends go back, or start below 0."""
    before = 0
    for value in end:
        if value < before:
            return True
        before = value
    return False


@compiled
def _leading_zeros(end: NDArray[np.int32], most: int) -> int:
    zeros = 0
    while zeros < most and end[zeros] == 0:
        zeros += 1
    return zeros


@compiled
def realised(
    realised_R: NDArray[np.float64], start_C: NDArray[np.int64], end_C: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Sum of the labels' log-probabilities over rows ``start_C:end_C``, float32 [C].

    0 where the span is empty, NaN where its start is negative: a chunk whose first token has no row.
    """
    out = np.full(len(start_C), np.nan, np.float32)
    for chunk in range(len(start_C)):
        if start_C[chunk] >= 0:
            out[chunk] = realised_R[start_C[chunk] : end_C[chunk]].sum()
    return out
