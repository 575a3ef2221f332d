"""The loops of align that no array expression says well, compiled by numba.

Shapes: S student tokens, T teacher tokens, C chunks, R teacher rows, K kept entries of all rows together, U teacher
vocabulary. All logarithms are natural. Every function here has a pure-SQL twin under ``sql/`` that the tests
compare it with.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

_TO_REST, _DROPPED = -1, -2
# Columns of the mass table of ``pkl_targets``.
MASS_CLASSES = ("exact", "pieces", "moved", "lost", "rest")
_EXACT, _PIECES, _MOVED, _LOST, _REST = range(5)

Targets = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]


_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(function: _F) -> _F:
    """Compile on first call; kept on disk, so that worker processes start fast."""
    return cast(_F, njit(cache=True)(function))


@_compiled
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


@_compiled
def _log_total(logprob_K: NDArray[np.float64], low: int, high: int, rest: float) -> float:
    """log of the sum of a row's entries and REST: what normalises the row."""
    top = rest
    for at in range(low, high):
        top = max(top, logprob_K[at])
    total = np.exp(rest - top)
    for at in range(low, high):
        total += np.exp(logprob_K[at] - top)
    return float(top + np.log(total))


@_compiled
def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -np.inf else high + np.log1p(np.exp(low - high))


@_compiled
def _merge_sorted(
    ids: NDArray[np.int32], logprob: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Join equal ids, then order by float32 log-probability descending and id ascending."""
    order = np.argsort(ids, kind="mergesort")
    out_ids, out_log = np.empty(len(ids), np.int32), np.empty(len(ids), np.float64)
    used = 0
    for at in order:
        if used and out_ids[used - 1] == ids[at]:
            out_log[used - 1] = _log_add(out_log[used - 1], logprob[at])
        else:
            out_ids[used], out_log[used] = ids[at], logprob[at]
            used += 1
    # The order is that of the values stored, so that a reader can check it.
    stored = out_log[:used].astype(np.float32)
    ranked = np.argsort(-stored, kind="mergesort")
    return out_ids[:used][ranked], stored[ranked]


@_compiled
def pkl_targets(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    route_U: NDArray[np.int32],
    column_U: NDArray[np.int8],
) -> Targets:
    """P-KL's target of each chunk: the row, normalised with REST, unreached mass moved, equal ids merged.

    Args:
        row_C: teacher row of each chunk, -1 = none (count 0, REST 1).
        offsets_R: entries of row r are ``offsets_R[r]:offsets_R[r + 1]``, [R + 1].
        ids_K: teacher ids.
        logprob_K: nats, as decoded.
        rest_R: nats, log of the mass not kept.
        route_U: where each teacher id goes: itself, another id, -1 REST, -2 left out and the row renormalised.
        column_U: 0 an exact row reaches the id, 1 only pieces do, -1 unreached.

    Returns:
        count int32 [C], ids int32, log-probability float32, REST log-probability float32 [C], and the share of mass
        per ``MASS_CLASSES`` (of the row before anything moves) as float64 [C, 5].
    """
    chunks = len(row_C)
    most = 0
    for row in row_C:
        most += offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
    count_C, rest_C = np.zeros(chunks, np.int32), np.zeros(chunks, np.float32)
    out_ids, out_log = np.empty(most, np.int32), np.empty(most, np.float32)
    mass_C5 = np.zeros((chunks, 5), np.float64)
    used = 0
    for chunk in range(chunks):
        row = row_C[chunk]
        if row < 0:
            continue
        ids, logprob, rest = _routed(
            ids_K, logprob_K, offsets_R[row], offsets_R[row + 1], rest_R[row], route_U, column_U, mass_C5[chunk]
        )
        ids, stored = _merge_sorted(ids, logprob)
        count_C[chunk], rest_C[chunk] = len(ids), rest
        out_ids[used : used + len(ids)], out_log[used : used + len(ids)] = ids, stored
        used += len(ids)
    return count_C, out_ids[:used], out_log[:used], rest_C, mass_C5


@_compiled
def _routed(
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    low: int,
    high: int,
    rest: float,
    route_U: NDArray[np.int32],
    column_U: NDArray[np.int8],
    mass_5: NDArray[np.float64],
) -> tuple[NDArray[np.int32], NDArray[np.float64], float]:
    """One row's entries after routing (ids may repeat), with the REST that goes with them; fills ``mass_5``."""
    total = _log_total(logprob_K, low, high, rest)
    rest -= total
    mass_5[_REST] = np.exp(rest)
    ids, logprob = np.empty(high - low, np.int32), np.empty(high - low, np.float64)
    used = 0
    for at in range(low, high):
        token, p = ids_K[at], logprob_K[at] - total
        to = route_U[token]
        mass_5[_LOST if to < 0 else column_U[token] if to == token else _MOVED] += np.exp(p)
        if to == _TO_REST:
            rest = _log_add(rest, p)
        elif to >= 0:
            ids[used], logprob[used] = to, p
            used += 1
    left = _log_total(logprob, 0, used, rest)
    # All mass was left out: no target remains, and REST stands for it.
    if left == -np.inf or np.isnan(left):
        return ids[:0], logprob[:0], 0.0
    return ids[:used], logprob[:used] - left, rest - left


@_compiled
def hkl_targets(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    pair_U: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """H-KL's target of each chunk: the same normalised row, split at the common set.

    Args:
        row_C, offsets_R, ids_K, logprob_K, rest_R: as in ``pkl_targets``.
        pair_U: the student id paired with each teacher id in C, or -1.

    Returns:
        common count int32 [C], student ids int32, log-probability float32 (descending, then by id); other count
        int32 [C], log-probability float32 (descending).
    """
    chunks = len(row_C)
    most = 0
    for row in row_C:
        most += offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
    common_C, other_C = np.zeros(chunks, np.int32), np.zeros(chunks, np.int32)
    ids, common, other = np.empty(most, np.int32), np.empty(most, np.float32), np.empty(most, np.float32)
    in_c = outside = 0
    for chunk in range(chunks):
        row = row_C[chunk]
        if row < 0:
            continue
        low, high = offsets_R[row], offsets_R[row + 1]
        total = _log_total(logprob_K, low, high, rest_R[row])
        pairs = pair_U[ids_K[low:high]]
        p = logprob_K[low:high] - total
        mine, theirs = _merge_sorted(pairs[pairs >= 0], p[pairs >= 0])
        rank = -np.sort(-p[pairs < 0])
        common_C[chunk], other_C[chunk] = len(mine), len(rank)
        ids[in_c : in_c + len(mine)], common[in_c : in_c + len(mine)] = mine, theirs
        other[outside : outside + len(rank)] = rank
        in_c, outside = in_c + len(mine), outside + len(rank)
    return common_C, ids[:in_c], common[:in_c], other_C, other[:outside]


@_compiled
def realised(
    realised_R: NDArray[np.float32], start_C: NDArray[np.int64], end_C: NDArray[np.int64], rows: int
) -> NDArray[np.float32]:
    """Sum of the realised tokens' log-probabilities over rows ``start_C:end_C`` of one sample, float32 [C].

    NaN where the span is empty, or reaches outside the sample's ``rows`` rows (a token without a row).
    """
    out = np.full(len(start_C), np.nan, np.float32)
    for chunk in range(len(start_C)):
        if 0 <= start_C[chunk] < end_C[chunk] <= rows:
            out[chunk] = realised_R[start_C[chunk] : end_C[chunk]].astype(np.float64).sum()
    return out
