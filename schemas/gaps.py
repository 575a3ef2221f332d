"""Log-probabilities of targets in 16 bits: what a distribution says, as whole numbers of a step.

The first entry is stored in steps of its own, each later one as the distance to the one before, the tail mass in steps
of its own. Levels are those of distances to the first entry, so errors never add up, and what lies on a grid that a
common term has shifted (a row over what it adds up to) is found again. The reader makes each distribution sum to 1,
which takes that term out: a distribution that came from a capture's steps and was not changed since is the same again.

Rounded are values that lie on no grid: each by at most half a step, so that a distribution p becomes p' with
KL(p || p') <= step^2 / 8 (Hoeffding's lemma) and |p - p'|_1 <= step / 2 (Pinsker's inequality).

Shapes: C targets (of chunks or tokens), K entries of all of them together.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

NO_TAIL, TAIL_UNKNOWN = 65535, 65534
MOST = 65533
"""The largest level. An entry below it is stored as being there: at any step that is written it is less than 1e-27."""
_LEVELS = 1 << 12
Probabilities = NDArray[np.float64]


def probabilities(step: float) -> Probabilities:
    """Of the first 4,096 levels, float64: looking up is faster than exp."""
    table: Probabilities = np.exp(np.arange(_LEVELS) * -np.float64(step))
    return table


@compiled
def to_gaps(
    count_C: NDArray[np.int32], logprob_K: NDArray[np.float32], tail_C: NDArray[np.float32], step: float
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], int]:
    """Targets in steps.

    Args:
        count_C: entries of each target.
        logprob_K: nats, each target's falling.
        tail_C: nats, log of the tail mass; -inf = none, NaN = unknown.
        step: unit, in nats.

    Returns:
        uint16 [K] and uint16 [C], and the first target whose entries do not fall or are no numbers; -1 = none.
    """
    gap_K, tail_gap_C = np.zeros(len(logprob_K), np.uint16), np.zeros(len(tail_C), np.uint16)
    at = 0
    for target in range(len(count_C)):
        first = np.float64(logprob_K[at]) if count_C[target] else 0.0
        base = level = max(0, min(MOST, int(np.floor(-max(first, -MOST * step) / step + 0.5))))
        for rank in range(count_C[target]):
            if not logprob_K[at] <= (logprob_K[at - 1] if rank else 1.0):
                return gap_K, tail_gap_C, target
            value = max(np.float64(logprob_K[at]), first - MOST * step)
            here = min(MOST, base + int(np.floor((first - value) / step + 0.5)))
            gap_K[at] = here - level if rank else here
            level = here
            at += 1
        tail = np.float64(tail_C[target])
        if np.isnan(tail):
            tail_gap_C[target] = TAIL_UNKNOWN
        elif tail == -np.inf:
            tail_gap_C[target] = NO_TAIL
        else:
            here = base + int(np.floor((first - max(tail, first - MOST * step)) / step + 0.5))
            tail_gap_C[target] = min(MOST, max(0, here))
    return gap_K, tail_gap_C, -1


@compiled
def from_gaps(
    count_C: NDArray[np.int32],
    gap_K: NDArray[np.uint16],
    tail_gap_C: NDArray[np.uint16],
    step: float,
    table: Probabilities,
    whole: bool,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Targets as readers see them.

    Args:
        count_C: entries of each target, none negative; they must add up to K.
        gap_K, tail_gap_C: of ``to_gaps``.
        step: unit, in nats.
        table: of ``probabilities``.
        whole: make each target sum to 1 with its tail mass (without, where it is none or unknown); else, and where
            there is a tail alone, all is as stored.

    Returns:
        log-probabilities, float32 [K] and [C], nats; of tails -inf = none, NaN = unknown.
    """
    logprob_K, tail_C = np.empty(len(gap_K), np.float32), np.empty(len(count_C), np.float32)
    low = 0
    for target in range(len(count_C)):
        stored, high = np.int64(tail_gap_C[target]), low + count_C[target]
        known = stored <= MOST
        tail_C[target] = -stored * step if known else (-np.inf if stored == NO_TAIL else np.nan)
        if high == low:
            continue
        if whole:
            base = min(np.int64(gap_K[low]), stored) if known else np.int64(gap_K[low])
            # counted from the largest cell, which makes the sum at least 1, and its logarithm exact
            level, total = -base, 0.0
            for at in range(low, high):
                level += np.int64(gap_K[at])
                total += table[level] if level < len(table) else np.exp(-level * step)
                logprob_K[at] = -level * step
            if known:
                total += table[stored - base] if stored - base < len(table) else np.exp((base - stored) * step)
                tail_C[target] = (base - stored) * step - np.log(total)
            scale = np.float32(np.log(total))
            for at in range(low, high):
                logprob_K[at] -= scale
        else:
            level = np.int64(0)
            for at in range(low, high):
                level += np.int64(gap_K[at])
                logprob_K[at] = -level * step
        low = high
    return logprob_K, tail_C


@compiled
def looked_up(ids_U: NDArray[np.int32], codes_K: NDArray[np.int32]) -> tuple[NDArray[np.int32], bool]:
    """The id of each code, int32 [K], and whether each is one of 0 to U-1."""
    ids_K, right = np.empty(len(codes_K), np.int32), True
    for at in range(len(codes_K)):
        code = codes_K[at]
        inside = 0 <= code < len(ids_U)
        right &= inside
        ids_K[at] = ids_U[code if inside else 0]
    return ids_K, right
