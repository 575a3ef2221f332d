"""ULD (arXiv 2402.12030): sorted L1 over the whole vocabularies, the shorter one padded with zeros.

    sum_r |sort(p_S * f_S)_r - sort(p_T * f_T)_r|        f: the chunk's other realised tokens, see chain_rule.py

Shapes: P positions, C chunks, V student vocabulary, R ranks compared, K entries summed over chunks.
"""

from typing import ClassVar

from torch import Tensor

from xtoken.trainer.losses.base import Loss, LossSetup, View
from xtoken.trainer.losses.chain_rule import chain_merge, chunk_row, gather, realised_places
from xtoken.trainer.losses.sorted_l1 import padded, sorted_l1
from xtoken.trainer.ragged import Columns


class ULD(Loss):
    """ULD against the columns ``uld_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("uld")

    def __init__(self, setup: LossSetup) -> None:
        self.merge, self.temperature = chain_merge(setup, "uld"), setup.tau

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        logp_PV, columns = view.logp_PV, view.columns
        row_C = chunk_row(view, self.merge)
        teacher_CR = padded(columns["uld_count"], columns["uld_logprob"].to(logp_PV.dtype).exp())
        teacher_CR = teacher_CR * columns["factor_logprob"].to(logp_PV.dtype).exp()[:, None]
        ranks = min(teacher_CR.shape[1], logp_PV.shape[1])
        top_CR = logp_PV.detach().topk(ranks).indices[row_C]
        place_E, chunk_E = realised_places(view, row_C)
        top, realised_E = gather(logp_PV, (row_C[:, None] * logp_PV.shape[1] + top_CR).reshape(-1), place_E)
        factor_C = logp_PV.new_zeros(len(row_C)).index_add(0, chunk_E, realised_E).exp()
        student_CR = top.view_as(top_CR).exp() * factor_C[:, None]
        # The row sums to 1, so what is not among the top ranks needs no sum over the vocabulary.
        return sorted_l1(student_CR, teacher_CR, factor_C)


def open_loss(setup: LossSetup) -> ULD:
    """See ``xtoken.trainer.losses.open_loss``."""
    return ULD(setup)
