"""How a chunk of several tokens becomes one row under the chain rule: what GOLD and ULD compare.

    merge first:  p(. | first) * prod_later p(realised token)         TRL's "observed", with the right tokens
    merge last:   p(. | last) * prod_earlier p(realised token)        TRL's "bayesian"

The product is not renormalised. The teacher's logarithm of it is stored, the student's is taken here, with gradient.

Shapes: P positions, C chunks, V student vocabulary, E positions of chunks.
"""

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.losses.base import LossSetup, View
from xtoken.trainer.losses.divergence import ranges


def chain_merge(setup: LossSetup, loss: str) -> str:
    """The targets' merge, if the chain rule knows it.

    Raises:
        XtokenError: the targets hold means over a chunk's rows.
    """
    if setup.merge not in ("first", "last"):
        raise XtokenError(
            f"{loss} reads targets with --merge first or last, these have {setup.merge!r}; align the capture again"
        )
    return setup.merge


def chunk_row(view: View, merge: str) -> Tensor:
    """int64 [C]: the position whose row stands for the chunk."""
    return view.first_C if merge == "first" else view.first_C + view.length_C - 1


def chunk_positions(view: View) -> tuple[Tensor, Tensor]:
    """The chunk of each position that lies in one, and the position, int64 [E]."""
    return ranges(view.first_C, view.length_C)


def realised_places(view: View, row_C: Tensor) -> tuple[Tensor, Tensor]:
    """The realised tokens of each chunk but the one that ``row_C`` predicts.

    Returns:
        Their flat places in [P, V] and their chunks, int64 [E] each.
    """
    chunk_E, position_E = chunk_positions(view)
    other_E = position_E != row_C[chunk_E]
    position_E, chunk_E = position_E[other_E], chunk_E[other_E]
    return position_E * view.logp_PV.shape[1] + view.label_P[position_E], chunk_E


def gather(logp_PV: Tensor, *places: Tensor) -> list[Tensor]:
    """Log-probabilities at flat places in [P, V], one result per argument.

    One operation for all of them, since each one's gradient takes a buffer as large as ``logp_PV``.
    """
    return cut(logp_PV.reshape(-1).index_select(0, torch.cat(places)), *places)


def cut(value_E: Tensor, *like: Tensor) -> list[Tensor]:
    """Parts of ``value_E`` as long as the arguments that follow."""
    return list(torch.split(value_E, [len(part) for part in like]))
