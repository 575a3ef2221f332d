"""Byte-prefix: the teacher's distribution cut at byte prefixes, taught in the student's own vocabulary.

    root      at a chunk's first position   sparse KL(q || p_S), q(u) = sum of p_T(t) with phi(t) = u
    interior  inside a teacher token        the same, q given the bytes already there
    child     behind the chunk's first token a:  -sum_g M_g log sum_{u in C(r_g)} p_S(u | a)

phi(t) is the token that the student's own encoding of t's bytes begins with; the tail holds what has none, and is one
cell of the KL.
C(r) are the student tokens that start with the bytes r: a range of the vocabulary in order of bytes. The targets of
all three were built by 'xtoken align' and depend on nothing the student computes.

Shapes: P positions, V student vocabulary, T its text tokens, K entries, G teacher groups, E tokens of their ranges.
"""

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, Places, View, owners
from xtoken.trainer.losses.chain_rule import cut
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_tail, kl_with_tail, ranges
from xtoken.trainer.ragged import Arrays, Columns


class Groups(NamedTuple):
    """Teacher tokens behind a chunk's first student token, grouped by the bytes that still follow.

    Attributes:
        count_P: groups of each position.
        low_G, high_G: the student tokens that start with the group's bytes, ranks ``low`` to ``high - 1`` in order.
        logmass_G: log of the teacher's mass of the group, nats.
    """

    count_P: Tensor
    low_G: Tensor
    high_G: Tensor
    logmass_G: Tensor


class Reads(NamedTuple):
    """Where the terms' tokens lie among the student's log-probabilities [P, V].

    Attributes:
        kept: the entries of roots and interiors.
        position_G: int64, the position of each group.
        total: E, the tokens of all groups. There are many, so their places are worked out where they are read.
    """

    kept: Places
    position_G: Tensor
    total: int

    @classmethod
    def of(cls, count_P: Tensor, id_K: Tensor, width: int, groups: Groups | None) -> "Reads":
        """See ``byte_prefix``."""
        kept = Places.of(count_P, id_K, width)
        if groups is None:
            return cls(kept, kept.owner_K[:0], 0)
        position_G = owners(groups.count_P, len(groups.low_G))
        return cls(kept, position_G, int((groups.high_G.long() - groups.low_G).sum()))


class Wanted(NamedTuple):
    """What of a view's targets is asked for.

    Attributes:
        wanted_P: bool, positions whose root or interior target is. entry_K: int64, its entries among all stored ones.
        first_C: int64, the first positions of chunks with a root target. best_C: the first of its entries, which is
            its most probable.
        reads: of these entries, and of the groups.
    """

    wanted_P: Tensor
    entry_K: Tensor
    first_C: Tensor
    best_C: Tensor
    reads: Reads


def byte_prefix(
    logp_PV: Tensor,
    kept: Entries,
    tail_logp_P: Tensor,
    groups: Groups | None = None,
    order_T: Tensor | None = None,
    *,
    at: Reads | None = None,
) -> Tensor:
    """Root, interior and child terms of each position, [P] nats.

    ``reference.byte_prefix_kl`` and ``reference.byte_prefix_child`` are its formulas (see docs/losses.md).

    Args:
        logp_PV: the student's normalised log-probabilities.
        kept: the target of each position, by student id; a position without entries has no root or interior term.
        tail_logp_P: log of the mass that has no prefix in the student's vocabulary; -inf = none, or no target.
        groups: of the child term, which is left out without them; order_T: int64, the student's text tokens by bytes.
        at: where they are read, if that is known.
    """
    (position_K, place_K), position_G, total = at or Reads.of(kept.count_C, kept.id_K, logp_PV.shape[1], groups)
    place_E = group_E = position_K[:0]
    if groups is not None and order_T is not None:
        low_G = groups.low_G.long()
        group_E, rank_E = ranges(low_G, groups.high_G.long() - low_G, total)
        place_E = position_G[group_E] * logp_PV.shape[1] + order_T[rank_E]
    # one call reads all places of all terms: each call's gradient would take a buffer as large as logp_PV
    nothing_K = logp_PV.new_full(place_K.shape, NOTHING)
    logp, tail_logq_P = kept_and_tail(logp_PV, torch.cat([place_K, place_E]), place_K, nothing_K)
    logq_K, logq_E = cut(logp, place_K, place_E)
    kl_P = kl_with_tail(kept.logp_K, logq_K, position_K, tail_logp_P, tail_logq_P)
    if groups is None:
        return kl_P
    reached_G = group_logsumexp(logq_E, group_E, len(groups.logmass_G))
    child_G = -groups.logmass_G.to(logq_E.dtype).exp() * reached_G
    return kl_P + logq_E.new_zeros(len(kl_P)).index_add(0, position_G, child_G)


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
        at: Wanted = self.indexed(view)
        return view.logp_PV.detach().argmax(dim=1)[at.first_C] == at.best_C

    def index(self, view: View) -> Wanted:
        """See ``Loss.index``."""
        count_P, ids = view.columns["prefix_count"], view.columns["prefix_ids"]
        wanted_P = self._wanted(view)
        entry_K = torch.nonzero(wanted_P[owners(count_P, len(ids))])[:, 0]
        first_C = view.first_C[count_P[view.first_C] > 0]
        best_C = ids[(count_P.cumsum(0) - count_P)[first_C]]
        reads = Reads.of(count_P * wanted_P, ids[entry_K], view.logp_PV.shape[1], self._groups(view))
        return Wanted(wanted_P, entry_K, first_C, best_C, reads)

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``; positions without a target are 0."""
        at: Wanted = self.indexed(view)
        count_P, *of_entries = Entries.of_view(view, "prefix")
        kept = Entries(count_P * at.wanted_P, *(values_K[at.entry_K] for values_K in of_entries))
        tail_logp_P = torch.where(at.wanted_P, view.columns["prefix_rest_logprob"], -torch.inf)
        return byte_prefix(view.logp_PV, kept, tail_logp_P, self._groups(view), self.order_T, at=at.reads)

    def _groups(self, view: View) -> Groups | None:
        if "child" not in self.prefix:
            return None
        return Groups(*(view.columns[f"child_{name}"] for name in ("count", "low", "high", "logprob")))

    def _wanted(self, view: View) -> Tensor:
        """bool [P]: positions whose root or interior target is asked for, those of the view's chunks only."""
        wanted_P = torch.zeros_like(view.label_P, dtype=torch.bool)
        # every position of a chunk is interior first, then its own first is root
        wanted_P[ranges(view.first_C, view.length_C)[1]] = "interior" in self.prefix
        wanted_P[view.first_C] = "root" in self.prefix
        return wanted_P & (view.columns["prefix_count"] > 0)


def open_loss(setup: LossSetup) -> BytePrefix:
    """See ``xtoken.trainer.losses.open_loss``."""
    return BytePrefix(setup)
