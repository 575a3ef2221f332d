"""The loops that turn teacher rows into targets, compiled by numba.

Shapes: C chunks, R teacher rows, K kept entries of all rows together, U teacher vocabulary. All logarithms are
natural. ``sql/`` says the same in plain SQL, which the tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import compiled

# Columns of the mass table of ``project_rows``.
MASS_CLASSES = ("exact", "pieces", "moved", "lost", "rest")
_REST = 4
# What becomes of a teacher token's mass: it stays, goes to the tokens of the map, to REST, or is left out.
FATES = ("stays", "spread", "to rest", "left out")
_STAYS, _SPREAD, _TO_REST = range(3)
# Up to so many entries are merged and ordered without sorting, whose set-up costs more.
_FEW = 128

Targets = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]


@compiled
def _log_add(a: float, b: float) -> float:
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
        _ordered(out_ids, out_log, 0, used, 0.0, sorted_ids, sorted_log, 0)
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
        if used and out_ids[used - 1] == ids[at]:
            out_log[used - 1] = _log_add(out_log[used - 1], logprob[at])
        else:
            out_ids[used], out_log[used] = ids[at], logprob[at]
            used += 1
    return used


@compiled
def masses(count_C: NDArray[np.int32], logprob_K: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the probabilities of each target add up to, [C]."""
    mass_C = np.zeros(len(count_C), np.float64)
    at = 0
    for chunk in range(len(count_C)):
        for _ in range(count_C[chunk]):
            mass_C[chunk] += np.exp(np.float64(logprob_K[at]))
            at += 1
    return mass_C


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
def project_rows(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    p_K: NDArray[np.float64],
    rest_R: NDArray[np.float64],
    fate_U: NDArray[np.int8],
    mass_class_U: NDArray[np.int8],
    offset_U: NDArray[np.int64],
    to_M: NDArray[np.int32],
    share_M: NDArray[np.float64],
    closed: bool,
    most: int,
) -> Targets:
    """P-KL's target of each chunk: its row through a sparse map, equal ids merged, the most probable kept.

    Args:
        row_C: teacher row of each chunk, -1 = none (count 0, REST 1).
        offsets_R: entries of row r are ``offsets_R[r]:offsets_R[r + 1]``, [R + 1].
        ids_K: teacher ids, each once in a row.
        logprob_K, p_K: nats, and their probabilities; a row sums to 1 with REST, or alone where REST is unknown.
        rest_R: nats, log of the mass not kept; NaN = unknown.
        fate_U: of ``FATES``.
        mass_class_U: index into ``MASS_CLASSES``.
        offset_U, to_M, share_M: id u goes to ``to_M[offset_U[u]:offset_U[u + 1]]`` with these shares, if it is spread.
        closed: leave REST out (it is then -inf), as where REST is unknown (then NaN).
        most: entries kept of a target; what the others have goes to REST, or is renormalised away without one.

    Returns:
        count int32 [C], ids int32, log-probability float32 (falling, then by id), REST log-probability float32 [C],
        and the share of mass per ``MASS_CLASSES`` (of the row before anything moves) as float64 [C, 5].
    """
    chunks = len(row_C)
    all_, widest, highest = _projected(row_C, offsets_R, ids_K, fate_U, offset_U, to_M)
    count_C, rest_C = np.zeros(chunks, np.int32), np.zeros(chunks, np.float32)
    out_ids, out_log = np.empty(all_, np.int32), np.empty(all_, np.float32)
    mass_C5 = np.zeros((chunks, 5), np.float64)
    slot = np.full(highest + 1, -1, np.int32)
    ids, p, logprob = np.empty(widest, np.int32), np.empty(widest, np.float64), np.empty(widest, np.float64)
    used = 0
    for chunk in range(chunks):
        row = row_C[chunk]
        if row < 0:
            continue
        unknown = np.isnan(rest_R[row])
        rest = 0.0 if unknown else np.exp(rest_R[row])
        mass_C5[chunk, _REST] = rest
        low, high, to_rest, kept_p = offsets_R[row], offsets_R[row + 1], 0.0, 0.0
        stays = _all_stay(low, high, ids_K, fate_U)
        if stays:  # most rows: nothing meets anything
            for at in range(low, high):
                mass_C5[chunk, mass_class_U[ids_K[at]]] += p_K[at]
                kept_p += p_K[at]
        else:
            found, to_rest, kept_p = _spread(
                low, high, ids_K, logprob_K, p_K, fate_U, mass_class_U, offset_U, to_M, share_M,
                slot, ids, p, logprob, mass_C5[chunk],
            )  # fmt: skip
        rest = 0.0 if closed or unknown else rest + to_rest
        total = rest + kept_p
        # All mass was left out: no target remains, and REST stands for it.
        if not total > 0:
            continue
        if stays:
            kept = _ordered(ids_K, logprob_K, low, high, np.log(total), out_ids, out_log, used)
        else:
            kept = _ordered(ids, logprob, 0, found, np.log(total), out_ids, out_log, used)
        if kept > most:
            rest, kept = _cut_off(out_log[used : used + kept], most, rest / total, closed or unknown), most
            rest_C[chunk] = np.log(rest) if rest > 0 else -np.inf
        elif to_rest > 0 or rest == 0:
            rest_C[chunk] = np.log(rest / total) if rest > 0 else -np.inf
        else:
            rest_C[chunk] = rest_R[row] - np.log(total)
        rest_C[chunk] = np.nan if unknown and kept else rest_C[chunk]
        count_C[chunk] = kept
        used += kept
    return count_C, out_ids[:used], out_log[:used], rest_C, mass_C5


