"""Cross-entropy with the text itself: the part of every objective that needs no teacher."""

from torch import Tensor

from xtoken.trainer.losses.base import Loss, LossSetup, View
from xtoken.trainer.losses.log_softmax import labels
from xtoken.trainer.ragged import Columns


def cross_entropy(logp_PV: Tensor, label_P: Tensor) -> Tensor:
    """Sum over P positions of -log p(label), nats; ``reference.cross_entropy`` is its formula.

    Args:
        logp_PV: the student's normalised log-probabilities.
        label_P: int64, the token that each position predicts in the text.
    """
    return -labels(logp_PV, label_P).sum()


class TextOnly(Loss):
    """The loss ``ce``: no distillation term, so no columns and no chunks."""

    columns = Columns()

    def terms(self, view: View) -> Tensor:
        """None: there are no chunks."""
        return view.logp_PV.new_zeros(0)


def open_loss(_: LossSetup) -> TextOnly:
    """See ``xtoken.trainer.losses.open_loss``."""
    return TextOnly()
