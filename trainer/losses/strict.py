"""Strict: KL on tokens of equal bytes, at chunks of one teacher token and one student token (arXiv 2610.08448).

    KL(p || q) over the ids A that the teacher kept and the student has, both renormalised to sum to 1 there;
    KL(q || p) with ``kl=reverse``

What the two sides give to other tokens does not count, so no tail mass is needed, at any temperature. The published
loss is the reverse one, on the student's own text, over the student's 16 most probable tokens. Here the text is stored,
and so is what the teacher kept: A is cut at its top k.

Shapes: P positions, C chunks, V student vocabulary, K kept entries summed over chunks.
"""

from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses.base import Entries, Loss, LossSetup, Places, View
from xtoken.trainer.losses.sparse_kl import sparse_kl
from xtoken.trainer.ragged import Arrays, Columns


def strict(
    logp_PV: Tensor,
    kept: Entries,
    first_C: Tensor | None = None,
    *,
    kl: str = "forward",
    at: Places | None = None,
) -> Tensor:
    """KL of each chunk over its entries, [C] nats (arXiv 2610.08448); ``reference.strict`` is its formula.

    Args:
        logp_PV: the student's log-probabilities; a constant added to a position changes nothing.
        kept: the teacher's entries by student id, renormalised or not; at least one per chunk, and with one it is 0.
        first_C: the position of each chunk; every position is a chunk when left out.
        kl: ``forward``, or ``reverse`` for KL(p_S || p_T).
        at: the places of ``kept``, if they are known.
    """
    no_tail_C = logp_PV.new_full((len(kept.count_C),), -float("inf"))
    return sparse_kl(logp_PV, kept, no_tail_C, first_C, kl=kl, drop=True, at=at)


class Strict(Loss):
    """Strict against the columns ``strict_*`` of the target table."""

    columns = Columns.of("strict")

    def __init__(self, setup: LossSetup) -> None:
        self.temperature, self.kl, self.size = setup.tau, setup.options.kl, setup.student_size

    def check(self, arrays: Arrays) -> None:
        """Every id must be one of the student's."""
        ids = arrays["strict_ids"]
        outside = (ids < 0) | (ids >= self.size)
        if outside.any():
            raise VerificationError(
                f"id {int(ids[outside][0])} in strict_ids is none of the student's {self.size}; write the targets again"
            )

    def index(self, view: View) -> Places:
        """See ``Loss.index``."""
        return Places.of_view(view, "strict", view.first_C)

    def terms(self, view: View) -> Tensor:
        """KL of each chunk, [C] nats."""
        kept, at = Entries.of_view(view, "strict"), self.indexed(view)
        return strict(view.logp_PV, kept, view.first_C, kl=self.kl, at=at)


def open_loss(setup: LossSetup) -> Strict:
    """See ``xtoken.trainer.losses.open_loss``."""
    return Strict(setup)
