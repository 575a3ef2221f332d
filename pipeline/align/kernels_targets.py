"""The loops that turn teacher rows into targets, compiled by numba.

Shapes: C chunks, R teacher rows, K kept entries of all rows together, U teacher vocabulary. All logarithms are
natural. ``sql/`` says the same in plain SQL, which the tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.align.kernels import compiled

_TO_REST = -1
# Columns of the mass table of ``pkl_targets``.
MASS_CLASSES = ("exact", "pieces", "moved", "lost", "rest")
_MOVED, _LOST, _REST = range(2, 5)

Targets = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]


@compiled
def _log_total(logprob_K: NDArray[np.float64], low: int, high: int, rest: float) -> float:
    """log of the sum of a row's entries and REST: what normalises the row."""
    top = rest
    for at in range(low, high):
        top = max(top, logprob_K[at])
    total = np.exp(rest - top)
    for at in range(low, high):
        total += np.exp(logprob_K[at] - top)
    return float(top + np.log(total))


@compiled
def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -np.inf else high + np.log1p(np.exp(low - high))


@compiled
def _log_complement(logprob: float) -> float:
    """log(1 - e^logprob) for a log-probability, without cancellation at either end."""
    if logprob > -np.log(2.0):
        return float(np.log(-np.expm1(logprob)))
    return float(np.log1p(-np.exp(logprob)))


@compiled
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


