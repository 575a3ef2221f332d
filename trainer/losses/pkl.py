"""P-KL of X-Token (arXiv 2605.21699): the student projected through W into the teacher's vocabulary.

    q_t = sum_s W[s, t] p_S(s)          P-KL = KL(p_T || q) at a chunk's first position, REST as one cell

Only the columns of W that the chunk keeps are touched; nothing of size chunks x teacher vocabulary exists.

Shapes: C chunks, V student vocabulary, U teacher vocabulary, K kept entries summed over chunks, N entries of W,
E = for every kept entry the N-entries of its column.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schemas.errors import VerificationError
from trainer.losses.base import Arrays, ChunkColumns, LossSetup, owners
from trainer.losses.sparse_kl import sparse_kl_total

# A student token whose W row lies wholly inside the kept set gives REST this log-share instead of -inf: never nan,
# and far below any log-probability that float32 logits reach, so the gradient is right while REST is above e^-60.
LOG_NOTHING = -80.0
ROW_SUM_ROUNDING = 1e-6  # float32 weights of a row sum to 1 within this


@dataclass(frozen=True)
class _Gathered:
    """Columns of W for the kept entries: owner entry, flat place in [C, V], weight; all [E]."""

    entry_E: Tensor
    place_E: Tensor
    weight_E: Tensor


class PKL:
    """P-KL against the columns ``pkl_*`` of the target table; W is constant."""

    columns = ChunkColumns(("pkl_rest_logprob",), {"pkl_count": ("pkl_ids", "pkl_logprob")})

    def __init__(self, setup: LossSetup) -> None:
        order = np.argsort(setup.w.teacher_id, kind="stable")
        self.degree = np.bincount(setup.w.teacher_id, minlength=setup.teacher_size)
        start = np.concatenate([[0], np.cumsum(self.degree)])
        self.start_U = torch.as_tensor(start, device=setup.device)
        self.student_N = torch.as_tensor(setup.w.student_id[order].astype(np.int64), device=setup.device)
        self.weight_N = torch.as_tensor(setup.w.weight[order], device=setup.device)

    def check(self, arrays: Arrays) -> None:
        """Every kept id must be a column of W."""
        ids = arrays["pkl_ids"]
        inside = (ids >= 0) & (ids < len(self.degree))
        reached = inside & (self.degree[np.where(inside, ids, 0)] > 0)
        if not reached.all():
            bad = int(ids[~reached][0])
            raise VerificationError(f"teacher id {bad} in pkl_ids is not reached by w.parquet; write the targets again")

    def total(self, logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """See ``Loss.total``."""
        chunk_K = owners(targets["pkl_count"])
        gathered = self._gather(targets["pkl_ids"].long(), chunk_K, logp_CV.shape[1])
        logq_K = _projected(logp_CV, gathered, len(chunk_K))
        rest_logq_C = _projected_rest(logp_CV, gathered)
        return sparse_kl_total(targets["pkl_logprob"], logq_K, chunk_K, targets["pkl_rest_logprob"], rest_logq_C)

    def _gather(self, ids_K: Tensor, chunk_K: Tensor, width: int) -> _Gathered:
        first_K = self.start_U[ids_K]
        degree_K = self.start_U[ids_K + 1] - first_K
        entry_E = owners(degree_K)
        before_K = degree_K.cumsum(0) - degree_K
        slot_E = first_K[entry_E] + torch.arange(len(entry_E), device=ids_K.device) - before_K[entry_E]
        return _Gathered(entry_E, chunk_K[entry_E] * width + self.student_N[slot_E], self.weight_N[slot_E])


def _projected(logp_CV: Tensor, gathered: _Gathered, entries: int) -> Tensor:
    """log q [K] = log-sum-exp over the entry's column of W."""
    term_E = logp_CV.reshape(-1).index_select(0, gathered.place_E) + gathered.weight_E.to(logp_CV.dtype).log()
    top_K = term_E.new_full((entries,), -torch.inf)
    top_K = top_K.scatter_reduce(0, gathered.entry_E, term_E.detach(), "amax")
    scaled_E = (term_E - top_K[gathered.entry_E]).exp()
    return top_K + term_E.new_zeros(entries).index_add(0, gathered.entry_E, scaled_E).log()


def _projected_rest(logp_CV: Tensor, gathered: _Gathered) -> Tensor:
    """log q_rest [C] = log-sum-exp over all s of log p_S(s) + log(1 - sum of W[s, t] over the kept t).

    This is the complement of sum_A q as a sum of non-negative parts. log1mexp(log sum_A q) costs less, but as
    sum_A q nears 1 its gradient Q / (1 - Q) divides one rounding error by another, exactly where REST must pull.
    """
    scratch = logp_CV.new_zeros(logp_CV.numel())  # [C * V]: W inside the kept set, then log of what is outside
    scratch.index_put_((gathered.place_E,), gathered.weight_E.to(logp_CV.dtype), accumulate=True)
    share_E = 1 - scratch[gathered.place_E]
    logshare_E = torch.where(share_E > ROW_SUM_ROUNDING, share_E.clamp(min=ROW_SUM_ROUNDING).log(), LOG_NOTHING)
    scratch.zero_().index_put_((gathered.place_E,), logshare_E)
    return torch.logsumexp(logp_CV + scratch.view_as(logp_CV), dim=1)


def open_loss(setup: LossSetup) -> PKL:
    """See ``trainer.losses.open_loss``."""
    return PKL(setup)
