"""KL between a stored teacher distribution and the student, everything not kept as one cell: the tail.

    forward  sum_A p (log p - log q) + tail (log tail - log q_tail)        q_tail = 1 - sum_A q
    reverse  sum_A q (log q - log p) + q_tail (log q_tail - log tail)

Neither is negative: both are the KL of two distributions over the kept cells A and the tail, whose mass is the last
cell. ``drop`` leaves the tail out and renormalises both sides over the kept cells.

What the bucket costs, against the whole distribution: by the chain rule of KL

    full - bucket = tail * KL(p given tail || q given tail)  >= 0,

so the bucket never overstates the full KL, is exact where the student shares the tail out as the teacher does, and is
off by at most tail * max over its tokens t of log((p_t / tail) / (q_t / q_tail)). With respect to log q the two
gradients differ by tail * (q given tail - p given tail): by at most 2 tail in L1 norm. All of that where what is not
kept lies outside the kept cells; ``xtoken.trainer.losses.pkl`` names the other cases.

With samples (targets of codec ``sampled``) p are sampled frequencies and there is no tail. The gradient is linear in
them, hence unbiased. The value is not: it is too high by the entropy that the frequencies lack in the mean, which does
not depend on the student. ``reverse`` and ``drop`` are not linear; ``trainer.data.targets`` refuses them.

Shapes: P positions, V student vocabulary, C chunks, K kept entries summed over chunks, E values read, M cells only
partly counted as outside, N values in G groups, J ranges.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtoken.trainer.losses.base import owners
from xtoken.trainer.losses.log_softmax import Sink, Tail, left_with, sink_of

# What a student token adds to the tail when all of it lies inside the kept set, instead of 0. So log q_tail is a number
# without a search for each position's maximum: q_tail is at least NOTHING, and its reciprocal is far from float32's
# limit. The gradient is right while q_tail is above it.
NOTHING = math.exp(-60)
LOG_FLOOR = -24 * math.log(2)  # reverse only: a sum of float32 probabilities cannot tell a smaller tail from none


def kl_with_tail(
    logp_K: Tensor,
    logq_K: Tensor,
    chunk_K: Tensor,
    tail_logp_C: Tensor,
    tail_logq_C: Tensor | None,
    kl: str = "forward",
) -> Tensor:
    """KL of each chunk, [C] nats.

    Args:
        logp_K: teacher log-probabilities; with the tail they sum to 1 in each chunk.
        logq_K: student log-probabilities of the same cells, finite.
        chunk_K: chunk of each entry; none is without entries.
        tail_logp_C: log of the teacher's tail mass; -inf = none. ``reverse`` raises it to ``LOG_FLOOR``.
        tail_logq_C: log of the student's tail mass, finite; None drops the tail (``tail_logp_C`` may then be NaN).
        kl: ``forward`` is KL(teacher||student), ``reverse`` KL(student||teacher).

    No chunk counts below zero. Rounding can bring the sum of a well-matched chunk to about -1e-7; only the value is
    floored there, since a clamp would also cut the gradient, which is exact.
    """
    logp_K, chunks = logp_K.to(logq_K.dtype), len(tail_logp_C)
    if tail_logq_C is None:
        logp_K = logp_K - group_logsumexp(logp_K, chunk_K, chunks)[chunk_K]
        logq_K = logq_K - group_logsumexp(logq_K, chunk_K, chunks)[chunk_K]
        cells_C = logq_K.new_zeros(chunks)
    else:
        tail_logp_C = tail_logp_C.to(logq_K.dtype)
        # forward weighs the cell by the teacher's tail, so that none adds nothing; reverse takes its logarithm
        cells_C = cells(tail_logp_C.clamp(min=LOG_FLOOR) if kl == "reverse" else tail_logp_C, tail_logq_C, kl)
    kl_C = cells_C.index_add(0, chunk_K, cells(logp_K, logq_K, kl))
    return kl_C + (kl_C.clamp(min=0) - kl_C).detach()


def cells(logp: Tensor, logq: Tensor, kl: str) -> Tensor:
    """What each cell adds to the KL. A teacher probability of 0 adds nothing; ``reverse`` takes it as ``LOG_FLOOR``."""
    if kl == "reverse":
        return logq.exp() * (logq - torch.where(logp == -torch.inf, LOG_FLOOR, logp))
    # exp(-inf) * -inf would be NaN: the clamp makes it 0 times a finite number, and leaves every other value alone
    return logp.exp() * (logp.clamp(min=torch.finfo(logp.dtype).min) - logq)


def ranges(start_J: Tensor, count_J: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """int64 [E] twice: the ranges ``start`` to ``start + count - 1`` one after the other, the index of each one's range
    and its value; ``total`` is E, as for ``owners``."""
    range_E = owners(count_J, total)
    before_J = count_J.cumsum(0) - count_J
    return range_E, torch.arange(len(range_E), device=count_J.device) + (start_J - before_J)[range_E]


def group_logsumexp(x_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """[G] log of the sum of exp(x) over each group's values."""
    # the maximum is a constant: its share of the gradient cancels between the two terms of the result
    top_G = x_N.new_full((groups,), -torch.inf).scatter_reduce(0, group_N, x_N.detach(), "amax")
    scaled_N = (x_N - top_G[group_N]).exp()
    return top_G + x_N.new_zeros(groups).index_add(0, group_N, scaled_N).log()


