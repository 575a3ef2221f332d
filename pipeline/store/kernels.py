"""The loops over a capture's entries, compiled by numba: what is wrong with rows, and what they say.

Shapes: R rows, K kept entries of all rows together, U teacher vocabulary. Levels count steps of the codec: the
log-probability of level l is -l * step.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

LEVELS = 1 << 12
RULES = (
    "",
    "topk_ids has an id outside 0 to {}",
    "an id stands twice in one row",
    "a row's kept probabilities and tail mass do not sum to 1",
)
"""What ``row_faults`` returns the index of."""
_OUTSIDE, _TWICE, _MASS = 1, 2, 3
_NO_TAIL, _TAIL_UNKNOWN = 65535, 65534


def level_table(step: float) -> NDArray[np.float64]:
    """Probability of the first 4,096 levels: rows hold few others, and looking up is faster than exp."""
    table: NDArray[np.float64] = np.exp(np.arange(LEVELS) * -np.float64(step))
    return table


@compiled
def _probability(level: int, step: float, table: NDArray[np.float64]) -> float:
    return float(table[level]) if level < len(table) else float(np.exp(-level * step))


@compiled
def row_faults(
    kept_R: NDArray[np.uint8],
    ids_K: NDArray[np.int32],
    gap_K: NDArray[np.uint16],
    tail_gap_R: NDArray[np.uint16],
    size: int,
    step: float,
    slack: float,
    table: NDArray[np.float64],
) -> NDArray[np.int8]:
    """The first rule of ``RULES`` that each row breaks, 0 = none, [R]; ``kept_R`` must add up to K.

    Args:
        size: U.
        step: unit of the gaps, in nats.
        slack: what a row's mass may lie beside the half step that rounding explains.
        table: of ``level_table``.
    """
    fault_R = np.zeros(len(kept_R), np.int8)
    seen_U = np.full(size, -1, np.int32)
    low, high = np.exp(-step / 2) - slack, np.exp(step / 2) + slack
    at = 0
    for row in range(len(kept_R)):
        level, mass = 0, 0.0
        for _ in range(kept_R[row]):
            token = ids_K[at]
            level += gap_K[at]
            at += 1
            mass += _probability(level, step, table)
            if token < 0 or token >= size:
                fault_R[row] = _OUTSIDE
            elif seen_U[token] == row:
                fault_R[row] = _TWICE if fault_R[row] == 0 else fault_R[row]
            else:
                seen_U[token] = row
        if tail_gap_R[row] < _TAIL_UNKNOWN:
            mass += _probability(int(tail_gap_R[row]), step, table)
        if fault_R[row] == 0 and (mass > high or mass < low):
            fault_R[row] = _MASS
    return fault_R


@compiled
def levels(kept_R: NDArray[np.uint8], gap_K: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Level of each entry: gaps added up within its row, [K]."""
    level_K = np.empty(len(gap_K), np.int64)
    at = 0
    for row in range(len(kept_R)):
        level = 0
        for _ in range(kept_R[row]):
            level += gap_K[at]
            level_K[at] = level
            at += 1
    return level_K


@compiled
def whole_rows(
    kept_R: NDArray[np.uint8],
    gap_K: NDArray[np.uint16],
    tail_gap_R: NDArray[np.uint16],
    step: float,
    table: NDArray[np.float64],
) -> tuple[
    NDArray[np.int64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
]:
    """Rows over what each adds up to, which the codec's rounding moves from 1.

    Returns:
        offsets int64 [R + 1]; log-probabilities and probabilities [K]; log of the tail mass [R], -inf = none, NaN =
        unknown; entropy in nats, the tail as one cell, and the largest probability [R].
    """
    rows = len(kept_R)
    offsets = np.zeros(rows + 1, np.int64)
    logprob_K, p_K = np.empty(len(gap_K), np.float64), np.empty(len(gap_K), np.float64)
    tail_R, entropy_R, top_R = np.empty(rows, np.float64), np.zeros(rows, np.float64), np.zeros(rows, np.float64)
    at = 0
    for row in range(rows):
        level, low = 0, at
        total = 0.0 if tail_gap_R[row] >= _TAIL_UNKNOWN else _probability(int(tail_gap_R[row]), step, table)
        for _ in range(kept_R[row]):
            level += gap_K[at]
            p_K[at] = _probability(level, step, table)
            logprob_K[at] = -level * step
            total += p_K[at]
            at += 1
        offsets[row + 1] = at
        scale, share, entropy = np.log(total), 1 / total, 0.0
        for entry in range(low, at):
            logprob_K[entry] -= scale
            p_K[entry] *= share
            entropy -= p_K[entry] * logprob_K[entry]
        if tail_gap_R[row] == _NO_TAIL:
            tail_R[row] = -np.inf
        elif tail_gap_R[row] == _TAIL_UNKNOWN:
            tail_R[row] = np.nan
        else:
            tail_R[row] = -(tail_gap_R[row] * step) - scale
            entropy -= np.exp(tail_R[row]) * tail_R[row]
        entropy_R[row] = entropy
        top_R[row] = p_K[low] if at > low else 0.0  # gaps are not negative: the first is the largest
    return offsets, logprob_K, p_K, tail_R, entropy_R, top_R


@compiled
def row_figures(
    offsets_R: NDArray[np.int64], logprob_K: NDArray[np.float64], tail_R: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entropy of each row in nats, the tail as one cell, and its largest entry's probability; [R] each."""
    entropy_R, top_R = np.zeros(len(tail_R), np.float64), np.zeros(len(tail_R), np.float64)
    for row in range(len(tail_R)):
        if tail_R[row] > -np.inf:
            entropy_R[row] = -np.exp(tail_R[row]) * tail_R[row]
        for at in range(offsets_R[row], offsets_R[row + 1]):
            p = np.exp(logprob_K[at])
            entropy_R[row] -= p * logprob_K[at]
            top_R[row] = max(top_R[row], p)
    return entropy_R, top_R
