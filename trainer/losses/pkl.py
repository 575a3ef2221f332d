"""P-KL of X-Token (arXiv 2605.21699): the student projected through W into the teacher's vocabulary.

    q_t = sum_s W[s, t] p_S(s)          P-KL = KL(p_T || q), or KL(q || p_T) with ``kl=reverse``

How a chunk becomes one distribution (``merge`` of the targets):

* ``first``: both sides at the chunk's first position. The paper multiplies these by the probabilities of the later
  labels; over a distribution that sums to 1 these factors cancel.
* ``mean``: q is the mean of the projected probabilities over the chunk's positions, p_T what align made of the
  teacher's distributions (the normalised geometric mean). Both are renormalised over the kept cells, as under
  ``rest=drop``.

Stored per chunk: teacher ids that W reaches, their log-probabilities and the tail mass, unreached mass already moved.
Only the columns of W that a chunk keeps are touched; nothing of size chunks x teacher vocabulary exists. See
``xtoken.trainer.losses.divergence`` for the divergence and the tail.

How far the value can lie above that of the whole distribution. Under ``--unreached rest`` never: the stored one is
the whole one with cells put together. Under ``prefix`` an unkept token may belong, by its prefix, to a kept cell, and
stands in the tail instead. Let m_c be such mass of cell c, m their sum, p_c the cells of the whole distribution. With H
the entropy of the stored cells before and after m_c is put where it belongs,

    stored - whole <= H(after) - H(before) + sum_c m_c log(q_c / q_tail)
                   <= m (1 + log(tail / q_tail)) + sum_c m_c log(q_c / p_c),

the first since putting cells together lowers a KL, the second since -a log(a + d) + a log a <= 0 for each kept cell and
(tail - m) log(tail / (tail - m)) <= m. Under ``none`` the tail holds a share e that the whole distribution leaves out;
the KL is convex in p, so stored <= (1 - e) whole + e log(1 / q_tail).

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
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, ProjectionArrays, View, owners
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_tail, kl_with_tail, ranges
from xtoken.trainer.ragged import Arrays, Columns

ROW_SUM_ROUNDING = 1e-6  # float32 weights of a row sum to 1 within this


class WByColumn:
    """W with the entries of each teacher token together: what ``p_kl`` walks along.

    Attributes:
        student_N, weight_N: W's entries, ascending by student token.
        column_N: the entries in order of their teacher token.
        degree_U, start_U: how many entries each teacher token has, and where they begin in ``column_N``.
        reached_U: bool, a numpy array: the teacher token has any.
        size_V, row_V: how many entries each student token has, and where they begin.
    """

    def __init__(
        self, student_N: Tensor, teacher_N: Tensor, weight_N: Tensor, student_size: int, teacher_size: int
    ) -> None:
        self.student_N, self.weight_N = student_N.long(), weight_N
        self.column_N = teacher_N.argsort(stable=True)
        self.degree_U = teacher_N.bincount(minlength=teacher_size)
        self.reached_U = (self.degree_U > 0).cpu().numpy()
        self.start_U = self.degree_U.cumsum(0) - self.degree_U
        self.size_V = self.student_N.bincount(minlength=student_size)
        self.row_V = self.size_V.cumsum(0) - self.size_V

    def log_weight(self, w_E: Tensor, dtype: torch.dtype) -> Tensor:
        """[E] log of the weights of some entries."""
        return self.weight_N[w_E].to(dtype).log()


class LearnedW(WByColumn):
    """W whose weights are learned: log W[s, t] = log_softmax over the row of ``theta``, which begins at log W."""

    def __init__(
        self, student_N: Tensor, teacher_N: Tensor, weight_N: Tensor, student_size: int, teacher_size: int
    ) -> None:
        super().__init__(student_N, teacher_N, weight_N, student_size, teacher_size)
        self.theta = torch.nn.Parameter(weight_N.log())

    def log_weight(self, w_E: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``WByColumn.log_weight``; only the rows of W that are touched are normalised."""
        student_R, row_E = torch.unique(self.student_N[w_E], return_inverse=True)
        row_X, w_X = ranges(self.row_V[student_R], self.size_V[student_R])
        logsum_R = group_logsumexp(self.theta[w_X], row_X, len(student_R))
        return (self.theta[w_E] - logsum_R[row_E]).to(dtype)


