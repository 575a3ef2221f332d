"""Byte-prefix: the teacher's row cut at byte prefixes, taught in the student's own vocabulary.

    root      at a chunk's first position   sparse KL(q || p_S), q(u) = sum of p_T(t) with phi(t) = u
    interior  inside a teacher token        the same, q given the bytes already there
    child     behind the chunk's first token a:  -sum_g M_g log sum_{u in C(r_g)} p_S(u | a)

phi(t) is the longest student token that is a prefix of t's bytes; REST holds what has none, and is one cell of the KL.
C(r) are the student tokens that start with the bytes r: a range of the vocabulary in order of bytes. The targets of
all three were built by 'xtoken align' and depend on nothing the student computes.

Shapes: P positions, V student vocabulary, T its text tokens, K entries, G teacher groups, E tokens of their ranges.
"""

from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Loss, LossSetup, View, owners
from xtoken.trainer.losses.chain_rule import chunk_positions, cut
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_rest, kl_with_tail, ranges
from xtoken.trainer.ragged import Arrays, Columns


class BytePrefix(Loss):
    """Root, interior and child terms against the columns ``prefix_*`` and ``child_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("byte-prefix")
    per: ClassVar[Literal["chunk", "token"]] = "token"

    def __init__(self, setup: LossSetup) -> None:
        self.student_size, self.temperature, self.prefix = setup.student_size, setup.tau, setup.options.prefix
        self.order_T = torch.as_tensor(setup.vocab.order.astype(np.int64), device=setup.device)

    def check(self, arrays: Arrays) -> None:
        """Ids must be student tokens, ranges must lie among the text tokens."""
        ids, low, high = arrays["prefix_ids"], arrays["child_low"], arrays["child_high"]
        outside = (ids < 0) | (ids >= self.student_size)
        if outside.any():
            raise VerificationError(
                f"student id {int(ids[outside][0])} in prefix_ids is not one of {self.student_size}; "
                "write the targets again"
            )
        wrong = (low < 0) | (high <= low) | (high > len(self.order_T))
        if wrong.any():
            raise VerificationError(
                f"range {int(low[wrong][0])} to {int(high[wrong][0])} of child_low and child_high is not one of "
                f"{len(self.order_T)} text tokens; write the targets again"
            )

    def valid(self, start_C: NDArray[np.int64], arrays: Arrays) -> NDArray[np.bool_]:
        """Chunks with a root target."""
        has_root: NDArray[np.bool_] = np.append(arrays["prefix_count"], 0)[start_C] > 0
        return has_root

    def agrees(self, view: View) -> Tensor:
        """The student's most probable token is the target's, of the chunks that have one."""
        count_P = view.columns["prefix_count"]
        first_C = view.first_C[count_P[view.first_C] > 0]
        start_P = count_P.cumsum(0) - count_P
        return view.logp_PV.detach().argmax(dim=1)[first_C] == view.columns["prefix_ids"][start_P[first_C]]

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``; positions without a target are 0."""
        columns, width = view.columns, view.logp_PV.shape[1]
        place_E, group_E = self._ranges(view)
        wanted_P = self._wanted(view)
        position_K = owners(columns["prefix_count"])
        wanted_K = wanted_P[position_K]
        position_K = position_K[wanted_K]
        place_K = position_K * width + columns["prefix_ids"].long()[wanted_K]
        nothing_K = view.logp_PV.new_full(place_K.shape, NOTHING)
        logp, rest_P = kept_and_rest(view.logp_PV, torch.cat([place_K, place_E]), place_K, nothing_K)
        logq_K, logq_E = cut(logp, place_K, place_E)
        rest_logp_P = torch.where(wanted_P, columns["prefix_rest_logprob"], -torch.inf)
        kl_P = kl_with_tail(columns["prefix_logprob"][wanted_K], logq_K, position_K, rest_logp_P, rest_P)
        return kl_P + self._child(columns["child_count"], columns["child_logprob"], logq_E, group_E)

    def _wanted(self, view: View) -> Tensor:
        """bool [P]: positions whose root or interior target is asked for, those of the view's chunks only."""
        wanted_P = torch.zeros_like(view.label_P, dtype=torch.bool)
        wanted_P[chunk_positions(view)[1]] = "interior" in self.prefix
        wanted_P[view.first_C] = "root" in self.prefix
        return wanted_P & (view.columns["prefix_count"] > 0)

    def _ranges(self, view: View) -> tuple[Tensor, Tensor]:
        """Flat places in [P, V] of all tokens of all groups' ranges, and the group of each, int64 [E]."""
        columns = view.columns
        if "child" not in self.prefix:
            nowhere = torch.zeros_like(view.label_P[:0])
            return nowhere, nowhere
        low_G, position_G = columns["child_low"].long(), owners(columns["child_count"])
        group_E, rank_E = ranges(low_G, columns["child_high"].long() - low_G)
        return position_G[group_E] * view.logp_PV.shape[1] + self.order_T[rank_E], group_E

    def _child(self, count_P: Tensor, logmass_G: Tensor, logq_E: Tensor, group_E: Tensor) -> Tensor:
        """The child term, [P]."""
        zeros_P = logq_E.new_zeros(len(count_P))
        if "child" not in self.prefix:
            return zeros_P
        reached_G = group_logsumexp(logq_E, group_E, len(logmass_G))
        return zeros_P.index_add(0, owners(count_P), -logmass_G.to(logq_E.dtype).exp() * reached_G)


def open_loss(setup: LossSetup) -> BytePrefix:
    """See ``xtoken.trainer.losses.open_loss``."""
    return BytePrefix(setup)
