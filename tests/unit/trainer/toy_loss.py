"""A loss as someone outside would add it: the squared distance of the sides' log-likelihoods of a chunk."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.trainer.losses.base import Loss, LossSetup, View
from xtoken.trainer.losses.divergence import ranges
from xtoken.trainer.ragged import Arrays, Columns


def squared(teacher_C: Tensor, student_C: Tensor) -> Tensor:
    """(l_T - l_S)^2 of each chunk, [C] nats squared."""
    return (teacher_C - student_C) ** 2


class Toy(Loss):
    """The distance against ``teacher_logprob``, which every target table has."""

    columns = Columns(chunk=("teacher_logprob",))

    def valid(self, start_C: NDArray[np.int64], arrays: Arrays) -> NDArray[np.bool_]:  # noqa: ARG002
        """Chunks whose likelihood the teacher knows."""
        return np.isfinite(arrays["teacher_logprob"])

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        chunk_E, position_E = ranges(view.first_C, view.length_C)
        label_E = view.logp_PV[position_E, view.label_P[position_E]]
        student_C = torch.zeros(len(view.first_C), dtype=label_E.dtype).index_add(0, chunk_E, label_E)
        return squared(view.columns["teacher_logprob"].to(label_E.dtype), student_C)


def open_loss(setup: LossSetup) -> Toy:
    """See ``xtoken.trainer.losses.open_loss``."""
    return Toy()
