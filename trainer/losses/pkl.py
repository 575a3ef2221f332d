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
of W, J pairs of a kept entry and a position, E entries of W's column for each pair, M places of [P, V] that these
read, R rows of W, X their entries.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.compiled import compiled
from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, ProjectionArrays, View, owners
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_tail, kl_with_tail, ranges
from xtoken.trainer.losses.log_softmax import picked
from xtoken.trainer.packed import moved
from xtoken.trainer.ragged import Arrays, Columns, Ints

ROW_SUM_ROUNDING = 1e-6  # float32 weights of a row sum to 1 within this


class Rows(NamedTuple):
    """The rows of W that some of its entries E lie in, whole: what a learned W normalises. Empty of one that is not.

    Attributes:
        total: how many, R.
        row_E: the row of each entry.
        row_X, w_X: all entries of these rows: the row of each, and which of W's it is.
    """

    total: int
    row_E: Tensor
    row_X: Tensor
    w_X: Tensor


class Walk(NamedTuple):
    """Where W leads a block's kept entries among the student's log-probabilities [P, V], all int64.

    Attributes:
        chunk_K: the chunk of each kept entry.
        kept_E: the kept entry that each of W's belongs to.
        w_E: which of W's entries it is.
        place_E: the place in [P, V] that it reads.
        place_M: these places, each once. cell_E: which of them each is. Empty where the tail is dropped.
        rows: of ``w_E``.
    """

    chunk_K: Tensor
    kept_E: Tensor
    w_E: Tensor
    place_E: Tensor
    place_M: Tensor
    cell_E: Tensor
    rows: Rows


