"""``sparse-kl``: KL per position to a teacher that shares the student's tokenizer, so that nothing is projected.

    KL(p_T || p_S) over the kept ids and the tail, or its reverse; see ``xtoken.trainer.losses.divergence``

Stored per chunk, which is one token here: the kept ids, their log-probabilities and the tail mass. It is P-KL
(X-Token, arXiv 2605.21699) with W the identity.

Shapes: P positions, C chunks, V vocabulary, K kept entries summed over chunks.
"""

import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, Places, View
from xtoken.trainer.losses.divergence import NOTHING, kept_and_tail, kl_with_tail
from xtoken.trainer.losses.log_softmax import picked
from xtoken.trainer.ragged import Arrays, Columns


def sparse_kl(
    logp_PV: Tensor,
    kept: Entries,
    tail_logp_C: Tensor,
    first_C: Tensor | None = None,
    *,
    kl: str = "forward",
    drop: bool = False,
    at: Places | None = None,
) -> Tensor:
    """KL(p_T || p_S) of each chunk, [C] nats; ``reference.sparse_kl`` is its formula.

    Args:
        logp_PV: the student's normalised log-probabilities.
        kept: the teacher's entries, at least one per chunk, ids of the shared vocabulary.
        tail_logp_C: log of the teacher's mass that is not kept; -inf = none; with ``drop`` it is not read.
        first_C: the position of each chunk; every position is a chunk when left out.
        kl: ``forward``, or ``reverse`` for KL(p_S || p_T).
        drop: renormalise both sides over the kept ids, instead of a cell for the tail.
        at: the places of ``kept``, if they are known.
    """
    chunk_K, place_K = at or Places.of(kept.count_C, kept.id_K, logp_PV.shape[1], first_C)
    if drop:
        logq_K, tail_logq_C = picked(logp_PV, place_K), None
    else:
        # a kept id lies inside the kept set as a whole, unlike under P-KL, where W may lead a part of it elsewhere
        outside_K = torch.full_like(place_K, NOTHING, dtype=logp_PV.dtype)
        logq_K, tail_P = kept_and_tail(logp_PV, place_K, place_K, outside_K)
        tail_logq_C = tail_P if first_C is None else tail_P[first_C]
    return kl_with_tail(kept.logp_K, logq_K, chunk_K, tail_logp_C, tail_logq_C, kl)


class SparseKL(Loss):
    """Sparse KL against the columns ``skl_*`` of the target table."""

    columns = Columns.of("sparse-kl")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.kl, self.drop = setup.tau, setup.options.kl, setup.options.rest == "drop"
        self.size = setup.student_size

    def check(self, arrays: Arrays) -> None:
        """Every kept id must be one of the student's."""
        ids = arrays["skl_ids"]
        outside = (ids < 0) | (ids >= self.size)
        if outside.any():
            raise VerificationError(
                f"id {int(ids[outside][0])} in skl_ids is none of the student's {self.size}; write the targets again"
            )

    def agrees(self, view: View) -> Tensor:
        """The student's most probable token is the teacher's; the first of a chunk's entries is its most probable."""
        count_C = view.columns["skl_count"]
        first_C = view.columns["skl_ids"][count_C.cumsum(0) - count_C]
        return view.logp_PV.detach().argmax(dim=1)[view.first_C] == first_C

    def index(self, view: View) -> Places:
        """See ``Loss.index``."""
        return Places.of_view(view, "skl", view.first_C)

    def terms(self, view: View) -> Tensor:
        """KL of each chunk at its first position, [C] nats."""
        kept, tail_logp_C, at = Entries.of_view(view, "skl"), view.columns["skl_rest_logprob"], self.indexed(view)
        return sparse_kl(view.logp_PV, kept, tail_logp_C, view.first_C, kl=self.kl, drop=self.drop, at=at)


def open_loss(setup: LossSetup) -> SparseKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return SparseKL(setup)
