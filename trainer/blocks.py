"""Positions of a forward pass in blocks: how many there are in one, and what a loss sees of them.

Logits, log-probabilities and everything that losses build from them exist for one block at a time. A block holds
whole chunks, so one grows beyond its size only for a chunk that is longer.

Shapes: P predicting positions, C chunks, V ids of the tokenizer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.trainer.data.micro_batch import Micro, TeacherTargets
from xtoken.trainer.losses.base import FeatureLoss, Loss, View

# Logits held at once in float32 on a CPU: 64 MB. The gradient of the head is as large as the head and is added to once
# per block, so small blocks cost time; see benchmarks/step.py.
BLOCK_ELEMENTS = 1 << 24
# On a GPU a block and all that losses make of it, some six tensors of its size, take a twelfth of the memory there is;
# not of what is free, since blocks of another size add up in another order. Its matrix kernels work in tiles of rows.
_GPU_SHARE = 12
_BYTES_PER_LOGIT = 6 * 4
_TILE = 256


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Positions of a block: 2,304 of Llama 3's 128,256 tokens on a GPU of 80 GB, 130 on a CPU."""
    if device.type != "cuda":
        return max(1, BLOCK_ELEMENTS // vocabulary)
    return gpu_rows(vocabulary, torch.cuda.get_device_properties(device).total_memory)


def gpu_rows(vocabulary: int, memory: int) -> int:
    """The same on a GPU of so many bytes: whole tiles, one at least."""
    rows = memory // (_GPU_SHARE * _BYTES_PER_LOGIT * vocabulary)
    return max(_TILE, rows // _TILE * _TILE)


def spans(micro: Micro, vocabulary: int, losses: Sequence[Loss], device: torch.device) -> Iterator[tuple[int, int]]:
    """First position and one past the last of each block; chunks of ``losses`` are not torn."""
    size = block_rows(vocabulary, device)
    # a loss that collects the features of all positions first does not mind where blocks end
    whole = [targets for targets, loss in zip(micro.targets, losses, strict=False) if not collects(loss)]
    low = 0
    while low < len(micro.place_P):
        high = _whole_chunks(whole, low, min(low + size, len(micro.place_P)))
        yield low, high
        low = high


def collects(loss: Loss) -> bool:
    """Whether a loss takes its chunks from all positions of a micro-batch together."""
    return isinstance(loss, FeatureLoss) and not loss.local


def _whole_chunks(teachers: Sequence[TeacherTargets], low: int, high: int) -> int:
    """The nearest position to ``high``, before it if possible, at which no teacher's chunk is torn."""
    # teachers' chunks overlap: moving the end out of one's chunk can tear another's, so each loop runs to a fixed point
    end = high
    while end > low and (torn := [start for one in teachers if (start := _torn(one, end)[0]) < end]):
        end = min(torn)
    if end > low:
        return end
    # one chunk, or a chain of overlapping ones, is longer than a block: the block grows to hold it
    while torn := [stop for one in teachers if (stop := _torn(one, high)[1]) > high]:
        high = max(torn)
    return high


def _torn(targets: TeacherTargets, at: int) -> tuple[int, int]:
    """Start and stop of the chunk that holds the positions before and after ``at``; ``at`` twice if there is none."""
    # the last chunk that starts before ``at``; one that starts there is whole
    chunk = int(np.searchsorted(targets.first_C, at)) - 1
    if chunk < 0:
        return at, at
    first = int(targets.first_C[chunk])
    stop = first + int(targets.length_C[chunk])
    return (first, stop) if stop > at else (at, at)


def view(logp_PV: Tensor, micro: Micro, targets: TeacherTargets, loss: Loss, span: tuple[int, int]) -> View:
    """What ``loss`` sees of positions; its columns are checked."""
    piece, device = targets.slice(*span), logp_PV.device
    # on the CPU, where a bad id is an error; on a GPU it would be an assertion of a kernel, or a silent read elsewhere
    loss.check(piece.columns)
    return View(
        logp_PV=logp_PV,
        label_P=tensor(micro.label_P[slice(*span)], device),
        first_C=tensor(piece.first_C, device),
        length_C=tensor(piece.length_C, device),
        next_C=tensor(piece.next_C, device),
        columns={name: tensor(array, device) for name, array in piece.columns.items()},
    )


def tensor(array: Any, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    copy = torch.from_numpy(np.array(array))
    # only from pinned memory does a copy to the GPU run beside what the GPU computes meanwhile
    return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy
