"""H-KL of X-Token (arXiv 2605.21699): KL on pairs both vocabularies share, sorted L1 on what is left.

    common_weight * sum_{(s,t) in C} p_T(t) (log p_T(t) - log p_S(s))
        + uld_weight * sum_r |sort(p_S outside C)_r - sort(p_T outside C)_r|

C is the common set of W; with ``kl=reverse`` its terms are p_S(s) (log p_S(s) - log p_T(t)). Nothing is renormalised
on it and pairs that the teacher did not keep are left out, so the first sum may be negative. The sorted lists are
padded with zeros to the longer one and both are cut at ``uncommon_topk``; the teacher's holds what its top-k kept
outside C.

A chunk's p_S is that of its first position, or with ``merge`` mean the geometric mean over its positions, not
renormalised, as the teacher's then is. Stored per chunk: student ids and teacher log-probabilities of the kept pairs,
and the teacher's other kept log-probabilities, descending.

Shapes: P positions, C chunks, V student vocabulary, O student tokens outside the common set, K entries summed over
chunks, J pairs of a chunk and a position, R ranks compared.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, Places, View
from xtoken.trainer.losses.divergence import cells, ranges
from xtoken.trainer.losses.log_softmax import rows_at
from xtoken.trainer.losses.sorted_l1 import Lists
from xtoken.trainer.ragged import Arrays, Columns


class Paired(NamedTuple):
    """Where the teacher's kept pairs lie among the chunks' log-probabilities [C, V], and its other values as lists."""

    kept: Places
    lists: Lists

    @classmethod
    def of(cls, count_C: Tensor, id_K: Tensor, other_count_C: Tensor, width: int) -> "Paired":
        """See ``h_kl``."""
        return cls(Places.of(count_C, id_K, width), Lists.of(other_count_C))


class Index(NamedTuple):
    """What H-KL asks of a view's targets; all int64.

    Attributes:
        at: see ``Paired``.
        chunk_J, position_J: the positions of each chunk, for the mean over them; else empty.
        sure_C: the chunks whose most probable teacher token is in a pair. best_K: the student's token of that pair, and
            of those as probable. of_K: which of ``sure_C`` each belongs to.
    """

    at: Paired
    chunk_J: Tensor
    position_J: Tensor
    sure_C: Tensor
    best_K: Tensor
    of_K: Tensor


def h_kl(
    logp_CV: Tensor,
    common: Entries,
    other_count_C: Tensor,
    other_logp_J: Tensor,
    outside_O: Tensor,
    *,
    kl: str = "forward",
    common_weight: float = 1.0,
    uld_weight: float = 1.0,
    uncommon_topk: int = 8192,
    at: Paired | None = None,
) -> Tensor:
    """H-KL of each chunk, [C] nats (arXiv 2605.21699); ``reference.h_kl`` is its formula.

    Args:
        logp_CV: the student's log-probabilities of each chunk.
        common: the teacher's kept pairs of the common set, by student id.
        other_count_C, other_logp_J: the teacher's other kept log-probabilities, descending in each chunk.
        outside_O: int64, the student ids outside the common set.
        kl: on the common set, ``forward``, or ``reverse`` for KL(p_S || p_T).
        common_weight, uld_weight: of the two parts.
        uncommon_topk: ranks compared.
        at: where the teacher's values lie, if that is known.
    """
    at = at or Paired.of(common.count_C, common.id_K, other_count_C, logp_CV.shape[1])
    (chunk_K, place_K), dtype = at.kept, logp_CV.dtype
    if uld_weight == 0:  # no order of the vocabulary is worked out for nothing
        logp_S_K, l1_C = logp_CV.reshape(-1).index_select(0, place_K), logp_CV.new_zeros(len(logp_CV))
    else:
        teacher_CR = at.lists.padded(other_logp_J.to(dtype).exp())[:, :uncommon_topk]
        inputs = (logp_CV.contiguous(), place_K, teacher_CR, outside_O, min(uncommon_topk, len(outside_O)))
        logp_S_K, l1_C = _CommonAndSorted.apply(*inputs)  # type: ignore[no-untyped-call]
    common_C = torch.zeros_like(l1_C).index_add(0, chunk_K, cells(common.logp_K.to(dtype), logp_S_K, kl))
    return common_weight * common_C + uld_weight * l1_C


class HKL(Loss):
    """H-KL against the columns ``hkl_*`` of the target table."""

    columns = Columns.of("h-kl")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.options, self.mean = setup.tau, setup.options, setup.merge == "mean"
        self.is_common = np.zeros(setup.student_size, np.bool_)
        self.is_common[setup.w.student_id[setup.w.common]] = True
        self.outside_O = torch.as_tensor(np.flatnonzero(~self.is_common), device=setup.device)

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

    def agrees(self, view: View) -> Tensor:
        """The student's most probable token is the pair of the teacher's, of chunks whose teacher's is in a pair."""
        at: Index = self.indexed(view)
        student_C = view.logp_PV.detach().argmax(dim=1)[view.first_C[at.sure_C]]
        match_K = at.best_K == student_C[at.of_K]
        return torch.zeros_like(at.sure_C).index_add(0, at.of_K, match_K.long()) > 0

    def index(self, view: View) -> Index:
        """See ``Loss.index``."""
        columns = view.columns
        common, other_C = Entries.of_view(view, "hkl_common"), columns["hkl_other_count"]
        at = Paired.of(common.count_C, common.id_K, other_C, view.logp_PV.shape[1])
        positions = ranges(view.first_C, view.length_C) if self.mean else (other_C[:0].long(), other_C[:0].long())
        return Index(at, *positions, *_best_pairs(common, at.kept.owner_K, other_C, columns["hkl_other_logprob"]))

    def terms(self, view: View) -> Tensor:
        """H-KL of each chunk, [C] nats."""
        at: Index = self.indexed(view)
        logp_CV = chunk_means(view, at.chunk_J, at.position_J) if self.mean else rows_at(view.logp_PV, view.first_C)
        columns, options = view.columns, self.options
        return h_kl(
            logp_CV,
            Entries.of_view(view, "hkl_common"),
            columns["hkl_other_count"],
            columns["hkl_other_logprob"],
            self.outside_O,
            kl=options.kl,
            common_weight=options.common_weight,
            uld_weight=options.uld_weight,
            uncommon_topk=options.uncommon_topk,
            at=at.at,
        )


