"""The projection of teacher rows through a sparse map, compiled by numba.

Shapes: C chunks, R teacher rows, K kept entries of all rows together, U teacher vocabulary, M nonzeros of the map. All
logarithms are natural. ``sql/project.sql`` and ``sql/pkl.sql`` say the same, which the tests compare with.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

# Columns of the mass table of ``project_rows``.
MASS_CLASSES = ("exact", "pieces", "moved", "lost", "rest")
_REST = 4
# What becomes of a teacher token's mass: it stays, goes to the tokens of the map, to the tail mass, or is left out.
FATES = ("stays", "spread", "to rest", "left out")
_STAYS, _SPREAD, _TO_REST = range(3)
# Up to so many entries are ordered without sorting, whose set-up costs more.
_FEW = 128
_TINY = 1e-300  # where exp has no number left

Targets = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]


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
        row_C: teacher row of each chunk, -1 = none (count 0, tail 1).
        offsets_R: entries of row r are ``offsets_R[r]:offsets_R[r + 1]``, [R + 1].
        ids_K: teacher ids, each once in a row.
        logprob_K, p_K: nats, and their probabilities; a row sums to 1 with the tail mass, or alone without.
        rest_R: nats, log of the mass not kept; NaN = unknown.
        fate_U: of ``FATES``.
        mass_class_U: index into ``MASS_CLASSES``.
        offset_U, to_M, share_M: id u goes to ``to_M[offset_U[u]:offset_U[u + 1]]`` with these shares, if it is spread.
        closed: leave the tail mass out (it is then -inf), as where the tail mass is unknown (then NaN).
        most: entries kept of a target; what the others have goes to the tail mass, or is renormalised away without one.

    Returns:
        count int32 [C], ids int32, log-probability float32 (falling, then by id), tail log-probability float32 [C],
        and the share of mass per ``MASS_CLASSES`` (of the row before anything moves) as float64 [C, 5].
    """
    chunks = len(row_C)
    all_, widest, highest = _projected(row_C, offsets_R, ids_K, fate_U, offset_U, to_M)
    # written for the whole batch and cut off at the end; scratch is as wide as the widest distribution, made once
    count_C, rest_C = np.zeros(chunks, np.int32), np.zeros(chunks, np.float32)
    out_ids, out_log = np.empty(all_, np.int32), np.empty(all_, np.float32)
    mass_C5 = np.zeros((chunks, 5), np.float64)
    slot = np.full(highest + 1, -1, np.int32)
    ids, p, key = np.empty(widest, np.int32), np.empty(widest, np.float64), np.empty(widest, np.int64)
    # The bits of a positive float order like the number, so one integer holds magnitude and id and sorts by both.
    magnitude = np.empty(max(1, widest), np.float32)
    bits = magnitude.view(np.uint32)
    used = 0
    for chunk in range(chunks):
        row = row_C[chunk]
        if row < 0:
            continue
        unknown = np.isnan(rest_R[row])
        rest = 0.0 if unknown else np.exp(rest_R[row])
        mass_C5[chunk, _REST] = rest
        low, high, entries, to_rest, sum_p = offsets_R[row], offsets_R[row + 1], 0, 0.0, 0.0
        stays = _all_stay(low, high, ids_K, fate_U)
        if stays:  # most rows: nothing meets anything
            for at in range(low, high):
                mass_C5[chunk, mass_class_U[ids_K[at]]] += p_K[at]
                sum_p += p_K[at]
        else:
            entries, to_rest, sum_p = _spread(
                low, high, ids_K, p_K, fate_U, mass_class_U, offset_U, to_M, share_M, slot, ids, p, mass_C5[chunk]
            )
        rest = 0.0 if closed or unknown else rest + to_rest
        total = rest + sum_p
        # All mass was left out: no target remains, and the tail mass stands for it.
        if not total > 0:
            continue
        if stays:
            entries, scale = high - low, np.log(total)
            for at in range(entries):
                # from the logarithm that is there: its exp and log again would cost precision and time
                magnitude[at] = max(0.0, scale - logprob_K[low + at])
                key[at] = (np.int64(bits[at]) << 32) | ids_K[low + at]
        else:
            for at in range(entries):
                # a sum over another may come out a hair above 1
                magnitude[at] = max(0.0, 0.0 - np.log(max(p[at], _TINY) / total))
                key[at] = (np.int64(bits[at]) << 32) | ids[at]
        kept = _sorted_by_key(key, entries, most)
        for at in range(kept):
            # back through the same bits: what is stored is exactly what was sorted by
            bits[0] = np.uint32(key[at] >> 32)
            out_log[used + at], out_ids[used + at] = -magnitude[0], np.int32(key[at] & 0xFFFFFFFF)
        if kept < entries:
            rest = _cut_off(out_log[used : used + kept], rest / total, closed or unknown)
            rest_C[chunk] = np.log(rest) if rest > 0 else -np.inf
        elif to_rest > 0 or rest == 0:  # mass was added to it, or it is left out
            rest_C[chunk] = np.log(rest / total) if rest > 0 else -np.inf
        else:  # nothing was: in logarithms, which do not underflow
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
def _all_stay(low: int, high: int, ids_K: NDArray[np.int32], fate_U: NDArray[np.int8]) -> bool:
    for at in range(low, high):  # noqa: SIM110 - numba compiles no generator
        if fate_U[ids_K[at]] != _STAYS:
            return False
    return True