@compiled
def _projected(
    row_C: NDArray[np.int64],
    offsets_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    fate_U: NDArray[np.int8],
    offset_U: NDArray[np.int64],
    to_M: NDArray[np.int32],
) -> tuple[int, int, int]:
    """Entries of all chunks' rows after the map and before merging, of the widest row, and the largest id."""
    all_, widest, highest = 0, 0, len(fate_U) - 1
    for row in row_C:
        if row < 0:
            continue
        width = 0
        for at in range(offsets_R[row], offsets_R[row + 1]):
            token = ids_K[at]
            width += offset_U[token + 1] - offset_U[token] if fate_U[token] == _SPREAD else 1
        all_, widest = all_ + width, max(widest, width)
    for to in to_M:
        highest = max(highest, to)
    return all_, widest, highest


@compiled
def _spread(
    low: int,
    high: int,
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    p_K: NDArray[np.float64],
    fate_U: NDArray[np.int8],
    mass_class_U: NDArray[np.int8],
    offset_U: NDArray[np.int64],
    to_M: NDArray[np.int32],
    share_M: NDArray[np.float64],
    slot: NDArray[np.int32],
    ids: NDArray[np.int32],
    p: NDArray[np.float64],
    logprob: NDArray[np.float64],
    mass_5: NDArray[np.float64],
) -> tuple[int, float, float]:
    """One row's entries through the map into ``ids``, ``p`` and ``logprob``, each id once, and ``mass_5``.

    ``slot``, all -1 before and after, says where an id stands.

    Returns:
        how many ids there are, the mass that goes to REST, and that of the ids.
    """
    found, to_rest = 0, 0.0
    for at in range(low, high):
        token = ids_K[at]
        mass_5[mass_class_U[token]] += p_K[at]
        fate = fate_U[token]
        if fate == _STAYS:
            found = _put(token, p_K[at], logprob_K[at], found, slot, ids, p, logprob)
        elif fate == _SPREAD:
            for to in range(offset_U[token], offset_U[token + 1]):
                share = share_M[to]
                moved = logprob_K[at] if share == 1.0 else logprob_K[at] + np.log(share)
                found = _put(to_M[to], p_K[at] * share, moved, found, slot, ids, p, logprob)
        elif fate == _TO_REST:
            to_rest += p_K[at]
    kept_p = 0.0
    for at in range(found):
        slot[ids[at]] = -1
        kept_p += p[at]
    return found, to_rest, kept_p


