"""Decoded teacher distributions, whatever codec stored them.

Shapes: R rows, K entries of all rows together; row ``r`` has entries ``offsets[r]:offsets[r + 1]``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Unpacked:
    """Rows as they were stored, not renormalised.

    Attributes:
        offsets: int64 [R + 1].
        ids: int32 [K], teacher ids.
        logprob: float64 [K], nats.
        tail_logprob: float64 [R], nats: log of the mass in no entry; -inf = none, NaN = unknown (imported rows).
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprob: NDArray[np.float64]
    tail_logprob: NDArray[np.float64]


@dataclass(frozen=True)
class WholeRows:
    """Rows that sum to 1 with their tail mass.

    Attributes:
        offsets, ids, logprob, tail_logprob: as in ``Unpacked``.
        p: float64 [K], probabilities of the entries.
        entropy: float64 [R], nats; the tail counts as one cell where the entropy of the whole row is not known.
        top1: float64 [R], the largest probability.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprob: NDArray[np.float64]
    p: NDArray[np.float64]
    tail_logprob: NDArray[np.float64]
    entropy: NDArray[np.float64]
    top1: NDArray[np.float64]