class WByColumn:
    """W with the entries of each teacher token together: what ``p_kl`` walks along.

    Attributes:
        weight_N: the weights of W's entries, ascending by student token, where the student is. All else is on the CPU,
            where paths through W are found before the student is asked.
        student_N: the student tokens of the entries.
        column_N: the entries in order of their teacher token.
        degree_U, start_U: how many entries each teacher token has, and where they begin in ``column_N``.
        reached_U: bool, a numpy array: the teacher token has any.
        size_V, row_V: how many entries each student token has, and where they begin.
    """

    def __init__(
        self, student_N: Tensor, teacher_N: Tensor, weight_N: Tensor, student_size: int, teacher_size: int
    ) -> None:
        self.student_N, self.weight_N = student_N.long().cpu(), weight_N
        self.column_N = teacher_N.cpu().argsort(stable=True)
        self.degree_U = teacher_N.cpu().bincount(minlength=teacher_size)
        self.reached_U = (self.degree_U > 0).numpy()
        self.start_U = self.degree_U.cumsum(0) - self.degree_U
        self.size_V = self.student_N.bincount(minlength=student_size)
        self.row_V = self.size_V.cumsum(0) - self.size_V

    def walk(
        self, count_C: Tensor, id_K: Tensor, width: int, first_C: Tensor | None, length_C: Tensor | None, drop: bool
    ) -> Walk:
        """Paths from kept entries to log-probabilities [P, V], V being the ``width``; see ``p_kl``.

        ``first_C`` ascends, if it is given.
        """
        id_K, chunk_K = id_K.long(), owners(count_C, len(id_K))
        first_K = chunk_K if first_C is None else first_C[chunk_K]
        # a pair J is an entry at one of its chunk's positions; E are the student tokens that W maps to the pair's id
        kept_J, position_J = torch.arange(len(chunk_K)), first_K
        if length_C is not None:
            kept_J, position_J = ranges(first_K, length_C[chunk_K])
        found = paths(
            kept_J.numpy(),
            position_J.numpy(),
            id_K[kept_J].numpy(),
            self.start_U.numpy(),
            self.degree_U.numpy(),
            self.column_N.numpy(),
            self.student_N.numpy(),
            width,
            drop,
        )
        kept_E, w_E, place_E, place_M, cell_E = map(torch.from_numpy, found)
        return Walk(chunk_K, kept_E, w_E, place_E, place_M, cell_E, self.rows(w_E))

    def rows(self, w_E: Tensor) -> Rows:
        """See ``Rows``."""
        return Rows(0, w_E[:0], w_E[:0], w_E[:0])

    def log_weight(self, w_E: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - for a learned one
        """[E] log of the weights of some entries, whose rows are ``rows``."""
        return self.weight_N[w_E].to(dtype).log()


class LearnedW(WByColumn):
    """W whose weights are learned: log W[s, t] = log_softmax over the row of ``theta``, which begins at log W."""

    def __init__(
        self, student_N: Tensor, teacher_N: Tensor, weight_N: Tensor, student_size: int, teacher_size: int
    ) -> None:
        super().__init__(student_N, teacher_N, weight_N, student_size, teacher_size)
        self.theta = torch.nn.Parameter(weight_N.log())

    def rows(self, w_E: Tensor) -> Rows:
        """See ``Rows``."""
        student_R, row_E = torch.unique(self.student_N[w_E], return_inverse=True)
        return Rows(len(student_R), row_E, *ranges(self.row_V[student_R], self.size_V[student_R]))

    def log_weight(self, w_E: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """See ``WByColumn.log_weight``; only the rows of W that are touched are normalised."""
        logsum_R = group_logsumexp(self.theta[rows.w_X], rows.row_X, rows.total)
        return (self.theta[w_E] - logsum_R[rows.row_E]).to(dtype)


@compiled
def paths(
    kept_J: Ints,
    position_J: Ints,
    id_J: Ints,
    start_U: Ints,
    degree_U: Ints,
    column_N: Ints,
    student_N: Ints,
    width: int,
    drop: bool,
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """``kept_E``, ``w_E``, ``place_E``, ``place_M`` and ``cell_E`` of ``Walk``, from the pairs J of ``WByColumn.walk``.

    Pairs of one position stand together, unless ``drop`` says that the last two are not asked for.
    """
    total = degree_U[id_J].sum()
    kept_E, w_E, place_E = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total, np.int64)
    place_M, cell_E = np.empty(0 if drop else total, np.int64), np.empty(0 if drop else total, np.int64)
    newest_V = np.full(0 if drop else width, -1, np.int64)  # the newest cell of each token; a position's from ``began``
    at = cells = began = 0
    for pair in range(len(kept_J)):
        if pair and position_J[pair] != position_J[pair - 1]:
            began = cells
        start = start_U[id_J[pair]]
        for entry in column_N[start : start + degree_U[id_J[pair]]]:
            token = student_N[entry]
            kept_E[at], w_E[at], place_E[at] = kept_J[pair], entry, position_J[pair] * width + token
            if not drop:  # several kept ids of a chunk may share a student token
                if newest_V[token] < began:
                    newest_V[token] = cells
                    place_M[cells] = place_E[at]
                    cells += 1
                cell_E[at] = newest_V[token]
            at += 1
    return kept_E, w_E, place_E, place_M[:cells].copy(), cell_E


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
    at: Walk | None = None,
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
        at: ``w.walk`` of these entries and chunks, on the device of ``logp_PV``, if it is known.
    """
    assert drop or length_C is None, "the mean over positions is known up to a factor, which only drop cancels"
    if at is None:
        count_C, id_K, *where = moved((kept.count_C, kept.id_K, first_C, length_C), torch.device("cpu"))
        at = Walk(*moved(w.walk(count_C, id_K, logp_PV.shape[1], where[0], where[1], drop), logp_PV.device))
    logw_E = w.log_weight(at.w_E, at.rows, logp_PV.dtype)
    if drop:  # the mean's factor 1 / length cancels with the rest of the normaliser
        logp_E, tail_logq_C = picked(logp_PV, at.place_E), None
    else:
        logp_E, tail_P = _through_w(logp_PV, at, logw_E)
        tail_logq_C = tail_P if first_C is None else tail_P[first_C]
    # log q_t = logsumexp over s of log W[s, t] + log p_S(s), over all pairs of the entry
    logq_K = group_logsumexp(logp_E + logw_E, at.kept_E, len(kept.logp_K))
    return kl_with_tail(kept.logp_K, logq_K, at.chunk_K, tail_logp_C, tail_logq_C, kl)


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

    def index(self, view: View) -> Walk:
        """See ``Loss.index``."""
        count_C, id_K, length_C = view.columns["pkl_count"], view.columns["pkl_ids"], view.length_C
        return self.w.walk(
            count_C, id_K, view.logp_PV.shape[1], view.first_C, length_C if self.mean else None, self.drop
        )

    def terms(self, view: View) -> Tensor:
        """P-KL of each chunk, [C] nats."""
        kept, tail_logp_C = Entries.of_view(view, "pkl"), view.columns["pkl_rest_logprob"]
        where = (view.first_C, view.length_C if self.mean else None)
        at = self.indexed(view)
        return p_kl(view.logp_PV, self.w, kept, tail_logp_C, *where, kl=self.kl, drop=self.drop, at=at)

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
        every_N = torch.arange(len(self.w.theta))
        every_N, rows = moved((every_N, self.w.rows(every_N)), self.w.theta.device)
        return self.w.log_weight(every_N, rows, torch.float32).detach().exp().cpu().numpy()


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


def _through_w(logp_PV: Tensor, at: Walk, logw_E: Tensor) -> tuple[Tensor, Tensor]:
    """[E] log-probabilities, and [P] log of the mass that W takes nowhere into the kept set.

    A student token whose row lies wholly inside the kept set, to rounding, adds ``NOTHING``.
    """
    # several kept ids of a chunk may share a student token: the shares of its W row that lead into the kept set add up
    share_M = 1 - logw_E.new_zeros(len(at.place_M)).index_add(0, at.cell_E, logw_E.exp())
    share_M = torch.where(share_M > ROW_SUM_ROUNDING, share_M, NOTHING)
    return kept_and_tail(logp_PV, at.place_E, at.place_M, share_M)


def open_loss(setup: LossSetup) -> PKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return PKL(setup)
