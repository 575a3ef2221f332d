"""P-KL of X-Token (arXiv 2605.21699): the student projected through W into the teacher's vocabulary.

    q_t = sum_s W[s, t] p_S(s)          P-KL = KL(p_T || q), or KL(q || p_T) with ``kl=reverse``

How a chunk becomes one distribution (``merge`` of the targets):

* ``first``: both sides at the chunk's first position. The paper multiplies these by the probabilities of the later
  realised tokens; over a distribution that sums to 1 these factors cancel.
* ``mean``: q is the mean of the projected probabilities over the chunk's positions, p_T what align made of the
  teacher's rows (the normalised geometric mean). Both are renormalised over the kept cells, as under ``rest=drop``.

Stored per chunk: teacher ids that W reaches, their log-probabilities and REST, unreached mass already moved. Only the
columns of W that a chunk keeps are touched; nothing of size chunks x teacher vocabulary exists. See
``xtoken.trainer.losses.divergence`` for the divergence and REST.

How far the value can lie above that of the whole row. Under ``--unreached rest`` never: the stored row is the whole one
with cells put together. Under ``prefix`` an unkept token may belong, by its prefix, to a kept cell, and stands in REST
instead. Let m_c be such mass of cell c, m their sum, p_c the whole row's cells. With H the entropy of the stored cells
before and after m_c is put where it belongs,

    stored - whole <= H(after) - H(before) + sum_c m_c log(q_c / q_rest)
                   <= m (1 + log(rest / q_rest)) + sum_c m_c log(q_c / p_c),

the first since putting cells together lowers a KL, the second since -a log(a + d) + a log a <= 0 for each kept cell and
(rest - m) log(rest / (rest - m)) <= m. Under ``none`` REST holds a share e that the whole row leaves out; the KL is
convex in p, so stored <= (1 - e) whole + e log(1 / q_rest).

``learn_w``: the nonzero pattern of W is fixed, log W[s, t] = log_softmax over the row of theta[s, t]. A row of one
entry stays 1.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary, K kept entries summed over chunks, N entries
of W, J pairs of a kept entry and a position, E entries of W's column for each pair, M cells of [P, V] that these touch,
R rows of W, X their entries.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Loss, LossSetup, ProjectionArrays, View, owners
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_rest, kl_with_tail, ranges
from xtoken.trainer.ragged import Arrays, Columns

ROW_SUM_ROUNDING = 1e-6  # float32 weights of a row sum to 1 within this


class PKL(Loss):
    """P-KL against the columns ``pkl_*`` of the target table."""

    columns = Columns.of("p-kl")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.kl, self.mean = setup.tau, setup.options.kl, setup.merge == "mean"
        self.drop = self.mean or setup.options.rest == "drop"
        self.degree = np.bincount(setup.w.teacher_id, minlength=setup.teacher_size)
        by_column = np.argsort(setup.w.teacher_id, kind="stable")
        self.column_N = torch.as_tensor(by_column, device=setup.device)
        self.degree_U = torch.as_tensor(self.degree, device=setup.device)
        self.start_U = self.degree_U.cumsum(0) - self.degree_U
        self.student_N = torch.as_tensor(setup.w.student_id.astype(np.int64), device=setup.device)
        self.weight_N = torch.tensor(setup.w.weight, device=setup.device)
        self.heaviest_V = torch.as_tensor(heaviest(setup.w, setup.student_size), device=setup.device)
        self.theta = torch.nn.Parameter(self.weight_N.log()) if setup.learn_w else None
        self.size_V = torch.bincount(self.student_N, minlength=setup.student_size)
        self.row_V = self.size_V.cumsum(0) - self.size_V

    def check(self, arrays: Arrays) -> None:
        """Every kept id must be a column of W."""
        ids = arrays["pkl_ids"]
        inside = (ids >= 0) & (ids < len(self.degree))
        reached = inside & (self.degree[np.where(inside, ids, 0)] > 0)
        if not reached.all():
            bad = int(ids[~reached][0])
            raise VerificationError(f"teacher id {bad} in pkl_ids is not reached by w.parquet; write the targets again")

    def terms(self, view: View) -> Tensor:
        """P-KL of each chunk, [C] nats."""
        ids_K, chunk_K = view.columns["pkl_ids"].long(), owners(view.columns["pkl_count"])
        length_K = view.length_C[chunk_K] if self.mean else torch.ones_like(chunk_K)
        kept_J, position_J = ranges(view.first_C[chunk_K], length_K)
        pair_E, column_E = ranges(self.start_U[ids_K[kept_J]], self.degree_U[ids_K[kept_J]])
        w_E = self.column_N[column_E]
        place_E = position_J[pair_E] * view.logp_PV.shape[1] + self.student_N[w_E]
        logw_E = self._log_weight(w_E, view.logp_PV.dtype)
        if self.drop:  # the mean's factor 1 / length cancels with the rest of the normaliser
            logp_E, rest_logq_C = view.logp_PV.reshape(-1).index_select(0, place_E), None
        else:
            logp_E, rest_P = _through_w(view.logp_PV, place_E, logw_E)
            rest_logq_C = rest_P[view.first_C]
        logq_K = group_logsumexp(logp_E + logw_E, kept_J[pair_E], len(ids_K))
        logp_K, rest_logp_C = view.columns["pkl_logprob"], view.columns["pkl_rest_logprob"]
        return kl_with_tail(logp_K, logq_K, chunk_K, rest_logp_C, rest_logq_C, self.kl)

    def agrees(self, view: View) -> Tensor:
        """The teacher token of the largest weight in the W row of the student's token is the teacher's.

        The first of a chunk's entries is its most probable.
        """
        count_C = view.columns["pkl_count"]
        first_C = view.columns["pkl_ids"][count_C.cumsum(0) - count_C].long()
        return self.heaviest_V[view.logp_PV.detach().argmax(dim=1)[view.first_C]] == first_C

    def parameters(self) -> list[torch.nn.Parameter]:
        """theta [N], with ``learn_w``."""
        return [] if self.theta is None else [self.theta]

    def weights(self) -> NDArray[np.float32]:
        """[N], in W's order: the weights as they stand."""
        if self.theta is None:
            return self.weight_N.cpu().numpy()
        every_N = torch.arange(len(self.theta), device=self.theta.device)
        return self._log_weight(every_N, torch.float32).detach().exp().cpu().numpy()

    def _log_weight(self, w_E: Tensor, dtype: torch.dtype) -> Tensor:
        if self.theta is None:
            return self.weight_N[w_E].to(dtype).log()
        student_R, row_E = torch.unique(self.student_N[w_E], return_inverse=True)
        row_X, w_X = ranges(self.row_V[student_R], self.size_V[student_R])
        logsum_R = group_logsumexp(self.theta[w_X], row_X, len(student_R))
        return (self.theta[w_E] - logsum_R[row_E]).to(dtype)


def heaviest(w: ProjectionArrays, size: int) -> NDArray[np.int64]:
    """int64 [V]: for each student token the teacher token of the largest weight (lower id on a tie), or -1."""
    order = np.lexsort((w.teacher_id, -w.weight, w.student_id))
    first = order[np.flatnonzero(np.diff(w.student_id[order], prepend=-1))]
    best_V = np.full(size, -1, np.int64)
    best_V[w.student_id[first]] = w.teacher_id[first]
    return best_V


def _through_w(logp_PV: Tensor, place_E: Tensor, logw_E: Tensor) -> tuple[Tensor, Tensor]:
    """[E] log-probabilities, and [P] log of the mass that W takes nowhere into the kept set.

    A student token whose row lies wholly inside the kept set, to rounding, adds ``NOTHING``.
    """
    place_M, cell_E = torch.unique(place_E, return_inverse=True)
    share_M = 1 - logw_E.new_zeros(len(place_M)).index_add(0, cell_E, logw_E.exp())
    share_M = torch.where(share_M > ROW_SUM_ROUNDING, share_M, NOTHING)
    return kept_and_rest(logp_PV, place_E, place_M, share_M)


def open_loss(setup: LossSetup) -> PKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return PKL(setup)
