"""H-KL of X-Token (arXiv 2605.21699): KL on pairs both vocabularies share, sorted L1 on what is left.

    sum_{(s,t) in C} p_T(t) (log p_T(t) - log p_S(s))
        + uld_weight * sum_r |sort(p_S outside C)_r - sort(p_T outside C)_r|

Nothing is renormalised on C, so the first sum may be negative. The teacher's outside part is what its top-K kept;
the rest counts as zeros. The student's is cut at ``uncommon_topk``.

Shapes: C chunks, V student vocabulary, O student tokens outside the common set, K entries summed over chunks,
R ranks compared.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from schemas.errors import VerificationError
from trainer.losses.base import Arrays, ChunkColumns, LossSetup, owners


class HKL:
    """H-KL against the columns ``hkl_*`` of the target table."""

    columns = ChunkColumns(
        (),
        {
            "hkl_common_count": ("hkl_common_ids", "hkl_common_logprob"),
            "hkl_other_count": ("hkl_other_logprob",),
        },
    )

    def __init__(self, setup: LossSetup) -> None:
        self.is_common = np.zeros(setup.student_size, np.bool_)
        self.is_common[setup.w.student_id[setup.w.common]] = True
        self.outside_O = torch.as_tensor(np.flatnonzero(~self.is_common), device=setup.device)
        self.uld_weight, self.uncommon_topk = setup.uld_weight, setup.uncommon_topk

    def check(self, arrays: Arrays) -> None:
        """Every paired id must be in the common set of W."""
        ids = arrays["hkl_common_ids"]
        inside = (ids >= 0) & (ids < len(self.is_common))
        paired = inside & self.is_common[np.where(inside, ids, 0)]
        if not paired.all():
            bad = int(ids[~paired][0])
            raise VerificationError(
                f"student id {bad} in hkl_common_ids is not common in w.parquet; write the targets again"
            )

    def total(self, logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """See ``Loss.total``."""
        common = _common_kl(logp_CV, targets)
        if self.uld_weight == 0:
            return common
        return common + self.uld_weight * self._sorted_l1(logp_CV, targets)

    def _sorted_l1(self, logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        ranks = min(self.uncommon_topk, len(self.outside_O))
        student_CR = logp_CV.index_select(1, self.outside_O).topk(ranks, dim=1).values.exp()
        teacher_CR = _padded(targets["hkl_other_count"], targets["hkl_other_logprob"].to(logp_CV.dtype).exp())
        teacher_CR = teacher_CR[:, : self.uncommon_topk]
        width = max(ranks, teacher_CR.shape[1])
        student_CR = pad(student_CR, (0, width - ranks))
        return (student_CR - pad(teacher_CR, (0, width - teacher_CR.shape[1]))).abs().sum()


def _common_kl(logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    chunk_K = owners(targets["hkl_common_count"])
    logp_S_K = logp_CV[chunk_K, targets["hkl_common_ids"].long()]
    p_T_K = targets["hkl_common_logprob"].to(logp_CV.dtype).exp()
    return (torch.xlogy(p_T_K, p_T_K) - p_T_K * logp_S_K).sum()


def _padded(count_C: Tensor, value_K: Tensor) -> Tensor:
    """[C, longest] with zeros after each chunk's values."""
    count_C = count_C.long()
    longest = int(count_C.max()) if len(count_C) else 0
    chunk_K = owners(count_C)
    rank_K = torch.arange(len(value_K), device=value_K.device) - (count_C.cumsum(0) - count_C)[chunk_K]
    padded_CR = value_K.new_zeros(len(count_C), longest)
    padded_CR[chunk_K, rank_K] = value_K
    return padded_CR


def open_loss(setup: LossSetup) -> HKL:
    """See ``trainer.losses.open_loss``."""
    return HKL(setup)
