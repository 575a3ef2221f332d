"""GOLD (TRL's ULD with a vocabulary map): divergence on tokens of equal bytes, sorted L1 on all others.

    w_m * JSD_beta(p', q' on M) + w_u * sum_r |sort(p' outside M)_r - sort(q' outside M)_r|
    w_m = |M| / V_T,  w_u = 1 - w_m,  p' = p_S * f_S,  q' = p_T * f_T      f: see chain_rule.py

    JSD_0 = sum q' log(q' / p')        JSD_1 = sum p' log(p' / q')
    JSD_beta = beta * sum q' log(q' / m) + (1 - beta) * sum p' log(p' / m),   m = (1 - beta) p' + beta q'

M are the pairs of W whose bytes are equal. Neither side is renormalised on M. Where the teacher did not keep a token
of M, q' = 0: with beta < 1 all these tokens together are a multiple of the student's mass on them; with beta = 1 the
divergence would be infinite and, as in TRL, q' counts as at least 1e-8.

Shapes: P positions, C chunks, V student vocabulary, R ranks compared, K entries summed over chunks.
"""

import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, Places, View
from xtoken.trainer.losses.chain_rule import Chain, chain_merge, cut
from xtoken.trainer.losses.sorted_l1 import Lists, sorted_l1
from xtoken.trainer.losses.token_set import set_mass, set_plogp
from xtoken.trainer.ragged import Arrays, Columns

LOG_FLOOR = math.log(1e-8)  # TRL's least probability of a teacher token in the reverse KL


class Matched(NamedTuple):
    """M, the student tokens with a teacher token of equal bytes.

    Attributes:
        outside_V: 1 for tokens outside M, 0 for those in it.
        unmatched: how many are outside.
        weight, other_weight: w_m, the share of the teacher's vocabulary that is matched, and w_u.
    """

    outside_V: Tensor
    unmatched: int
    weight: float
    other_weight: float

    @classmethod
    def of(cls, matched_V: Tensor, teacher_size: int, pairs: int | None = None) -> "Matched":
        """From a bool per student token, and the number of pairs: as many as tokens, if none share a teacher token."""
        tokens = int(matched_V.sum())
        weight = (tokens if pairs is None else pairs) / teacher_size
        return cls((~matched_V).float(), len(matched_V) - tokens, weight, 1 - weight)


class Compared(NamedTuple):
    """Where GOLD reads: the student's side, the teacher's entries in M by student id, and its lists of all others."""

    chain: Chain
    kept: Places
    lists: Lists

    @classmethod
    def of(cls, chain: Chain, count_C: Tensor, id_K: Tensor, other_count_C: Tensor, width: int) -> "Compared":
        """See ``gold``."""
        return cls(chain, Places.of(count_C, id_K, width, chain.row_C), Lists.of(other_count_C))


class _Student(NamedTuple):
    """The student's distributions under the chain rule.

    Attributes:
        logp_K: log p' of the kept tokens of M.
        inside_C, outside_C: p' of all tokens in and outside M.
        plogp_C: sum of p' log p' over M; 0 unless beta is 1.
        top_CR: the largest p' outside M, descending.
    """

    logp_K: Tensor
    inside_C: Tensor
    plogp_C: Tensor
    outside_C: Tensor
    top_CR: Tensor


def gold(
    logp_PV: Tensor,
    label_P: Tensor,
    first_C: Tensor,
    length_C: Tensor,
    kept: Entries,
    other_count_C: Tensor,
    other_logp_J: Tensor,
    factor_logp_C: Tensor,
    matched: Matched,
    *,
    beta: float = 0.5,
    merge: str = "first",
    at: Compared | None = None,
) -> Tensor:
    """Strict GOLD of each chunk, [C] nats (TRL's ULD with a vocabulary map).

    Its formula is ``reference.gold`` of what ``reference.chain_rule`` makes of both sides.

    Args:
        logp_PV: the student's normalised log-probabilities.
        label_P: int64, the token that each position predicts in the text.
        first_C, length_C: int64, the chunks: first position, and number of positions.
        kept: the teacher's entries in M, by student id.
        other_count_C, other_logp_J: the teacher's other kept log-probabilities, descending in each chunk.
        factor_logp_C: the teacher's log-probability of the chunk's other labels, nats; 0 of a chunk of one token.
        beta: 0 is KL(teacher || student) on M, 1 the reverse, between them the Jensen-Shannon divergence.
        merge: ``first`` or ``last``: the position whose distribution is compared.
        at: where both sides lie, if that is known.
    """
    dtype, width = logp_PV.dtype, logp_PV.shape[1]
    if at is None:
        chain = Chain.of(label_P, first_C, length_C, merge, width)
        at = Compared.of(chain, kept.count_C, kept.id_K, other_count_C, width)
    chunk_K, factor_logp_C = at.kept.owner_K, factor_logp_C.to(dtype)
    teacher_CR = at.lists.padded(other_logp_J.to(dtype).exp())
    ranks = min(teacher_CR.shape[1], matched.unmatched)
    student = _student(logp_PV, at.chain, at.kept, matched.outside_V.to(dtype), ranks, beta)
    matched_C = _divergence(student, kept.logp_K.to(dtype) + factor_logp_C[chunk_K], chunk_K, beta)
    l1_C = sorted_l1(student.top_CR, teacher_CR * factor_logp_C.exp()[:, None], student.outside_C)
    return matched.weight * matched_C + matched.other_weight * l1_C


