"""What a distillation loss is: the student's log-probabilities of some chunks in, a sum over these chunks out.

Shapes: C chunks, V student vocabulary, U teacher vocabulary, K entries summed over chunks, N entries of W.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class ChunkColumns:
    """Which columns of the target table a loss reads.

    Attributes:
        per_chunk: columns [C] with one value per chunk.
        entries: count column [C] -> columns [K] with that many values per chunk.
    """

    per_chunk: tuple[str, ...] = ()
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All columns."""
        return (*self.per_chunk, *self.entries, *(name for names in self.entries.values() for name in names))


@dataclass(frozen=True)
class ProjectionArrays:
    """W of a target folder, entries ascending by student id (see ``schemas.tables.W``); every array is [N]."""

    student_id: NDArray[np.int32]
    teacher_id: NDArray[np.int32]
    weight: NDArray[np.float32]
    common: NDArray[np.bool_]

    def within(self, size: int) -> "ProjectionArrays":
        """Without rows of student ids from ``size`` on: specials that the model's head does not have."""
        kept = self.student_id < size
        return ProjectionArrays(self.student_id[kept], self.teacher_id[kept], self.weight[kept], self.common[kept])


@dataclass(frozen=True)
class LossSetup:
    """What losses are built from."""

    w: ProjectionArrays
    student_size: int
    teacher_size: int
    device: torch.device
    uld_weight: float = 1.0
    uncommon_topk: int = 8192


class Loss(Protocol):
    """A distillation loss. Chunks given to it are valid: at least one entry, a position that predicts them."""

    columns: ChunkColumns

    def check(self, arrays: Arrays) -> None:
        """Refuse target entries that W cannot serve, before they reach the device.

        Raises:
            VerificationError: an id is out of range or not reached by W.
        """
        ...

    def total(self, logp_CV: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Sum of the loss over C chunks, nats.

        Args:
            logp_CV: normalised log-probabilities at the positions that predict each chunk's first token, at
                least float32 (the caller divides by the valid chunks of the whole optimizer step).
            targets: the columns this loss declares, on the same device.
        """
        ...


def owners(count_C: Tensor) -> Tensor:
    """int64 [K]: for each entry the chunk it belongs to."""
    return torch.repeat_interleave(torch.arange(len(count_C), device=count_C.device), count_C.long())