@compiled
def _all_stay(low: int, high: int, ids_K: NDArray[np.int32], fate_U: NDArray[np.int8]) -> bool:
    for at in range(low, high):  # noqa: SIM110 - numba compiles no generator
        if fate_U[ids_K[at]] != _STAYS:
            return False
    return True


@compiled
def _put(
    token: int,
    share: float,
    log_share: float,
    found: int,
    slot: NDArray[np.int32],
    ids: NDArray[np.int32],
    p: NDArray[np.float64],
    logprob: NDArray[np.float64],
) -> int:
    """Add an entry to those of a row, or to the one of the same id; how many there are now."""
    at = slot[token]
    if at >= 0:
        p[at], logprob[at] = p[at] + share, _log_add(logprob[at], log_share)
        return found
    slot[token] = found
    ids[found], p[found], logprob[found] = token, share, log_share
    return found + 1


@compiled
def _ordered(
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    low: int,
    high: int,
    scale: float,
    out_ids: NDArray[np.int32],
    out_log: NDArray[np.float32],
    base: int,
) -> int:
    """Write entries ``low:high`` from ``base`` on, ``logprob - scale`` as float32, falling, then by id; how many.

    The order is that of the values stored, so that a reader can check it. By insertion: rows come in order, and few
    entries of one move.
    """
    for at in range(low, high):
        value, token, place = np.float32(logprob_K[at] - scale), ids_K[at], base + at - low
        while place > base and (
            out_log[place - 1] < value or (out_log[place - 1] == value and out_ids[place - 1] > token)
        ):
            out_log[place], out_ids[place] = out_log[place - 1], out_ids[place - 1]
            place -= 1
        out_log[place], out_ids[place] = value, token
    return high - low


@compiled
def _cut_off(log_K: NDArray[np.float32], most: int, rest: float, closed: bool) -> float:
    """REST with what lies beyond the first ``most`` entries; without REST these are scaled up to 1 instead."""
    beyond = np.exp(log_K[most:].astype(np.float64)).sum()
    if not closed:
        return float(rest + beyond)
    log_K[:most] -= np.float32(np.log1p(-beyond))
    return 0.0


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
    most, widest = _entries(row_C, offsets_R)
    paired_C, other_C = np.zeros(len(row_C), np.int32), np.zeros(len(row_C), np.int32)
    ids, paired, other = np.empty(most, np.int32), np.empty(most, np.float32), np.empty(most, np.float32)
    mine, mine_log = np.empty(widest, np.int32), np.empty(widest, np.float64)
    once, once_log = np.empty(widest, np.int32), np.empty(widest, np.float64)
    inside = outside = 0
    for chunk in range(len(row_C)):
        row = row_C[chunk]
        if row < 0:
            continue
        found, first = 0, outside
        for at in range(offsets_R[row], offsets_R[row + 1]):
            pair = pair_U[ids_K[at]]
            if pair >= 0:
                mine[found], mine_log[found] = pair, logprob_K[at]
                found += 1
            else:
                outside = _ranked(np.float32(logprob_K[at]), other, first, outside)
        if found <= _FEW:
            used = _joined_few(mine[:found], mine_log[:found], once, once_log)
        else:
            used = _joined(mine[:found], mine_log[:found], once, once_log)
        _ordered(once, once_log, 0, used, 0.0, ids, paired, inside)
        paired_C[chunk], other_C[chunk] = used, outside - first
        inside += used
    return paired_C, ids[:inside], paired[:inside], other_C, other[:outside]


@compiled
def _ranked(value: np.float32, log_K: NDArray[np.float32], first: int, last: int) -> int:
    """Put a value among ``first:last``, which fall; how many there are then, counted as ``last`` is."""
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
