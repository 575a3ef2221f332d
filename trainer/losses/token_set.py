"""The student's mass on a fixed set of tokens, with one buffer of the size of the logits for everything.

Shapes: P positions, V student vocabulary, E values read, R ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtoken.trainer.losses.log_softmax import Sink, left_with, sink_of


class SetMass(NamedTuple):
    """What ``set_mass`` finds.

    Attributes:
        mass_P: sum of probabilities over the set.
        top_PR: the largest probabilities in the set, descending.
        logp_E: log-probabilities at the places asked for.
    """

    mass_P: Tensor
    top_PR: Tensor
    logp_E: Tensor


def set_mass(logp_PV: Tensor, member_V: Tensor, place_E: Tensor, ranks: int = 0) -> SetMass:
    """Mass and largest probabilities of a set of tokens at every position, and single log-probabilities.

    Args:
        logp_PV: log-probabilities.
        member_V: 1 for tokens of the set, 0 for others, in the dtype of ``logp_PV``.
        place_E: flat places in [P, V]; they need not be in the set.
        ranks: how many of the largest probabilities, at most the size of the set.

    One buffer of size [P, V] is made; it becomes the gradient, so a second backward pass raises.
    """
    return SetMass(*_SetMass.apply(logp_PV.contiguous(), member_V, place_E, ranks, sink_of(logp_PV)))  # type: ignore[no-untyped-call]


class _SetMass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logp_PV: Tensor, member_V: Tensor, place_E: Tensor, ranks: int, sink: Sink | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.into = sink
        # zeros outside the set: neither the sum nor the top sees them, as long as the set has that many tokens
        p_PV = logp_PV.exp().mul_(member_V)
        top_PR, id_PR = p_PV.topk(ranks)
        ctx.save_for_backward(p_PV, top_PR, id_PR, place_E)
        return p_PV.sum(1), top_PR, logp_PV.view(-1).index_select(0, place_E)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_P: Tensor, grad_PR: Tensor, grad_E: Tensor
    ) -> tuple[Tensor | None, None, None, None, None]:
        p_PV, top_PR, id_PR, place_E = ctx.saved_tensors
        # d p / d log p = p, for the sum and once more for each of the top; read places add to what is there
        p_PV.mul_(grad_P[:, None]).scatter_add_(1, id_PR, grad_PR * top_PR)
        p_PV.view(-1).index_add_(0, place_E, grad_E)
        return left_with(ctx.into, p_PV), None, None, None, None


def set_plogp(logp_PV: Tensor, member_V: Tensor) -> Tensor:
    """Sum of p log p over a set of tokens at every position, [P] nats; ``member_V`` as in ``set_mass``.

    Two buffers of size [P, V]; a second backward pass raises.
    """
    plogp_P: Tensor = _SetPLogP.apply(logp_PV, member_V, sink_of(logp_PV))  # type: ignore[no-untyped-call]
    return plogp_P


class _SetPLogP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_PV: Tensor, member_V: Tensor, sink: Sink | None) -> Tensor:
        ctx.into = sink
        p_PV = logp_PV.exp().mul_(member_V)
        ctx.save_for_backward(p_PV, logp_PV)
        plogp_P: Tensor = torch.linalg.vecdot(p_PV, logp_PV)
        return plogp_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, None, None]:
        p_PV, logp_PV = ctx.saved_tensors
        # d (p log p) / d log p = p (log p + 1)
        return left_with(ctx.into, p_PV.mul_((logp_PV + 1).mul_(grad_P[:, None]))), None, None