@compiled
def merged(
    count_C: NDArray[np.int32], ids_K: NDArray[np.int32], logprob_K: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Each target's entries with equal ids joined, most probable first (then by id): count, ids, float32 logprob."""
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
def normalised(
    offsets_R: NDArray[np.int64], logprob_K: NDArray[np.float64], rest_R: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and REST over what each adds up to, which the codec's rounding moves from 1; [K] and [R]."""
    out_K, out_R = logprob_K.copy(), rest_R.copy()
    for row in range(len(rest_R)):
        low, high = offsets_R[row], offsets_R[row + 1]
        total = _log_total(logprob_K, low, high, rest_R[row])
        out_K[low:high] -= total
        out_R[row] -= total
    return out_K, out_R


@compiled
def tempered(
    offsets_R: NDArray[np.int64], logprob_K: NDArray[np.float64], rest_R: NDArray[np.float64], tau: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows at a temperature: logprob / tau, scaled so that a row sums to 1 with its REST there.

    Args:
        offsets_R, logprob_K: rows at temperature 1.
        rest_R: log of REST at ``tau``; NaN = unknown, the entries then sum to 1 alone.
        tau: the temperature.

    Returns:
        Log-probabilities [K], and [R] what is taken from logprob / tau to get them.
    """
    out_K, shift_R = logprob_K / tau, np.empty(len(rest_R), np.float64)
    for row in range(len(rest_R)):
        low, high = offsets_R[row], offsets_R[row + 1]
        shift_R[row] = _log_total(out_K, low, high, -np.inf)
        if not np.isnan(rest_R[row]):
            shift_R[row] -= _log_complement(rest_R[row])
        out_K[low:high] -= shift_R[row]
    return out_K, shift_R


@compiled
def mean_rows(
    start_C: NDArray[np.int64],
    end_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Mean log-probabilities of rows ``start_C:end_C`` over the union of their kept ids: one row per chunk.

    A row that did not keep an id spreads its REST evenly over the ids it did not keep; without REST the id has no
    probability there, hence none in the mean, and is left out.

    Args:
        start_C, end_C: rows of each chunk; a negative start gives an empty row.
        offsets_R, ids_K, logprob_K, rest_R: rows, normalised with REST.
        size: U, what the ids not kept are counted from.

    Returns:
        offsets int64 [C + 1], ids int32, log-probabilities float64 (not renormalised), and [C] the log of what they
        leave to 1.
    """
    most = 0
    for chunk in range(len(start_C)):
        most += offsets_R[end_C[chunk]] - offsets_R[start_C[chunk]] if start_C[chunk] >= 0 else 0
    offsets, rest_C = np.zeros(len(start_C) + 1, np.int64), np.zeros(len(start_C), np.float64)
    out_ids, out_log = np.empty(most, np.int32), np.empty(most, np.float64)
    used = 0
    for chunk in range(len(start_C)):
        if start_C[chunk] >= 0:
            rows = offsets_R[start_C[chunk] : end_C[chunk] + 1]
            low, high = rows[0], rows[-1]
            floor_n = _floors(rows, rest_R[start_C[chunk] : end_C[chunk]], size)
            ids, logprob = _mean_row(rows - low, ids_K[low:high], logprob_K[low:high], floor_n)
            out_ids[used : used + len(ids)], out_log[used : used + len(ids)] = ids, logprob
            used += len(ids)
            rest_C[chunk] = _log_complement(min(0.0, _log_total(logprob, 0, len(ids), -np.inf)))
        offsets[chunk + 1] = used
    return offsets, out_ids[:used], out_log[:used], rest_C


@compiled
def _floors(offsets: NDArray[np.int64], rest_n: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Log-probability of each id that a row did not keep; -inf where nothing is left for them."""
    floor_n = np.full(len(rest_n), -np.inf, np.float64)
    for row in range(len(rest_n)):
        unkept = size - (offsets[row + 1] - offsets[row])
        if unkept > 0:
            floor_n[row] = rest_n[row] - np.log(unkept)
    return floor_n


@compiled
def _mean_row(
    offsets: NDArray[np.int64], ids: NDArray[np.int32], logprob: NDArray[np.float64], floor_n: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """One chunk of ``mean_rows``: ids ascending, with their mean log-probability over the n rows."""
    n = len(floor_n)
    row_of = np.empty(len(ids), np.int64)
    for row in range(n):
        row_of[offsets[row] : offsets[row + 1]] = row
    order = np.argsort(ids, kind="mergesort")
    out_ids, out_log = np.empty(len(ids), np.int32), np.empty(len(ids), np.float64)
    used = at = 0
    while at < len(order):
        token, total, row = ids[order[at]], 0.0, 0
        while at < len(order) and ids[order[at]] == token:
            # rows come in order: those passed over did not keep the token
            while row < row_of[order[at]]:
                total, row = total + floor_n[row], row + 1
            total, row, at = total + logprob[order[at]], row + 1, at + 1
        while row < n:
            total, row = total + floor_n[row], row + 1
        if total > -np.inf:
            out_ids[used], out_log[used] = token, total / n
            used += 1
    return out_ids[:used], out_log[:used]


@compiled
def pkl_targets(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    route_U: NDArray[np.int32],
    column_U: NDArray[np.int8],
    closed: bool,
) -> Targets:
    """P-KL's target of each chunk: unreached mass moved, equal ids merged, what was left out renormalised away.

    Args:
        row_C: teacher row of each chunk, -1 = none (count 0, REST 1).
        offsets_R: entries of row r are ``offsets_R[r]:offsets_R[r + 1]``, [R + 1].
        ids_K: teacher ids.
        logprob_K: nats; a row sums to 1 with REST, or alone where REST is unknown.
        rest_R: nats, log of the mass not kept; NaN = unknown.
        route_U: where each teacher id goes: itself, another id, -1 REST, -2 left out and the row renormalised.
        column_U: 0 an exact row reaches the id, 1 only pieces do, -1 unreached.
        closed: leave REST out (it is then -inf), as where REST is unknown (then NaN).

    Returns:
        count int32 [C], ids int32, log-probability float32, REST log-probability float32 [C], and the share of mass
        per ``MASS_CLASSES`` (of the row before anything moves) as float64 [C, 5].
    """
    chunks = len(row_C)
    most = _entries(row_C, offsets_R)
    count_C, rest_C = np.zeros(chunks, np.int32), np.zeros(chunks, np.float32)
    out_ids, out_log = np.empty(most, np.int32), np.empty(most, np.float32)
    mass_C5 = np.zeros((chunks, 5), np.float64)
    used = 0
    for chunk in range(chunks):
        row = row_C[chunk]
        if row < 0:
            continue
        low, high, unknown = offsets_R[row], offsets_R[row + 1], np.isnan(rest_R[row])
        ids, logprob, rest = _routed(
            ids_K[low:high], logprob_K[low:high], rest_R[row], route_U, column_U, closed or unknown, mass_C5[chunk]
        )
        ids, stored = _merge_sorted(ids, logprob)
        count_C[chunk], rest_C[chunk] = len(ids), np.nan if unknown and len(ids) else rest
        out_ids[used : used + len(ids)], out_log[used : used + len(ids)] = ids, stored
        used += len(ids)
    return count_C, out_ids[:used], out_log[:used], rest_C, mass_C5


@compiled
def _entries(row_C: NDArray[np.int64], offsets_R: NDArray[np.int64]) -> int:
    """Entries of the rows of all chunks together."""
    most = 0
    for row in row_C:
        most += offsets_R[row + 1] - offsets_R[row] if row >= 0 else 0
    return most


@compiled
def _routed(
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    rest: float,
    route_U: NDArray[np.int32],
    column_U: NDArray[np.int8],
    closed: bool,
    mass_5: NDArray[np.float64],
) -> tuple[NDArray[np.int32], NDArray[np.float64], float]:
    """One row's entries after routing (ids may repeat), with the REST that goes with them; fills ``mass_5``."""
    mass_5[_REST] = 0.0 if np.isnan(rest) else np.exp(rest)
    if closed:
        rest = -np.inf
    ids, logprob = np.empty(len(ids_K), np.int32), np.empty(len(ids_K), np.float64)
    used = 0
    for at in range(len(ids_K)):
        token, p = ids_K[at], logprob_K[at]
        to = route_U[token]
        mass_5[_LOST if to < 0 else column_U[token] if to == token else _MOVED] += np.exp(p)
        if to >= 0:
            ids[used], logprob[used] = to, p
            used += 1
        elif to == _TO_REST and not closed:
            rest = _log_add(rest, p)
    left = _log_total(logprob, 0, used, rest)
    # All mass was left out: no target remains, and REST stands for it.
    if left == -np.inf or np.isnan(left):
        return ids[:0], logprob[:0], 0.0
    return ids[:used], logprob[:used] - left, rest - left


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
        row_C, offsets_R, ids_K, logprob_K: as in ``pkl_targets``.
        pair_U: the student id paired with each teacher id, or -1.

    Returns:
        paired count int32 [C], student ids int32, log-probability float32 (descending, then by id); other count
        int32 [C], log-probability float32 (descending).
    """
    most = _entries(row_C, offsets_R)
    paired_C, other_C = np.zeros(len(row_C), np.int32), np.zeros(len(row_C), np.int32)
    ids, paired, other = np.empty(most, np.int32), np.empty(most, np.float32), np.empty(most, np.float32)
    inside = outside = 0
    for chunk in range(len(row_C)):
        row = row_C[chunk]
        if row < 0:
            continue
        low, high = offsets_R[row], offsets_R[row + 1]
        pairs, p = pair_U[ids_K[low:high]], logprob_K[low:high]
        mine, theirs = _merge_sorted(pairs[pairs >= 0], p[pairs >= 0])
        rank = -np.sort(-p[pairs < 0])
        paired_C[chunk], other_C[chunk] = len(mine), len(rank)
        ids[inside : inside + len(mine)], paired[inside : inside + len(mine)] = mine, theirs
        other[outside : outside + len(rank)] = rank
        inside, outside = inside + len(mine), outside + len(rank)
    return paired_C, ids[:inside], paired[:inside], other_C, other[:outside]
