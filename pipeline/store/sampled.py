"""The codec of draws: how often each teacher id was drawn from a whole row, and the row's exact entropy.

Shares of the draws are an unbiased estimate of the row's probabilities, and so is everything that is linear in them;
nothing else is: no logarithm, no ratio, no order by size. There is no REST: the draws are of the whole row.

Shapes: R rows, K different ids drawn, all rows together.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.store.codec import Unpacked
from xtoken.pipeline.teachers.base import Draws
from xtoken.schemas.errors import XtokenError


@dataclass(frozen=True)
class PackedDraws:
    """Encoded rows.

    Attributes:
        drawn: uint16 [R], different ids drawn in each row.
        draw_ids: int32 [K], rows in order, most draws first, then ascending.
        draw_count: uint16 [K], draws of each.
        entropy: float32 [R], nats, of the whole row.
    """

    drawn: NDArray[np.uint16]
    draw_ids: NDArray[np.int32]
    draw_count: NDArray[np.uint16]
    entropy: NDArray[np.float32]

    @classmethod
    def empty(cls) -> "PackedDraws":
        """No rows."""
        few = np.zeros(0, np.uint16)
        return cls(few, np.zeros(0, np.int32), few, np.zeros(0, np.float32))


def encode_draws(found: Draws, *, draws: int, vocab_size: int) -> PackedDraws:
    """Draws of a sequence's rows as they are stored.

    Args:
        found: the engine's.
        draws: of each row, at most 65535.
        vocab_size: ids are below.

    Raises:
        XtokenError: an entropy is no number, a row has another number of draws, or an id is outside the vocabulary.
    """
    if not (np.isfinite(found.entropy) & (found.entropy >= 0)).all():
        raise XtokenError("the teacher gave a row whose entropy is no number; try --dtype float32")
    row_K = np.repeat(np.arange(len(found.drawn)), found.drawn)
    assert len(row_K) == len(found.ids) == len(found.count), "draws of other lengths"
    sum_R = np.bincount(row_K, weights=found.count, minlength=len(found.drawn))
    if (sum_R != draws).any() or (found.count < 1).any():
        raise XtokenError(
            f"a teacher row has {sum_R[(sum_R != draws).argmax()]:g} draws, not {draws}; the backend is broken"
        )
    if len(found.ids) and (found.ids.min() < 0 or found.ids.max() >= vocab_size):
        raise XtokenError(f"an id outside 0 to {vocab_size - 1} was drawn; the backend is broken")
    return PackedDraws(
        found.drawn.astype(np.uint16),
        found.ids.astype(np.int32),
        found.count.astype(np.uint16),
        found.entropy.astype(np.float32),
    )


def decode_draws(
    drawn: NDArray[Any], draw_ids: NDArray[np.int32], draw_count: NDArray[np.uint16], draws: int
) -> Unpacked:
    """Rows whose probabilities are shares of the draws (see ``PackedDraws`` for shapes); none has REST."""
    offsets = np.zeros(len(drawn) + 1, np.int64)
    np.cumsum(drawn, out=offsets[1:])
    logprob_K = np.log(draw_count.astype(np.float64) / draws)
    return Unpacked(offsets, draw_ids, logprob_K, np.full(len(drawn), -np.inf))
