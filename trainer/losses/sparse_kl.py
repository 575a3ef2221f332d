"""``sparse-kl``: KL per position to a teacher that shares the student's tokenizer, so that nothing is projected.

    KL(p_T || p_S) over the kept ids and REST, or its reverse; see ``xtoken.trainer.losses.divergence``

Stored per chunk, which is one token here: the kept ids, their log-probabilities and REST. It is P-KL (X-Token,
arXiv 2605.21699) with W the identity.

Shapes: C chunks, V vocabulary, K kept entries summed over chunks.
"""

import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Loss, LossSetup, View, owners
from xtoken.trainer.losses.divergence import NOTHING, kept_and_rest, kl_with_tail
from xtoken.trainer.ragged import Arrays, Columns


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

    def terms(self, view: View) -> Tensor:
        """KL of each chunk at its first position, [C] nats."""
        chunk_K = owners(view.columns["skl_count"])
        place_K = view.first_C[chunk_K] * view.logp_PV.shape[1] + view.columns["skl_ids"].long()
        if self.drop:
            logq_K, rest_logq_C = view.logp_PV.reshape(-1).index_select(0, place_K), None
        else:
            outside_K = torch.full_like(place_K, NOTHING, dtype=view.logp_PV.dtype)
            logq_K, rest_P = kept_and_rest(view.logp_PV, place_K, place_K, outside_K)
            rest_logq_C = rest_P[view.first_C]
        logp_K, rest_logp_C = view.columns["skl_logprob"], view.columns["skl_rest_logprob"]
        return kl_with_tail(logp_K, logq_K, chunk_K, rest_logp_C, rest_logq_C, self.kl)


def open_loss(setup: LossSetup) -> SparseKL:
    """See ``xtoken.trainer.losses.open_loss``."""
    return SparseKL(setup)
