"""The loops over teacher rows: their sums, other temperatures, and means of several, compiled by numba.

Shapes: C chunks, R teacher rows, K kept entries of all rows together, U teacher vocabulary. All logarithms are
natural. ``sql/`` says the same in plain SQL, which the tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled


@compiled
def _log_total(logprob_K: NDArray[np.float64], low: int, high: int, rest: float) -> float:
    """log of the sum of a row's entries and the tail mass: what normalises the row."""
    # the largest is taken out first, so that nothing overflows and the largest term is exactly 1
    top = rest
    for at in range(low, high):
        top = max(top, logprob_K[at])
    total = np.exp(rest - top)
    for at in range(low, high):
        total += np.exp(logprob_K[at] - top)
    return float(top + np.log(total))


@compiled
def _log_complement(logprob: float) -> float:
    """log(1 - e^logprob) for a log-probability, without cancellation at either end."""
    # above one half, 1 - p cancels unless expm1 takes it; below, e^logprob is small beside 1 and log1p is exact
    if logprob > -np.log(2.0):
        return float(np.log(-np.expm1(logprob)))
    return float(np.log1p(-np.exp(logprob)))


@compiled
def normalised(
    offsets_R: NDArray[np.int64], logprob_K: NDArray[np.float64], rest_R: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and the tail mass over what each adds up to, which the codec's rounding moves from 1; [K] and [R]."""
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
    """Rows at a temperature: logprob / tau, scaled so that a row sums to 1 with its tail mass there.

    Args:
        offsets_R, logprob_K: rows at temperature 1.
        rest_R: log of the tail mass at ``tau``; NaN = unknown, the entries then sum to 1 alone.
        tau: the temperature.

    Returns:
        Log-probabilities [K], and [R] what is taken from logprob / tau to get them.
    """
    out_K, shift_R = logprob_K / tau, np.empty(len(rest_R), np.float64)
    for row in range(len(rest_R)):
        low, high = offsets_R[row], offsets_R[row + 1]
        shift_R[row] = _log_total(out_K, low, high, -np.inf)
        # entries are to sum to what the tail mass leaves, not to 1
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

    A row that did not keep an id spreads its tail mass evenly over the ids it did not keep; without a tail mass the id
    has no probability there, hence none in the mean, and is left out.

    Args:
        start_C, end_C: rows of each chunk; a negative start gives an empty row.
        offsets_R, ids_K, logprob_K, rest_R: rows, normalised with the tail mass.
        size: U, what the ids not kept are counted from.

    Returns:
        offsets int64 [C + 1], ids int32, log-probabilities float64 (not renormalised), and [C] the log of what they
        leave to 1.
    """
    # no union of rows has more ids than the rows have entries
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
            # means of logarithms sum to less than 1; rounding may take a row that kept all ids a hair above it
            rest_C[chunk] = _log_complement(min(0.0, _log_total(logprob, 0, len(ids), -np.inf)))
        offsets[chunk + 1] = used
    return offsets, out_ids[:used], out_log[:used], rest_C


@compiled
def _floors(offsets: NDArray[np.int64], rest_n: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Log-probability of each id that a row did not keep; -inf where nothing is left for them."""
    floor_n = np.full(len(rest_n), -np.inf, np.float64)
    for row in range(len(rest_n)):
        # a row that kept the whole vocabulary has no id that its tail mass could be spread over
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
    # sorted by id, and stably: equal ids stand together, in the order of their rows
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
