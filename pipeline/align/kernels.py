"""The loops of align that no array expression says well, compiled by numba: chunks and rows.

Shapes: S student tokens, T teacher tokens, C chunks, R teacher rows, K kept entries of all rows together. All
logarithms are natural.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import compiled


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
    s = t = found = 0
    while s < len(student_end_S) and t < len(teacher_end_T):
        a, b = student_end_S[s], teacher_end_T[t]
        if a < b or (s + 1 < len(student_end_S) and student_end_S[s + 1] == a):
            s += 1
        elif b < a or (t + 1 < len(teacher_end_T) and teacher_end_T[t + 1] == b):
            t += 1
        else:
            s, t = s + 1, t + 1
            if a > 0:
                s_end[found], t_end[found] = s, t
                found += 1
    return s_end[:found], t_end[:found]


@compiled
def realised(
    realised_R: NDArray[np.float64], start_C: NDArray[np.int64], end_C: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Sum of the realised tokens' log-probabilities over rows ``start_C:end_C``, float32 [C].

    0 where the span is empty, NaN where its start is negative: a chunk whose first token has no row.
    """
    out = np.full(len(start_C), np.nan, np.float32)
    for chunk in range(len(start_C)):
        if start_C[chunk] >= 0:
            out[chunk] = realised_R[start_C[chunk] : end_C[chunk]].sum()
    return out


@compiled
def row_figures(
    offsets_R: NDArray[np.int64], logprob_K: NDArray[np.float64], rest_R: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy of each row in nats, REST as one cell, and its largest kept probability; [R] each."""
    entropy_R, top_R = np.zeros(len(rest_R), np.float64), np.zeros(len(rest_R), np.float64)
    for row in range(len(rest_R)):
        if rest_R[row] > -np.inf:
            entropy_R[row] = -np.exp(rest_R[row]) * rest_R[row]
        for at in range(offsets_R[row], offsets_R[row + 1]):
            p = np.exp(logprob_K[at])
            entropy_R[row] -= p * logprob_K[at]
            top_R[row] = max(top_R[row], p)
    return entropy_R, top_R
