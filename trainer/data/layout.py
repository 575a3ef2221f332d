"""How samples become inputs, and what one teacher says about one of them.

Shapes: S student tokens, P predicted positions, C chunks, K entries summed over chunks or positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.trainer.losses.base import Array, Loss

BASE_COLUMNS = ("student_ids", "chunk_student_end")
SCORE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "static": (),
    "ce": ("teacher_logprob",),
    "entropy": ("teacher_entropy",),
    "confidence": ("teacher_top1",),
}


@dataclass(frozen=True)
class Layout:
    """How samples become inputs.

    Attributes:
        context: token shown before each sample, or None: then a sample's first token is not predicted.
        max_tokens: student tokens kept of a sample.
        vocabulary: ids of the student's tokenizer.
        losses: one per target folder.
        weights: one per target folder.
        weighting: what a sample's teachers are weighed by (see ``xtoken.schemas.configs.train.DataGroup.weighting``).
    """

    context: int | None
    max_tokens: int
    vocabulary: int
    losses: tuple[Loss, ...]
    weights: tuple[float, ...] = (1.0,)
    weighting: str = "static"

    def columns(self, source: int) -> tuple[str, ...]:
        """Columns to read of a target folder."""
        wanted = (*BASE_COLUMNS, *self.losses[source].columns.names, *SCORE_COLUMNS[self.weighting])
        return tuple(dict.fromkeys(wanted))

    @property
    def shift(self) -> int:
        """Token i of a sample is predicted at position i + shift."""
        return 0 if self.context is not None else -1


@dataclass(frozen=True)
class SampleTargets:
    """What one teacher says about a sample.

    Attributes:
        first_C, length_C, next_C: as in ``View``, positions counted from the sample's first.
        columns: the loss's columns: chunk columns of the valid chunks, token columns of all predicted tokens.
        score: what the sample's weight is a softmax of; NaN = the teacher has no row here.
    """

    first_C: NDArray[np.int64]
    length_C: NDArray[np.int64]
    next_C: NDArray[np.int64]
    columns: Mapping[str, Array]
    score: float = 0.0


def running(count: Array) -> NDArray[np.int64]:
    """[n + 1] sums of the counts before each, and of all."""
    sums = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=sums[1:])
    return sums