def p_kl(
    logp_PV: Tensor,
    w: WByColumn,
    kept: Entries,
    tail_logp_C: Tensor,
    first_C: Tensor | None = None,
    length_C: Tensor | None = None,
    *,
    kl: str = "forward",
    drop: bool = False,
) -> Tensor:
    """P-KL of each chunk, [C] nats (arXiv 2605.21699); ``reference.p_kl`` is its formula.

    Args:
        logp_PV: the student's normalised log-probabilities.
        w: rows sum to 1 or are empty.
        kept: the teacher's entries, at least one per chunk, ids that W reaches.
        tail_logp_C: log of the teacher's mass that is not kept; -inf = none; with ``drop`` it is not read.
        first_C: the first position of each chunk; every position is a chunk when left out.
        length_C: compare with the mean over so many positions of each chunk (needs ``drop``), not with the first.
        kl: ``forward``, or ``reverse`` for KL(q || p_T).
        drop: renormalise both sides over the kept ids, instead of a cell for the tail.
    """
    assert drop or length_C is None, "the mean over positions is known up to a factor, which only drop cancels"
    id_K, chunk_K = kept.id_K.long(), owners(kept.count_C, len(kept.id_K))
    first_K = chunk_K if first_C is None else first_C[chunk_K]
    # a pair J is an entry at one of its chunk's positions; E are the student tokens that W maps to the pair's id
    if length_C is None:
        kept_J, position_J = torch.arange(len(chunk_K), device=chunk_K.device), first_K
    else:
        kept_J, position_J = ranges(first_K, length_C[chunk_K])
    pair_E, column_E = ranges(w.start_U[id_K[kept_J]], w.degree_U[id_K[kept_J]])
    w_E = w.column_N[column_E]
    place_E = position_J[pair_E] * logp_PV.shape[1] + w.student_N[w_E]
    logw_E = w.log_weight(w_E, logp_PV.dtype)
    if drop:  # the mean's factor 1 / length cancels with the rest of the normaliser
        logp_E, tail_logq_C = logp_PV.reshape(-1).index_select(0, place_E), None
    else:
        logp_E, tail_P = _through_w(logp_PV, place_E, logw_E)
        tail_logq_C = tail_P if first_C is None else tail_P[first_C]
    # log q_t = logsumexp over s of log W[s, t] + log p_S(s), over all pairs of the entry
    logq_K = group_logsumexp(logp_E + logw_E, kept_J[pair_E], len(id_K))
    return kl_with_tail(kept.logp_K, logq_K, chunk_K, tail_logp_C, tail_logq_C, kl)


class PKL(Loss):
    """P-KL against the columns ``pkl_*`` of the target table."""

    columns = Columns.of("p-kl")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.kl, self.mean = setup.tau, setup.options.kl, setup.merge == "mean"
        self.drop = self.mean or setup.options.rest == "drop"
        self.w = w_by_column(setup)
        self.heaviest_V = torch.as_tensor(heaviest(setup.w, setup.student_size), device=setup.device)

    def check(self, arrays: Arrays) -> None:
        """Every kept id must be a column of W."""
        refuse_unreached(self.w, arrays, "pkl_ids")

    def terms(self, view: View) -> Tensor:
        """P-KL of each chunk, [C] nats."""
        kept, tail_logp_C = Entries.of_view(view, "pkl"), view.columns["pkl_rest_logprob"]
        length_C = view.length_C if self.mean else None
        return p_kl(view.logp_PV, self.w, kept, tail_logp_C, view.first_C, length_C, kl=self.kl, drop=self.drop)

    def agrees(self, view: View) -> Tensor:
        """The teacher token of the largest weight in the W row of the student's token is the teacher's.

        The first of a chunk's entries is its most probable.
        """
        count_C = view.columns["pkl_count"]
        first_C = view.columns["pkl_ids"][count_C.cumsum(0) - count_C].long()
        return self.heaviest_V[view.logp_PV.detach().argmax(dim=1)[view.first_C]] == first_C

    def parameters(self) -> list[torch.nn.Parameter]:
        """theta [N], with ``learn_w``."""
        return [self.w.theta] if isinstance(self.w, LearnedW) else []

    def weights(self) -> NDArray[np.float32]:
        """[N], in W's order: the weights as they stand."""
        if not isinstance(self.w, LearnedW):
            return self.w.weight_N.cpu().numpy()
        every_N = torch.arange(len(self.w.theta), device=self.w.theta.device)
        return self.w.log_weight(every_N, torch.float32).detach().exp().cpu().numpy()


def w_by_column(setup: LossSetup) -> WByColumn:
    """The W of a loss; ``LearnedW`` where that was asked for."""
    student_N, teacher_N, weight_N = (
        torch.tensor(part, device=setup.device)
        for part in (setup.w.student_id, setup.w.teacher_id.astype(np.int64), setup.w.weight)
    )
    kind = LearnedW if setup.learn_w else WByColumn
    return kind(student_N, teacher_N, weight_N, setup.student_size, setup.teacher_size)


def refuse_unreached(w: WByColumn, arrays: Arrays, name: str) -> None:
    """Raise VerificationError for a teacher id in the column ``name`` that no row of W reaches."""
    ids = arrays[name]
    inside = (ids >= 0) & (ids < len(w.reached_U))
    reached = inside & w.reached_U[np.where(inside, ids, 0)]
    if not reached.all():
        bad = int(ids[~reached][0])
        raise VerificationError(f"teacher id {bad} in {name} is not reached by w.parquet; write the targets again")


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
    # several kept ids of a chunk may share a student token: the shares of its W row that lead into the kept set add up
    place_M, cell_E = torch.unique(place_E, return_inverse=True)
    share_M = 1 - logw_E.new_zeros(len(place_M)).index_add(0, cell_E, logw_E.exp())
    share_M = torch.where(share_M > ROW_SUM_ROUNDING, share_M, NOTHING)
    return kept_and_tail(logp_PV, place_E, place_M, share_M)


def open_loss(setup: LossSetup) -> PKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return PKL(setup)
