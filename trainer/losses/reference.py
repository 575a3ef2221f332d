"""The losses as their formulas read: one chunk, dense, float64, slow. Tests compare the fast ones with these.

Shapes: V student vocabulary, U teacher vocabulary. ``p_S`` is float64 [V] and may carry a gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cross_entropy(p_S: Tensor, label: int) -> Tensor:
    """-log p_S(label)."""
    return -p_S[label].log()


def p_kl(p_S: Tensor, W: Tensor, p_T: Mapping[int, float], rest: float) -> Tensor:
    """X-Token's P-KL with REST as one cell: KL(p_T || W^T p_S).

    Args:
        p_S: student probabilities.
        W: [V, U]; rows sum to 1 or are zero.
        p_T: kept teacher probabilities by teacher id; with ``rest`` they sum to 1.
        rest: the teacher's mass that is not kept.
    """
    q = W.T @ p_S
    kept = sorted(p_T)
    loss = p_S.new_zeros(())
    for t in kept:
        if p_T[t] > 0:
            loss = loss + p_T[t] * (torch.tensor(p_T[t], dtype=p_S.dtype).log() - q[t].log())
    if rest > 0:
        q_rest = 1 - q[kept].sum()
        loss = loss + rest * (torch.tensor(rest, dtype=p_S.dtype).log() - q_rest.log())
    return loss


def h_kl(
    p_S: Tensor,
    common_set: Sequence[int],
    common: Mapping[int, float],
    other: Sequence[float],
    uld_weight: float,
    uncommon_topk: int,
) -> Tensor:
    """X-Token's H-KL.

    Args:
        p_S: student probabilities.
        common_set: every student id of C.
        common: teacher probability by student id, for the kept pairs of C.
        other: the teacher's other kept probabilities.
        uld_weight: weight of the sorted L1 part.
        uncommon_topk: ranks compared.
    """
    kl = p_S.new_zeros(())
    for s, p in common.items():
        kl = kl + p * (torch.tensor(p, dtype=p_S.dtype).log() - p_S[s].log())
    outside = [s for s in range(len(p_S)) if s not in set(common_set)]
    student = torch.sort(p_S[outside], descending=True).values[:uncommon_topk]
    teacher = torch.tensor(sorted(other, reverse=True), dtype=p_S.dtype)[:uncommon_topk]
    l1 = p_S.new_zeros(())
    for rank in range(max(len(student), len(teacher))):
        ours = student[rank] if rank < len(student) else torch.zeros_like(l1)
        theirs = teacher[rank] if rank < len(teacher) else torch.zeros_like(l1)
        l1 = l1 + (ours - theirs).abs()
    return kl + uld_weight * l1
