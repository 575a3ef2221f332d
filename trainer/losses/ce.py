"""Cross-entropy with the text itself: the part of every objective that needs no teacher."""

from collections.abc import Mapping

from torch import Tensor

from trainer.losses.base import Arrays, ChunkColumns, LossSetup


def cross_entropy_total(logp_PV: Tensor, label_P: Tensor) -> Tensor:
    """Sum over P positions of -log p(label), nats."""
    return -logp_PV.gather(1, label_P[:, None]).sum()


class TextOnly:
    """The loss ``ce``: no distillation term, so no columns and no chunks."""

    columns = ChunkColumns()

    def check(self, arrays: Arrays) -> None:
        """Nothing to check."""

    def total(self, logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Zero: there are no chunks."""
        assert not targets
        return logp_CV.sum() * 0.0


def open_loss(_: LossSetup) -> TextOnly:
    """See ``trainer.losses.open_loss``."""
    return TextOnly()
