"""Forward KL between a stored top-K row and the student, with everything not kept as one cell, REST.

Shapes: C chunks, K kept entries summed over chunks.
"""

import torch
from torch import Tensor


def sparse_kl_total(
    logp_K: Tensor, logq_K: Tensor, chunk_K: Tensor, rest_logp_C: Tensor, rest_logq_C: Tensor
) -> Tensor:
    """Sum over chunks of sum_A p (log p - log q) + rest (log rest - log q_rest), nats.

    Args:
        logp_K: teacher log-probabilities; with REST they sum to 1 in each chunk.
        logq_K: student log-probabilities of the same cells, finite.
        chunk_K: chunk of each entry.
        rest_logp_C: log of the teacher's REST; -inf = none.
        rest_logq_C: log of the student's REST, finite.

    No chunk counts below zero. Rounding can bring the sum of a well-matched chunk to about -1e-7; only the value is
    floored there, since a clamp would also cut the gradient, which is exact.
    """
    kl_C = _cells(rest_logp_C, rest_logq_C).index_add(0, chunk_K, _cells(logp_K, logq_K))
    return (kl_C + (kl_C.clamp(min=0) - kl_C).detach()).sum()


def _cells(logp: Tensor, logq: Tensor) -> Tensor:
    p = logp.to(logq.dtype).exp()
    return torch.xlogy(p, p) - p * logq  # xlogy: a cell of probability 0 counts 0, not nan
