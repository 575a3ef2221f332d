"""The loops that turn teacher rows into targets, compiled by numba.

Shapes: C chunks, R teacher rows, K kept entries of all rows together, U teacher vocabulary. All logarithms are
natural. ``sql/`` says the same in plain SQL, which the tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

# Up to so many entries are merged and ordered without sorting, whose set-up costs more.
_FEW = 128


@compiled
def _log_add(a: float, b: float) -> float:
    # the larger is taken out, so that exp never overflows
    high, low = max(a, b), min(a, b)
    return high if low == -np.inf else high + np.log1p(np.exp(low - high))


@compiled
def _merge_sorted(
    ids: NDArray[np.int32], logprob: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Join equal ids, then order by float32 log-probability descending and id ascending."""
    out_ids, out_log = np.empty(len(ids), np.int32), np.empty(len(ids), np.float64)
    used = _joined_few(ids, logprob, out_ids, out_log) if len(ids) <= _FEW else _joined(ids, logprob, out_ids, out_log)
    sorted_ids, sorted_log = np.empty(used, np.int32), np.empty(used, np.float32)
    if used <= _FEW:
        _ordered(out_ids, out_log, 0, used, sorted_ids, sorted_log, 0)
        return sorted_ids, sorted_log
    # The order is that of the values stored, so that a reader can check it.
    stored = out_log[:used].astype(np.float32)
    by_id = np.argsort(out_ids[:used], kind="mergesort")
    ranked = by_id[np.argsort(-stored[by_id], kind="mergesort")]
    return out_ids[:used][ranked], stored[ranked]


@compiled
def _joined_few(
    ids: NDArray[np.int32], logprob: NDArray[np.float64], out_ids: NDArray[np.int32], out_log: NDArray[np.float64]
) -> int:
    """Each id once, in the order of their first; looking through those there are is cheap for a row."""
    used = 0
    for at in range(len(ids)):
        place = 0
        while place < used and out_ids[place] != ids[at]:
            place += 1
        if place < used:
            out_log[place] = _log_add(out_log[place], logprob[at])
        else:
            out_ids[used], out_log[used] = ids[at], logprob[at]
            used += 1
    return used


@compiled
def _joined(
    ids: NDArray[np.int32], logprob: NDArray[np.float64], out_ids: NDArray[np.int32], out_log: NDArray[np.float64]
) -> int:
    """``_joined_few`` of many, by sorting; ids come out ascending."""
    used = 0
    for at in np.argsort(ids, kind="mergesort"):
        # sorted by id, an id that was there stands last
        if used and out_ids[used - 1] == ids[at]:
            out_log[used - 1] = _log_add(out_log[used - 1], logprob[at])
        else:
            out_ids[used], out_log[used] = ids[at], logprob[at]
            used += 1
    return used


@compiled
def masses(count_C: NDArray[np.int32], p_K: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the probabilities of each target add up to, [C]."""
    mass_C = np.zeros(len(count_C), np.float64)
    at = 0
    for chunk in range(len(count_C)):
        for _ in range(count_C[chunk]):
            mass_C[chunk] += p_K[at]
            at += 1
    return mass_C


@compiled
def merged(
    count_C: NDArray[np.int32], ids_K: NDArray[np.int32], logprob_K: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Each target's entries with equal ids joined, most probable first (then by id): count, ids, float32 logprob."""
    # room for all entries as they are: joining makes fewer, and what is not used is cut off at the end
    out_C = np.zeros(len(count_C), np.int32)
    out_ids, out_log = np.empty(len(ids_K), np.int32), np.empty(len(ids_K), np.float32)
    low = used = 0
    for at in range(len(count_C)):
        high = low + count_C[at]
        ids, stored = _merge_sorted(ids_K[low:high], logprob_K[low:high])
        out_ids[used : used + len(ids)], out_log[used : used + len(ids)] = ids, stored
        out_C[at], low, used = len(ids), high, used + len(ids)
    return out_C, out_ids[:used], out_log[:used]


@compiled
def _ordered(
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    low: int,
    high: int,
    out_ids: NDArray[np.int32],
    out_log: NDArray[np.float32],
    base: int,
) -> int:
    """Write entries ``low:high`` from ``base`` on, as float32, falling, then by id; how many.

    The order is that of the values stored, so that a reader can check it. By insertion: rows come in order, and few
    entries of one move.
    """
    for at in range(low, high):
        value, token, place = np.float32(logprob_K[at]), ids_K[at], base + at - low
        while place > base and (
            out_log[place - 1] < value or (out_log[place - 1] == value and out_ids[place - 1] > token)
        ):
            # equal values by id, so that a target does not depend on the order of its entries before
            out_log[place], out_ids[place] = out_log[place - 1], out_ids[place - 1]
            place -= 1
        out_log[place], out_ids[place] = value, token
    return high - low


@compiled
def split_targets(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    pair_U: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Targets of H-KL, GOLD, ULD and the sparse KL: each chunk's row, split at the teacher ids that have a pair.

    Args:
        row_C, offsets_R, ids_K, logprob_K: as in ``project_rows``.
        pair_U: the student id paired with each teacher id, or -1.

    Returns:
        paired count int32 [C], student ids int32, log-probability float32 (descending, then by id); other count
        int32 [C], log-probability float32 (descending).
    """
    # what is written goes to arrays of the whole batch, what is in work to such of the widest distribution
    most, widest = _entries(row_C, offsets_R)
    paired_C, other_C = np.zeros(len(row_C), np.int32), np.zeros(len(row_C), np.int32)
    ids, paired, other = np.empty(most, np.int32), np.empty(most, np.float32), np.empty(most, np.float32)
    mine, mine_log = np.empty(widest, np.int32), np.empty(widest, np.float64)
    once, once_log = np.empty(widest, np.int32), np.empty(widest, np.float64)
    inside = outside = 0
    for chunk in range(len(row_C)):
        row = row_C[chunk]
        if row < 0:  # no distribution: both counts stay 0
            continue
        pairs, first = 0, outside
        for at in range(offsets_R[row], offsets_R[row + 1]):
            pair = pair_U[ids_K[at]]
            if pair >= 0:
                mine[pairs], mine_log[pairs] = pair, logprob_K[at]
                pairs += 1
            else:
                outside = _ranked(np.float32(logprob_K[at]), other, first, outside)
        # several teacher tokens may have the same pair: their mass is added up
        if pairs <= _FEW:
            used = _joined_few(mine[:pairs], mine_log[:pairs], once, once_log)
        else:
            used = _joined(mine[:pairs], mine_log[:pairs], once, once_log)
        _ordered(once, once_log, 0, used, ids, paired, inside)
        paired_C[chunk], other_C[chunk] = used, outside - first
        inside += used
    return paired_C, ids[:inside], paired[:inside], other_C, other[:outside]


@compiled
def _ranked(value: np.float32, log_K: NDArray[np.float32], first: int, last: int) -> int:
    """Put a value among ``first:last``, which fall; how many there are then, counted as ``last`` is."""
    # by insertion from the end: entries come most probable first, and hardly ever move
    place = last
    while place > first and log_K[place - 1] < value:
        log_K[place] = log_K[place - 1]
        place -= 1
    log_K[place] = value
    return last + 1


@compiled
def _entries(row_C: NDArray[np.int64], offsets_R: NDArray[np.int64]) -> tuple[int, int]:
    """Entries of the rows of all chunks together, and of the widest."""
    most, widest = 0, 0
    for row in row_C:
        width = offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
        most, widest = most + width, max(widest, width)
    return most, widest