def _best_pairs(
    common: Entries, chunk_K: Tensor, other_C: Tensor, other_logp_J: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``sure_C``, ``best_K`` and ``of_K`` of ``Index``."""
    low_C = common.logp_K.new_full((len(other_C),), -torch.inf)
    best_C = low_C.scatter_reduce(0, chunk_K, common.logp_K, "amax")
    known_C = other_C > 0
    low_C[known_C] = other_logp_J[(other_C.cumsum(0) - other_C).long()[known_C]]
    sure = best_C > low_C
    best = sure[chunk_K] & (common.logp_K == best_C[chunk_K])
    return torch.nonzero(sure)[:, 0], common.id_K[best].long(), (sure.cumsum(0) - 1)[chunk_K[best]]


def chunk_means(view: View, chunk_J: Tensor, position_J: Tensor) -> Tensor:
    """[C, V] mean of the log-probabilities over each chunk's positions, which are ``ranges`` of the chunks."""
    if len(view.first_C) == len(view.logp_PV):
        return view.logp_PV
    # a sum over a chunk's positions, added in the order of positions: the geometric mean is the mean of logarithms
    sum_CV = view.logp_PV.new_zeros(len(view.first_C), view.logp_PV.shape[1])
    sum_CV = sum_CV.index_add(0, chunk_J, rows_at(view.logp_PV, position_J))
    return sum_CV / view.length_C[:, None]


class _CommonAndSorted(torch.autograd.Function):
    """Log-probabilities at ``place_K`` of [C, V], and the sorted L1 [C] of columns O to the teacher's list, cut alike.

    With n teacher values only the student's n largest need an order: every other rank adds its probability. One buffer
    [C, O] holds what each cell adds, then its slope; the gradient is the other buffer. A second backward pass raises.
    """

    @staticmethod
    def forward(
        ctx: Any, logp_CV: Tensor, place_K: Tensor, teacher_CR: Tensor, outside_O: Tensor, ranks: int
    ) -> tuple[Tensor, Tensor]:
        # what each cell adds to the L1: at first p, as if it met a zero of the teacher's list
        adds_CO = logp_CV.index_select(1, outside_O).exp_()
        head = min(teacher_CR.shape[1], ranks)
        if ranks < len(outside_O):  # probabilities beyond the ranks compared are cut: they add nothing
            p_CR, rank_CR = adds_CO.topk(ranks, dim=1, sorted=False)
            adds_CO.zero_().scatter_(1, rank_CR, p_CR)
            p_CR, order_CR = p_CR.topk(head, dim=1)
            rank_CR = rank_CR.gather(1, order_CR)
        else:
            p_CR, rank_CR = adds_CO.topk(head, dim=1)
        # the student's largest meet the teacher's list rank by rank; what is left of the longer list meets zeros
        gap_CR = p_CR - teacher_CR[:, :head]
        adds_CO.scatter_(1, rank_CR, gap_CR.abs())
        l1_C = adds_CO.sum(1) + teacher_CR[:, head:].sum(1)
        # d |p - t| / d log p = p sign(p - t), and p where t is 0: the same buffer, now the slope
        adds_CO.scatter_(1, rank_CR, p_CR * gap_CR.sign())
        ctx.save_for_backward(adds_CO, place_K, outside_O)
        ctx.width = logp_CV.shape[1]
        return logp_CV.view(-1).index_select(0, place_K), l1_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor, grad_C: Tensor) -> tuple[Tensor, None, None, None, None]:
        slope_CO, place_K, outside_O = ctx.saved_tensors
        grad_CV = slope_CO.new_zeros(len(slope_CO), ctx.width)
        grad_CV.index_copy_(1, outside_O, slope_CO.mul_(grad_C[:, None]))
        grad_CV.view(-1).index_add_(0, place_K, grad_K)
        return grad_CV, None, None, None, None


def open_loss(setup: LossSetup) -> HKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return HKL(setup)
