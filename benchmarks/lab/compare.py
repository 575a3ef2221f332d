"""How two settings are compared: paired resamples of documents, and of seeds as blocks.

Shapes: S seeds, D documents.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["reproduced", "not reproduced", "too small to tell"]


@dataclass(frozen=True)
class Difference:
    """A minus B, a ratio of sums such as bits per byte; the interval holds ``level`` of the resamples."""

    value: float
    low: float
    high: float
    seeds: int
    documents: int

    def verdict(self, margin: float) -> Verdict:
        """Whether A lies below B by more than a margin (0 or more)."""
        if self.high < -margin:
            return "reproduced"
        return "not reproduced" if self.low > -margin else "too small to tell"


def difference(
    ours_SD: NDArray[np.float64],
    theirs_SD: NDArray[np.float64],
    size_D: NDArray[np.float64],
    kind_D: NDArray[np.int64],
    *,
    resamples: int,
    level: float,
    seed: int,
) -> Difference:
    """The difference of two settings that were run with the same seeds on the same documents, with its interval.

    Args:
        ours_SD: of setting A, what is summed, such as bits.
        theirs_SD: of setting B.
        size_D: what the sum is divided by, such as bytes.
        kind_D: kind of each document; documents are drawn within their kind.
        resamples: how many.
        level: of the interval, such as .95.
        seed: of the resamples.
    """
    gap_SD = ours_SD - theirs_SD
    draw = np.random.default_rng(seed)
    seeds, documents = gap_SD.shape
    kinds = [np.flatnonzero(kind_D == kind) for kind in np.unique(kind_D)]
    drawn_R = np.empty(resamples)
    for at in range(resamples):
        taken_S = draw.integers(seeds, size=seeds)
        taken_D = np.concatenate([draw.choice(places, len(places)) for places in kinds])
        drawn_R[at] = gap_SD[np.ix_(taken_S, taken_D)].sum() / (seeds * size_D[taken_D].sum())
    low, high = np.quantile(drawn_R, [(1 - level) / 2, (1 + level) / 2])
    value = gap_SD.sum() / (seeds * size_D.sum())
    return Difference(float(value), float(low), float(high), seeds, documents)
