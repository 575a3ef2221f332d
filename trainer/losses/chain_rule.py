"""How a chunk of several tokens becomes one distribution under the chain rule: what GOLD and ULD compare.

    merge first:  p(. | first) * prod_later p(label)         TRL's "observed", with the right tokens
    merge last:   p(. | last) * prod_earlier p(label)        TRL's "bayesian"

The product is not renormalised. The teacher's logarithm of it is stored, the student's is taken here, with gradient.

Shapes: P positions, C chunks, V student vocabulary, E positions of chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.losses.base import LossSetup
from xtoken.trainer.losses.divergence import ranges
from xtoken.trainer.losses.log_softmax import picked


def chain_merge(setup: LossSetup, loss: str) -> str:
    """The targets' merge, if the chain rule knows it.

    Raises:
        XtokenError: the targets hold means over a chunk's distributions.
    """
    if setup.merge not in ("first", "last"):
        raise XtokenError(
            f"{loss} reads targets with --merge first or last, these have {setup.merge!r}; align the capture again"
        )
    return setup.merge


class Chain(NamedTuple):
    """Where a chunk's distribution and the factors of its other labels lie in [P, V]; all int64.

    Attributes:
        row_C: the position whose distribution stands for the chunk.
        place_E, chunk_E: the labels of each chunk but the one that ``row_C`` predicts: places in [P, V], and chunks.
    """

    row_C: Tensor
    place_E: Tensor
    chunk_E: Tensor

    @classmethod
    def of(cls, label_P: Tensor, first_C: Tensor, length_C: Tensor, merge: str, width: int) -> "Chain":
        """From the positions of chunks; ``width`` is V."""
        row_C = first_C if merge == "first" else first_C + length_C - 1
        # the distribution at row_C stands for its own label, so that one is no factor
        chunk_E, position_E = ranges(first_C, length_C)
        other_E = position_E != row_C[chunk_E]
        position_E, chunk_E = position_E[other_E], chunk_E[other_E]
        return cls(row_C, position_E * width + label_P[position_E], chunk_E)


def gather(logp_PV: Tensor, *places: Tensor) -> list[Tensor]:
    """Log-probabilities at flat places in [P, V], one result per argument.

    One operation for all of them, since each one's gradient takes a buffer as large as ``logp_PV``.
    """
    return cut(picked(logp_PV, torch.cat(places)), *places)


def cut(value_E: Tensor, *like: Tensor) -> list[Tensor]:
    """Parts of ``value_E`` as long as the arguments that follow."""
    return list(torch.split(value_E, [len(part) for part in like]))
