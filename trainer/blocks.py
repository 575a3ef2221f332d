"""Positions of a forward pass in blocks: what a loss sees of them, whole chunks together.

Logits, log-probabilities and everything that losses build from them exist for one block at a time. A block holds
whole chunks, so one grows beyond its size only for a chunk that is longer.

Shapes: P predicting positions, C chunks, H width of the hidden states, V ids of the tokenizer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.trainer.data.micro_batch import Lesson, Micro
from xtoken.trainer.losses.base import FeatureLoss, Loss, View

# Logits held at once in float32: 64 MB, or 128 MB on a GPU. The gradient of the head is as large as the head and is
# added to once per block, so small blocks cost time; see benchmarks/step.py.
BLOCK_ELEMENTS = 1 << 24
GPU_BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Block:
    """Positions ``low`` to ``high`` of a micro-batch; ``rows`` are their logits [high - low, V], at least float32."""

    low: int
    high: int
    rows: Tensor
    _logp: dict[float, Tensor] = field(default_factory=dict)

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-softmax of the logits over the temperature."""
        if temperature not in self._logp:
            scaled = self.rows if temperature == 1 else self.rows / temperature
            self._logp[temperature] = torch.log_softmax(scaled, dim=-1)
        return self._logp[temperature]


def spans(micro: Micro, vocabulary: int, losses: Sequence[Loss], on_gpu: bool) -> Iterator[tuple[int, int]]:
    """First position and one past the last of each block; chunks of ``losses`` are not torn."""
    size = max(1, (GPU_BLOCK_ELEMENTS if on_gpu else BLOCK_ELEMENTS) // vocabulary)
    whole = [lesson for lesson, loss in zip(micro.lessons, losses, strict=False) if not collects(loss)]
    low = 0
    while low < len(micro.place_P):
        high = _whole_chunks(whole, low, min(low + size, len(micro.place_P)))
        yield low, high
        low = high


def collects(loss: Loss) -> bool:
    """Whether a loss takes its chunks from all positions of a micro-batch together."""
    return isinstance(loss, FeatureLoss) and not loss.local


def _whole_chunks(lessons: Sequence[Lesson], low: int, high: int) -> int:
    """The nearest position to ``high``, before it if possible, at which no teacher's chunk is torn."""
    end = high
    while end > low and (torn := [start for lesson in lessons if (start := _torn(lesson, end)[0]) < end]):
        end = min(torn)
    if end > low:
        return end
    while torn := [stop for lesson in lessons if (stop := _torn(lesson, high)[1]) > high]:
        high = max(torn)
    return high


def _torn(lesson: Lesson, at: int) -> tuple[int, int]:
    """Start and stop of the chunk that holds the positions before and after ``at``; ``at`` twice if there is none."""
    chunk = int(np.searchsorted(lesson.first_C, at)) - 1
    if chunk < 0:
        return at, at
    first = int(lesson.first_C[chunk])
    stop = first + int(lesson.length_C[chunk])
    return (first, stop) if stop > at else (at, at)


def block_view(block: Block, micro: Micro, lesson: Lesson, loss: Loss) -> View:
    """What ``loss`` sees of a block; its columns are checked."""
    return view(block.logp(loss.temperature), micro, lesson, loss, (block.low, block.high))


def view(logp_PV: Tensor, micro: Micro, lesson: Lesson, loss: Loss, span: tuple[int, int]) -> View:
    """What ``loss`` sees of positions; its columns are checked."""
    low, high = span
    device, (first, last) = logp_PV.device, lesson.chunks(low, high)
    arrays = lesson.slice(low, high)
    loss.check(arrays)
    next_C = lesson.next_C[first:last]
    places = (lesson.first_C[first:last] - low, lesson.length_C[first:last], np.where(next_C >= 0, next_C - low, -1))
    first_C, length_C, following_C = (tensor(place, device) for place in places)
    columns = {name: tensor(array, device) for name, array in arrays.items()}
    return View(logp_PV, tensor(micro.label_P[low:high], device), first_C, length_C, following_C, columns)


def tensor(array: Any, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    found = torch.from_numpy(np.array(array))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
