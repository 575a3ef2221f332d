"""The losses as their formulas read: one chunk, dense, float64, slow. They are the specification.

Each has a fast counterpart in the file of its loss (``pkl.p_kl``, ``gold.gold``, ...), which takes many chunks at once;
tests compare the two on values and gradients.

Shapes: V student vocabulary, U teacher vocabulary. ``p_S`` is float64 [V] and may carry a gradient.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cross_entropy(p_S: Tensor, label: int) -> Tensor:
    """-log p_S(label)."""
    return -p_S[label].log()


def sparse_kl(q: Tensor, p_T: Mapping[int, float], tail: float, *, kl: str = "forward", drop: bool = False) -> Tensor:
    """KL(p_T || q), or KL(q || p_T) for ``reverse``, with the tail as one cell, or renormalised without it.

    Args:
        q: student probabilities, by the ids that ``p_T`` has; what they lack to 1 is the tail, too.
        p_T: kept teacher probabilities by id; with ``tail`` they sum to 1.
        tail: the teacher's mass that is not kept; at least 2^-24 counts for ``reverse``.
    """
    kept = sorted(p_T)
    p, q_kept = torch.tensor([p_T[t] for t in kept], dtype=q.dtype), q[kept]
    if drop:
        p, q_kept = p / p.sum(), q_kept / q_kept.sum()
    else:
        tail = max(tail, 2**-24) if kl == "reverse" else tail
        p, q_kept = torch.cat([p, p.new_tensor([tail])]), torch.cat([q_kept, 1 - q_kept.sum()[None]])
    loss = q.new_zeros(())
    for p_t, q_t in zip(p, q_kept, strict=True):
        if kl == "reverse":
            loss = loss + q_t * (q_t.log() - p_t.log())
        elif p_t > 0:
            loss = loss + p_t * (p_t.log() - q_t.log())
    return loss


def p_kl(
    p_S: Tensor, W: Tensor, p_T: Mapping[int, float], tail: float, *, kl: str = "forward", drop: bool = False
) -> Tensor:
    """X-Token's P-KL: ``sparse_kl`` of W^T p_S.

    Args:
        p_S: student probabilities; of merge ``mean``, their mean over the chunk's positions, with ``drop``.
        W: [V, U]; rows sum to 1 or are zero.
        p_T, tail, kl, drop: see ``sparse_kl``.
    """
    return sparse_kl(W.T @ p_S, p_T, tail, kl=kl, drop=drop)


def strict(p_S: Tensor, p_T: Mapping[int, float], *, kl: str = "forward") -> Tensor:
    """KL(p || q), or KL(q || p) for ``reverse``, of both sides restricted to the ids of ``p_T`` and renormalised."""
    p_sum, q_sum = sum(p_T.values()), sum((p_S[s] for s in p_T), p_S.new_zeros(()))
    loss = p_S.new_zeros(())
    for s in p_T:
        p, q = torch.tensor(p_T[s] / p_sum, dtype=p_S.dtype), p_S[s] / q_sum
        loss = loss + (q * (q / p).log() if kl == "reverse" else p * (p / q).log())
    return loss


def mined(p_nV: Tensor, labels: Sequence[int], W: Tensor, p_T: Mapping[int, float], tail: float) -> Tensor:
    """MinED: P-KL where there are entries, else a one-hot target at each of the chunk's n positions.

    Args:
        p_nV: student distributions that predict the chunk's tokens.
        labels: the n tokens of the text.
        W: [V, U], of least edit distance.
        p_T, tail: see ``sparse_kl``; no entries: the chunk is not one token on either side.
    """
    if p_T:
        return p_kl(p_nV[0], W, p_T, tail)
    return sum((cross_entropy(p, label) for p, label in zip(p_nV, labels, strict=True)), p_nV.new_zeros(()))


def h_kl(
    p_S: Tensor,
    common_set: Sequence[int],
    common: Mapping[int, float],
    other: Sequence[float],
    uld_weight: float,
    uncommon_topk: int,
    *,
    kl: str = "forward",
    common_weight: float = 1.0,
) -> Tensor:
    """X-Token's H-KL.

    Args:
        p_S: student probabilities; of merge ``mean``, their geometric mean over the chunk's positions.
        common_set: every student id of C.
        common: teacher probability by student id, for the kept pairs of C.
        other: the teacher's other kept probabilities.
        uld_weight: weight of the sorted L1 part.
        uncommon_topk: ranks compared.
        kl, common_weight: direction and weight of the KL on C.
    """
    on_pairs = p_S.new_zeros(())
    for s, p in common.items():
        log_ratio = torch.tensor(p, dtype=p_S.dtype).log() - p_S[s].log()
        on_pairs = on_pairs + (-p_S[s] * log_ratio if kl == "reverse" else p * log_ratio)
    outside = [s for s in range(len(p_S)) if s not in set(common_set)]
    student = torch.sort(p_S[outside], descending=True).values[:uncommon_topk]
    teacher = torch.tensor(sorted(other, reverse=True), dtype=p_S.dtype)[:uncommon_topk]
    l1 = p_S.new_zeros(())
    for rank in range(max(len(student), len(teacher))):
        ours = student[rank] if rank < len(student) else torch.zeros_like(l1)
        theirs = teacher[rank] if rank < len(teacher) else torch.zeros_like(l1)
        l1 = l1 + (ours - theirs).abs()
    return common_weight * on_pairs + uld_weight * l1


def chain_rule(rows: Tensor, labels: Sequence[int], merge: str) -> Tensor:
    """A chunk's distribution [V] under the chain rule, not renormalised.

    Args:
        rows: [n, V] distributions that predict the chunk's tokens.
        labels: the n tokens of the text.
        merge: the ``first`` times the probabilities of the later labels, or the ``last`` times those of the earlier.
    """
    others = range(1, len(labels)) if merge == "first" else range(len(labels) - 1)
    row = rows[0] if merge == "first" else rows[-1]
    for i in others:
        row = row * rows[i, labels[i]]
    return row


def sorted_l1(p_S: Tensor, p_T: Sequence[float]) -> Tensor:
    """Sum over ranks of |student - teacher|, the shorter padded with zeros: ULD, given what ``chain_rule`` makes."""
    student = torch.sort(p_S, descending=True).values
    teacher = sorted(p_T, reverse=True)
    total = p_S.new_zeros(())
    for rank in range(max(len(student), len(teacher))):
        ours = student[rank] if rank < len(student) else p_S.new_zeros(())
        theirs = teacher[rank] if rank < len(teacher) else 0.0
        total = total + (ours - theirs).abs()
    return total


def generalised_jsd(p_S: Tensor, p_T: Mapping[int, float], matched: Sequence[int], beta: float) -> Tensor:
    """GOLD's divergence on the matched student ids; ids that ``p_T`` lacks have teacher probability 0.

    With beta = 1 a teacher probability counts as at least 1e-8.
    """
    total = p_S.new_zeros(())
    for s in matched:
        p, q = p_S[s], torch.tensor(p_T.get(s, 0.0), dtype=p_S.dtype)
        if beta == 1:
            total = total + p * (p / q.clamp(min=1e-8)).log()
            continue
        m = (1 - beta) * p + beta * q
        if q > 0:
            total = total + (1 if beta == 0 else beta) * q * (q / m).log()
        if beta > 0:
            total = total + (1 - beta) * p * (p / m).log()
    return total


def gold(
    p_S: Tensor, p_T: Mapping[int, float], other: Sequence[float], matched: Sequence[int], beta: float, teacher: int
) -> Tensor:
    """Strict GOLD of distributions of the chain rule.

    Args:
        p_S: [V] student distribution.
        p_T: kept teacher values by matched student id.
        other: the teacher's other kept values.
        matched: every matched student id.
        beta: of the divergence.
        teacher: size of the teacher's vocabulary.
    """
    weight = len(matched) / teacher
    outside = [s for s in range(len(p_S)) if s not in set(matched)]
    jsd = generalised_jsd(p_S, p_T, matched, beta)
    return weight * jsd + (1 - weight) * sorted_l1(p_S[outside], other)


def alm(l_T: float, l_S: Tensor, mode: str, tau_b: float) -> Tensor:
    """ALM's divergence of two chunk log-likelihoods (arXiv 2503.20083), eps = 1e-6."""
    eps = 1e-6
    if mode == "abs":
        return (l_T - l_S).abs()
    if mode == "limit":
        a, b = torch.tensor(l_T - eps, dtype=l_S.dtype), l_S - eps
        return (a - b) + a * (-b).log() - a * (-a).log()
    a, b = torch.tensor(l_T / tau_b - eps, dtype=l_S.dtype), l_S / tau_b - eps
    if mode == "reverse":
        a, b = b, a
    p, q = a.exp(), b.exp()
    if mode == "tv":
        return (p - q).abs()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def byte_prefix_kl(p_S: Tensor, q: Mapping[int, float], tail: float) -> Tensor:
    """Root or interior term: KL(q || p_S) over the student ids of ``q``, everything else one cell."""
    total = p_S.new_zeros(())
    for u, mass in q.items():
        if mass > 0:
            total = total + mass * (math.log(mass) - p_S[u].log())
    if tail > 0:
        others = [u for u in range(len(p_S)) if u not in q]
        total = total + tail * (math.log(tail) - p_S[others].sum().log())
    return total


def byte_prefix_child(p_S: Tensor, tokens: Sequence[bytes], groups: Mapping[bytes, float]) -> Tensor:
    """Child term: -sum over groups of mass * log of what the student gives to tokens that start with their bytes r.

    Args:
        p_S: [V] student distribution behind the chunk's first token.
        tokens: bytes of each student token, empty for specials.
        groups: mass of each group by its next bytes r; one that no student token starts with is left out.
    """
    total = p_S.new_zeros(())
    for r, mass in groups.items():
        starts = [u for u, data in enumerate(tokens) if data.startswith(r)]
        if starts:
            total = total - mass * p_S[starts].sum().log()
    return total
