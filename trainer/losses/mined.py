"""MinED, a baseline: KL through a W of least edit distance where one token is one token, the label elsewhere.

    chunks with entries     P-KL at the chunk's position, forward, the tail mass as one cell (``pkl``), W of rule mined
    all others              sum over the chunk's student tokens of -log p_S(label): a one-hot target at each

ALM (arXiv 2503.20083) compares itself with MinED, which is FuseLLM's (arXiv 2401.10491): it aligns the two sequences by
dynamic programming and the vocabularies by least edit distance, and builds a target for every student token. One that
is aligned with exactly one teacher token, and the same or its pair, gets that token's distribution through the map of
the vocabularies; every other one, whether it has several teacher tokens or shares one, gets a one-hot target: its own
label. So the one-hot targets stand at every student token of such a chunk, not at its first alone, and a chunk's term
is their sum: each student token weighs the same, as in MinED, up to the one factor of tokens per chunk. They are
forward only, since KL(p_S || one-hot) is infinite.

What differs: sequences are aligned in bytes, where nothing has to be guessed, and what the map does not reach, or the
capture did not keep, is not renormalised away. At a temperature tau a one-hot target stays one-hot, and the student is
taken at tau.

Shapes: P positions, C chunks, V student vocabulary, K kept entries summed over chunks, E positions of chunks.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.trainer.losses.base import Entries, Loss, LossSetup, View
from xtoken.trainer.losses.divergence import ranges
from xtoken.trainer.losses.log_softmax import picked
from xtoken.trainer.losses.pkl import Walk, WByColumn, heaviest, p_kl, refuse_unreached, w_by_column
from xtoken.trainer.packed import moved
from xtoken.trainer.ragged import Arrays, Columns


class Split(NamedTuple):
    """Chunks with entries and all others, and what either reads of the log-probabilities [P, V]; all int64.

    Attributes:
        with_C: the chunks with entries. best_C: the first of each one's entries, which is its most probable.
        walk: of these entries.
        other_E, place_E: the chunk of every one-hot target, and its label's place in [P, V].
    """

    with_C: Tensor
    best_C: Tensor
    walk: Walk
    other_E: Tensor
    place_E: Tensor

    @classmethod
    def of(
        cls, w: WByColumn, width: int, label_P: Tensor, count_C: Tensor, id_K: Tensor, first_C: Tensor, length_C: Tensor
    ) -> "Split":
        """See ``mined``; on the CPU. ``width`` is V."""
        with_C, without_C = (torch.nonzero(some)[:, 0] for some in (count_C > 0, count_C <= 0))
        best_C = id_K[(count_C.cumsum(0) - count_C)[with_C]].long()
        walk = w.walk(count_C[with_C], id_K, width, first_C[with_C], None, drop=False)
        other_E, position_E = ranges(first_C[without_C], length_C[without_C])
        return cls(with_C, best_C, walk, without_C[other_E], position_E * width + label_P[position_E])


def mined(
    logp_PV: Tensor,
    label_P: Tensor,
    w: WByColumn,
    kept: Entries,
    tail_logp_C: Tensor,
    first_C: Tensor,
    length_C: Tensor,
    *,
    at: Split | None = None,
) -> Tensor:
    """MinED's term of each chunk, [C] nats (arXiv 2503.20083); ``reference.mined`` is its formula.

    Args:
        logp_PV: the student's normalised log-probabilities.
        label_P: int64, the token that each position predicts in the text.
        w: of least edit distance; rows sum to 1 or are empty.
        kept: the teacher's entries, ids that W reaches; a chunk without any has one-hot targets.
        tail_logp_C: log of the teacher's mass that is not kept; -inf = none.
        first_C, length_C: positions of the chunks; those with entries have one.
        at: what ``Split.of`` makes of them, on the device of ``logp_PV``, if it is known.
    """
    if at is None:
        where = moved((label_P, kept.count_C, kept.id_K, first_C, length_C), torch.device("cpu"))
        at = Split(*moved(Split.of(w, logp_PV.shape[1], *where), logp_PV.device))
    kl_C = p_kl(logp_PV, w, kept, tail_logp_C[at.with_C], first_C[at.with_C], at=at.walk)
    label_logp_E = picked(logp_PV, at.place_E)
    terms_C = logp_PV.new_zeros(len(first_C)).index_copy(0, at.with_C, kl_C)
    return terms_C.index_add(0, at.other_E, -label_logp_E)


class Mined(Loss):
    """MinED against the columns ``mined_*`` of the target table."""

    columns = Columns.of("mined")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.w = setup.tau, w_by_column(setup)
        self.heaviest_V = torch.as_tensor(heaviest(setup.w, setup.student_size), device=setup.device)

    def check(self, arrays: Arrays) -> None:
        """Every kept id must be a column of W."""
        refuse_unreached(self.w, arrays, "mined_ids")

    def valid(self, start_C: NDArray[np.int64], arrays: Arrays) -> NDArray[np.bool_]:  # noqa: ARG002 - as the base
        """All: a chunk without entries has one-hot targets."""
        return np.ones(len(start_C), np.bool_)

    def agrees(self, view: View) -> Tensor:
        """As p-kl says, of the chunks with entries."""
        at: Split = self.indexed(view)
        return self.heaviest_V[view.logp_PV.detach().argmax(dim=1)[view.first_C[at.with_C]]] == at.best_C

    def index(self, view: View) -> Split:
        """See ``Loss.index``."""
        kept = (view.columns["mined_count"], view.columns["mined_ids"])
        return Split.of(self.w, view.logp_PV.shape[1], view.label_P, *kept, view.first_C, view.length_C)

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        kept, tail_logp_C = Entries.of_view(view, "mined"), view.columns["mined_rest_logprob"]
        where = (view.first_C, view.length_C)
        return mined(view.logp_PV, view.label_P, self.w, kept, tail_logp_C, *where, at=self.indexed(view))


def open_loss(setup: LossSetup) -> Mined:
    """See ``xtoken.trainer.losses.open_loss``."""
    return Mined(setup)
