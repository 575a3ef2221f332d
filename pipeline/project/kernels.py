"""The search for the tokens of least edit distance, compiled by numba.

Shapes: Q tokens asked for, M candidates, B bytes of all tokens of a side together.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

_NONE = -1
_FAR = 1 << 30


@compiled
def nearest(
    asked_B: NDArray[np.uint8],
    asked_Q: NDArray[np.int64],
    known_B: NDArray[np.uint8],
    known_M: NDArray[np.int64],
    reach: int,
) -> NDArray[np.int64]:
    """For each token the candidate of least Levenshtein distance over bytes, int64 [Q]; -1 = it has none.

    A candidate shares the first byte and differs by at most ``reach`` bytes in length. Of equally near ones the first
    in order wins.

    Args:
        asked_B, asked_Q: bytes of the tokens, and where each starts, [Q + 1]; none is empty.
        known_B, known_M: likewise of the candidates, [M + 1].
        reach: see above.
    """
    longest = 1
    for at in range(len(known_M) - 1):
        longest = max(longest, known_M[at + 1] - known_M[at])
    start, bucket_M = _buckets(known_B, known_M, longest)
    sign_M, sign_Q = _signs(known_B, known_M), _signs(asked_B, asked_Q)
    found_Q, row = np.empty(len(asked_Q) - 1, np.int64), np.empty(longest + 1, np.int64)
    for query in range(len(found_Q)):
        mine, best, least = asked_B[asked_Q[query] : asked_Q[query + 1]], _NONE, _FAR
        for step in range(2 * reach + 1):
            # lengths from alike to unlike: 0, -1, 1, -2, 2, ...; how far apart they are bounds the distance from below
            gap = (step + 1) // 2
            length = len(mine) + (gap if step % 2 == 0 else -gap)
            if gap > least or length < 1 or length > longest:
                continue
            bucket = mine[0] * (longest + 1) + length
            for place in range(start[bucket], start[bucket + 1]):
                other = bucket_M[place]
                # whoever comes later in order must be nearer, whoever comes earlier may be as near
                most = least - 1 if other > best else least
                away, back = sign_Q[query] & ~sign_M[other], sign_M[other] & ~sign_Q[query]
                if _has_more(away, most) or _has_more(back, most):
                    continue
                distance = _distance(mine, known_B[known_M[other] : known_M[other + 1]], most, row)
                if distance <= most:
                    best, least = other, distance
        found_Q[query] = best
    return found_Q


@compiled
def _buckets(
    known_B: NDArray[np.uint8], known_M: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Candidates by first byte and length: where each bucket starts, and the candidates, in order within it."""
    key_M = np.empty(len(known_M) - 1, np.int64)
    start = np.zeros(256 * (longest + 1) + 1, np.int64)
    for at in range(len(key_M)):
        key_M[at] = known_B[known_M[at]] * (longest + 1) + known_M[at + 1] - known_M[at]
        start[key_M[at] + 1] += 1
    return np.cumsum(start), np.argsort(key_M, kind="mergesort")


@compiled
def _signs(data_B: NDArray[np.uint8], start_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which bytes occur in each token, as 64 bits that four byte values share each.

    An edit takes at most one byte away and brings at most one, so the distance is at least the number of bits that one
    token has and the other lacks. That spares most candidates the table below.
    """
    sign_N = np.zeros(len(start_N) - 1, np.int64)
    for at in range(len(sign_N)):
        for place in range(start_N[at], start_N[at + 1]):
            sign_N[at] |= np.int64(1) << np.int64(data_B[place] & 63)
    return sign_N


@compiled
def _has_more(bits: int, most: int) -> bool:
    """More than ``most`` bits are set."""
    count = 0
    while bits and count <= most:
        bits &= bits - 1  # the lowest one goes
        count += 1
    return count > most


@compiled
def _distance(a: NDArray[np.uint8], b: NDArray[np.uint8], most: int, row: NDArray[np.int64]) -> int:
    """Levenshtein distance; any number above ``most`` where it is above. ``row`` holds at least len(b) + 1 numbers."""
    for j in range(len(b) + 1):
        row[j] = j
    for i in range(len(a)):
        diagonal, row[0], least = row[0], i + 1, i + 1
        for j in range(len(b)):
            changed = diagonal + (a[i] != b[j])
            diagonal = row[j + 1]
            row[j + 1] = min(changed, diagonal + 1, row[j] + 1)
            least = min(least, row[j + 1])
        if least > most:  # no later row has a smaller number
            return most + 1
    return int(row[len(b)])
