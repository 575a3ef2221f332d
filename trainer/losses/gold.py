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
from xtoken.trainer.losses.base import Loss, LossSetup, View, owners
from xtoken.trainer.losses.chain_rule import chain_merge, chunk_row, cut, realised_places
from xtoken.trainer.losses.sorted_l1 import padded, sorted_l1
from xtoken.trainer.losses.token_set import set_mass, set_plogp
from xtoken.trainer.ragged import Arrays, Columns

LOG_FLOOR = math.log(1e-8)  # TRL's least probability of a teacher token in the reverse KL


class _Student(NamedTuple):
    """The student's rows under the chain rule.

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


class GOLD(Loss):
    """Strict GOLD against the columns ``gold_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("gold")

    def __init__(self, setup: LossSetup) -> None:
        self.merge, self.temperature, self.beta = chain_merge(setup, "gold"), setup.tau, setup.options.beta
        self.is_matched = np.zeros(setup.student_size, np.bool_)
        self.is_matched[setup.w.student_id[setup.w.exact]] = True
        self.outside_V = torch.as_tensor(~self.is_matched, dtype=torch.float32, device=setup.device)
        self.unmatched = setup.student_size - int(self.is_matched.sum())
        self.matched_weight = int(setup.w.exact.sum()) / setup.teacher_size
        self.unmatched_weight = 1 - self.matched_weight

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

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        columns, dtype = view.columns, view.logp_PV.dtype
        chunk_K, factor_C = owners(columns["gold_count"]), columns["factor_logprob"].to(dtype)
        teacher_CR = padded(columns["gold_other_count"], columns["gold_other_logprob"].to(dtype).exp())
        student = self._student(view, chunk_K, min(teacher_CR.shape[1], self.unmatched))
        logq_K = columns["gold_logprob"].to(dtype) + factor_C[chunk_K]
        matched_C = self._divergence(student, logq_K, chunk_K)
        l1_C = sorted_l1(student.top_CR, teacher_CR * factor_C.exp()[:, None], student.outside_C)
        return self.matched_weight * matched_C + self.unmatched_weight * l1_C

    def _student(self, view: View, chunk_K: Tensor, ranks: int) -> _Student:
        logp_PV, row_C = view.logp_PV, chunk_row(view, self.merge)
        outside_V = self.outside_V.to(logp_PV.dtype)
        kept_K = row_C[chunk_K] * logp_PV.shape[1] + view.columns["gold_ids"].long()
        place_E, chunk_E = realised_places(view, row_C)
        found = set_mass(logp_PV, outside_V, torch.cat([kept_K, place_E]), ranks)
        logp_K, realised_E = cut(found.logp_E, kept_K, place_E)
        log_factor_C = logp_PV.new_zeros(len(row_C)).index_add(0, chunk_E, realised_E)
        factor_C, outside_C = log_factor_C.exp(), found.mass_P[row_C]
        inside_C, plogp_C = 1 - outside_C, torch.zeros_like(factor_C)
        if self.beta == 1:
            plogp_C = factor_C * (set_plogp(logp_PV, 1 - outside_V)[row_C] + log_factor_C * inside_C)
        return _Student(
            logp_K + log_factor_C[chunk_K],
            inside_C * factor_C,
            plogp_C,
            outside_C * factor_C,
            found.top_PR[row_C] * factor_C[:, None],
        )

    def _divergence(self, student: _Student, logq_K: Tensor, chunk_K: Tensor) -> Tensor:
        """JSD_beta on M, [C]."""
        logp_K, zeros_C = student.logp_K, torch.zeros_like(student.inside_C)
        p_K, q_K = logp_K.exp(), logq_K.exp()
        unkept_C = student.inside_C - zeros_C.index_add(0, chunk_K, p_K)
        if self.beta == 1:
            cell_K = -p_K * logq_K.clamp(min=LOG_FLOOR)
            return student.plogp_C + zeros_C.index_add(0, chunk_K, cell_K) - LOG_FLOOR * unkept_C
        if self.beta == 0:
            return zeros_C.index_add(0, chunk_K, torch.xlogy(q_K, q_K) - q_K * logp_K)
        logm_K = torch.logaddexp(logp_K + math.log1p(-self.beta), logq_K + math.log(self.beta))
        cell_K = self.beta * (torch.xlogy(q_K, q_K) - q_K * logm_K) + (1 - self.beta) * p_K * (logp_K - logm_K)
        # q' = 0 makes m = (1 - beta) p', whatever p' is.
        return zeros_C.index_add(0, chunk_K, cell_K) - (1 - self.beta) * math.log1p(-self.beta) * unkept_C


def open_loss(setup: LossSetup) -> GOLD:
    """See ``xtoken.trainer.losses.open_loss``."""
    return GOLD(setup)