@compiled
def _spread(
    low: int,
    high: int,
    ids_K: NDArray[np.int32],
    p_K: NDArray[np.float64],
    fate_U: NDArray[np.int8],
    mass_class_U: NDArray[np.int8],
    offset_U: NDArray[np.int64],
    to_M: NDArray[np.int32],
    share_M: NDArray[np.float64],
    slot: NDArray[np.int32],
    ids: NDArray[np.int32],
    p: NDArray[np.float64],
    mass_5: NDArray[np.float64],
) -> tuple[int, float, float]:
    """One row's entries through the map into ``ids`` and ``p``, each id once, and ``mass_5``.

    ``slot``, all -1 before and after, says where an id stands.

    Returns:
        how many ids there are, the mass that goes to the tail mass, and that of the ids.
    """
    entries, to_rest, sum_p = 0, 0.0, 0.0
    for at in range(low, high):
        token = ids_K[at]
        mass_5[mass_class_U[token]] += p_K[at]
        fate = fate_U[token]
        if fate == _STAYS:
            entries = _put(token, p_K[at], entries, slot, ids, p)
            sum_p += p_K[at]
        elif fate == _SPREAD:
            for to in range(offset_U[token], offset_U[token + 1]):
                share = p_K[at] * share_M[to]
                entries = _put(to_M[to], share, entries, slot, ids, p)
                sum_p += share
        elif fate == _TO_REST:
            to_rest += p_K[at]
    # only what was used is put back: the table is as large as the vocabulary
    for at in range(entries):
        slot[ids[at]] = -1
    return entries, to_rest, sum_p


@compiled
def _put(
    token: int, share: float, entries: int, slot: NDArray[np.int32], ids: NDArray[np.int32], p: NDArray[np.float64]
) -> int:
    """Add an entry to those of a row, or to the one of the same id; how many there are now."""
    at = slot[token]
    if at >= 0:
        p[at] += share
        return entries
    slot[token] = entries
    ids[entries], p[entries] = token, share
    return entries + 1


@compiled
def _sorted_by_key(key: NDArray[np.int64], entries: int, most: int) -> int:
    """The ``most`` smallest of ``key[:found]`` come first, in order; how many they are."""
    kept = min(entries, most)
    if kept < entries:
        _smallest_first(key, entries, kept)
    if kept > _FEW:
        key[:kept].sort()
        return kept
    for at in range(1, kept):  # rows come in order, and few entries of one move
        value, place = key[at], at
        while place > 0 and key[place - 1] > value:
            key[place] = key[place - 1]
            place -= 1
        key[place] = value
    return kept


@compiled
def _smallest_first(key: NDArray[np.int64], size: int, wanted: int) -> None:
    """Quickselect: the ``wanted`` smallest of ``key[:size]`` come first, in any order."""
    low, high = 0, size - 1
    while low < high:
        # Hoare's partition around the middle: distributions come nearly sorted, where an end would be the worst choice
        pivot, left, right = key[(low + high) >> 1], low, high
        while left <= right:
            while key[left] < pivot:
                left += 1
            while key[right] > pivot:
                right -= 1
            if left <= right:
                key[left], key[right] = key[right], key[left]
                left, right = left + 1, right - 1
        # go on in the half that the border of the wanted lies in; between the halves all keys are equal
        if wanted - 1 <= right:
            high = right
        elif wanted - 1 >= left:
            low = left
        else:
            return


@compiled
def _cut_off(log_K: NDArray[np.float32], rest: float, closed: bool) -> float:
    """The tail mass of entries that are not all of their target's; where it is left out they are scaled up to 1."""
    kept = np.exp(log_K.astype(np.float64)).sum()
    if not closed:
        return float(max(rest, 1.0 - kept))
    log_K -= np.float32(np.log(kept))
    return 0.0