def _student(logp_PV: Tensor, chain: Chain, kept: Places, outside_V: Tensor, ranks: int, beta: float) -> _Student:
    (row_C, place_E, chunk_E), (chunk_K, kept_K) = chain, kept
    outside = set_mass(logp_PV, outside_V, torch.cat([kept_K, place_E]), ranks)
    logp_K, label_E = cut(outside.logp_E, kept_K, place_E)
    log_factor_C = logp_PV.new_zeros(len(row_C)).index_add(0, chunk_E, label_E)
    factor_C, outside_C = log_factor_C.exp(), outside.mass_P[row_C]
    inside_C, plogp_C = 1 - outside_C, torch.zeros_like(factor_C)
    if beta == 1:  # sum of p f log(p f) = f (sum of p log p + log f * sum of p)
        plogp_C = factor_C * (set_plogp(logp_PV, 1 - outside_V)[row_C] + log_factor_C * inside_C)
    return _Student(
        logp_K + log_factor_C[chunk_K],
        inside_C * factor_C,
        plogp_C,
        outside_C * factor_C,
        outside.top_PR[row_C] * factor_C[:, None],
    )


def _divergence(student: _Student, logq_K: Tensor, chunk_K: Tensor, beta: float) -> Tensor:
    """JSD_beta on M, [C]."""
    logp_K, zeros_C = student.logp_K, torch.zeros_like(student.inside_C)
    p_K, q_K = logp_K.exp(), logq_K.exp()
    # what the student gives to tokens of M that the teacher did not keep: their cells need no sum over M
    unkept_C = student.inside_C - zeros_C.index_add(0, chunk_K, p_K)
    if beta == 1:
        cell_K = -p_K * logq_K.clamp(min=LOG_FLOOR)
        return student.plogp_C + zeros_C.index_add(0, chunk_K, cell_K) - LOG_FLOOR * unkept_C
    if beta == 0:
        return zeros_C.index_add(0, chunk_K, torch.xlogy(q_K, q_K) - q_K * logp_K)
    logm_K = torch.logaddexp(logp_K + math.log1p(-beta), logq_K + math.log(beta))
    cell_K = beta * (torch.xlogy(q_K, q_K) - q_K * logm_K) + (1 - beta) * p_K * (logp_K - logm_K)
    # q' = 0 makes m = (1 - beta) p', whatever p' is
    return zeros_C.index_add(0, chunk_K, cell_K) - (1 - beta) * math.log1p(-beta) * unkept_C


class GOLD(Loss):
    """Strict GOLD against the columns ``gold_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("gold")

    def __init__(self, setup: LossSetup) -> None:
        self.merge, self.temperature, self.beta = chain_merge(setup, "gold"), setup.tau, setup.options.beta
        self.is_matched = np.zeros(setup.student_size, np.bool_)
        self.is_matched[setup.w.student_id[setup.w.exact]] = True
        matched_V = torch.as_tensor(self.is_matched, device=setup.device)
        self.matched = Matched.of(matched_V, setup.teacher_size, int(setup.w.exact.sum()))

    def check(self, arrays: Arrays) -> None:
        """Every matched id must be exact in W."""
        ids = arrays["gold_ids"]
        inside = (ids >= 0) & (ids < len(self.is_matched))
        matched = inside & self.is_matched[np.where(inside, ids, 0)]
        if not matched.all():
            bad = int(ids[~matched][0])
            raise VerificationError(
                f"student id {bad} in gold_ids has no teacher token of equal bytes in w.parquet; "
                "write the targets again"
            )

    def index(self, view: View) -> Compared:
        """See ``Loss.index``."""
        columns, width = view.columns, view.logp_PV.shape[1]
        chain = Chain.of(view.label_P, view.first_C, view.length_C, self.merge, width)
        return Compared.of(chain, columns["gold_count"], columns["gold_ids"], columns["gold_other_count"], width)

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        columns, kept = view.columns, Entries.of_view(view, "gold")
        places = (view.logp_PV, view.label_P, view.first_C, view.length_C)
        other = (columns["gold_other_count"], columns["gold_other_logprob"], columns["factor_logprob"])
        at = self.indexed(view)
        return gold(*places, kept, *other, self.matched, beta=self.beta, merge=self.merge, at=at)


def open_loss(setup: LossSetup) -> GOLD:
    """See ``xtoken.trainer.losses.open_loss``."""
    return GOLD(setup)