def kept_and_tail(logp_PV: Tensor, place_E: Tensor, place_M: Tensor, share_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities at some places, and the log of the mass outside the kept cells at every position.

    Args:
        logp_PV: normalised log-probabilities.
        place_E: places in [P, V], row by row, whose log-probabilities are wanted.
        place_M: places, each once, that lie inside the kept cells in part or whole.
        share_M: the part of each that lies outside, at least ``NOTHING``. Places not named lie outside.

    Returns:
        [E] log-probabilities; [P] log of sum_s p(s) share(s). The second is the complement 1 - sum_A q as a sum of
        non-negative parts: log1mexp(log sum_A q) would cost less, but as sum_A q nears 1 its gradient divides one
        rounding error by another, exactly where the tail must pull.

    One buffer of size [P, V] is made; it becomes the gradient. A second backward pass through it raises.
    """
    inputs = (logp_PV.contiguous(), place_E, place_M, share_M, sink_of(logp_PV))
    logp_E, tail_P = _KeptAndTail.apply(*inputs)  # type: ignore[no-untyped-call]
    return logp_E, tail_P


class _KeptAndTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logp_PV: Tensor, place_E: Tensor, place_M: Tensor, share_M: Tensor, sink: Sink | None
    ) -> tuple[Tensor, Tensor]:
        ctx.into = sink
        # every probability, then the named places again at the share of theirs that is outside: the sum is the tail
        outside_PV = logp_PV.exp()
        p_M = outside_PV.view(-1).index_select(0, place_M)
        outside_PV.view(-1).index_copy_(0, place_M, p_M * share_M)
        tail_P = outside_PV.sum(1)
        ctx.save_for_backward(outside_PV, tail_P, p_M, share_M, place_E, place_M)
        return logp_PV.view(-1).index_select(0, place_E), tail_P.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor, grad_P: Tensor) -> tuple[Tensor | None, None, None, Tensor, None]:
        outside_PV, tail_P, p_M, share_M, place_E, place_M = ctx.saved_tensors
        # d log tail / d logp = p share / tail, cell by cell: the buffer of the forward pass, scaled in place
        pull_P = grad_P / tail_P
        grad_share_M = p_M * pull_P[place_M // outside_PV.shape[1]]
        if ctx.into is not None and ctx.into.left.tail is None:
            ctx.into.left.tail = Tail(outside_PV, pull_P, grad_P, place_M, p_M, share_M)
            ctx.into.left.cells.append((place_E, grad_E))
            return None, None, None, grad_share_M, None
        grad_PV = outside_PV.mul_(pull_P[:, None])
        # read places come on top; one may be read by several entries, so this adds and does not assign
        grad_PV.view(-1).index_add_(0, place_E, grad_E)
        return left_with(ctx.into, grad_PV), None, None, grad_share_M, None
