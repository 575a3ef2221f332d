"""ULD (arXiv 2402.12030): sorted L1 over the whole vocabularies, the shorter one padded with zeros.

    sum_r |sort(p_S * f_S)_r - sort(p_T * f_T)_r|        f: of the chunk's other labels, see chain_rule.py

Shapes: P positions, C chunks, V student vocabulary, R ranks compared, K entries summed over chunks.
"""

from typing import ClassVar, NamedTuple

from torch import Tensor

from xtoken.trainer.losses.base import Loss, LossSetup, View
from xtoken.trainer.losses.chain_rule import Chain, chain_merge, gather
from xtoken.trainer.losses.sorted_l1 import Lists, sorted_l1
from xtoken.trainer.ragged import Columns


class Ranked(NamedTuple):
    """Where ULD reads: the student's side, and the teacher's lists."""

    chain: Chain
    lists: Lists


def uld(
    logp_PV: Tensor,
    label_P: Tensor,
    first_C: Tensor,
    length_C: Tensor,
    count_C: Tensor,
    logp_K: Tensor,
    factor_logp_C: Tensor,
    *,
    merge: str = "first",
    at: Ranked | None = None,
) -> Tensor:
    """ULD of each chunk, [C], an L1 distance of probabilities.

    Its formula is ``reference.sorted_l1`` of what ``reference.chain_rule`` makes of both sides.

    Args:
        logp_PV: the student's normalised log-probabilities.
        label_P: int64, the token that each position predicts in the text.
        first_C, length_C: int64, the chunks: first position, and number of positions.
        count_C, logp_K: the teacher's kept log-probabilities, descending in each chunk, nats.
        factor_logp_C: the teacher's log-probability of the chunk's other labels, nats; 0 of a chunk of one token.
        merge: ``first`` or ``last``: the position whose distribution is compared.
        at: where both sides lie, if that is known.
    """
    width = logp_PV.shape[1]
    at = at or Ranked(Chain.of(label_P, first_C, length_C, merge, width), Lists.of(count_C))
    row_C, place_E, chunk_E = at.chain
    teacher_CR = at.lists.padded(logp_K.to(logp_PV.dtype).exp())
    teacher_CR = teacher_CR * factor_logp_C.to(logp_PV.dtype).exp()[:, None]
    # ranks are chosen without gradient and read with it: the order is constant around any point without ties
    top_CR = logp_PV.detach().topk(min(teacher_CR.shape[1], width)).indices[row_C]
    top, label_E = gather(logp_PV, (row_C[:, None] * width + top_CR).reshape(-1), place_E)
    factor_C = logp_PV.new_zeros(len(row_C)).index_add(0, chunk_E, label_E).exp()
    student_CR = top.view_as(top_CR).exp() * factor_C[:, None]
    # the distribution sums to 1, so what is not among the top ranks needs no sum over the vocabulary
    return sorted_l1(student_CR, teacher_CR, factor_C)


class ULD(Loss):
    """ULD against the columns ``uld_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("uld")

    def __init__(self, setup: LossSetup) -> None:
        self.merge, self.temperature = chain_merge(setup, "uld"), setup.tau

    def index(self, view: View) -> Ranked:
        """See ``Loss.index``."""
        chain = Chain.of(view.label_P, view.first_C, view.length_C, self.merge, view.logp_PV.shape[1])
        return Ranked(chain, Lists.of(view.columns["uld_count"]))

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        stored = (view.columns[name] for name in ("uld_count", "uld_logprob", "factor_logprob"))
        where = (view.label_P, view.first_C, view.length_C)
        return uld(view.logp_PV, *where, *stored, merge=self.merge, at=self.indexed(view))


def open_loss(setup: LossSetup) -> ULD:
    """See ``xtoken.trainer.losses.open_loss``."""
    return ULD(setup)
