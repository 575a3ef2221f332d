"""Many small tensors as few large ones: a GPU is handed each of these in one copy, and is not waited for."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

_WIDEST = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the buffer of its dtype."""

    dtype: torch.dtype
    start: int
    shape: torch.Size


class Packed:
    """A structure of tensors (see ``mapped``) on the CPU, its tensors one behind the other by dtype.

    Integers travel as int32 where all fit, and arrive as int64, which torch indexes with.

    Args:
        device: where they are wanted; for a GPU they lie in pinned memory.
    """

    def __init__(self, tree: Any, device: torch.device) -> None:
        parts: dict[torch.dtype, list[Tensor]] = {}
        filled: dict[torch.dtype, int] = {}

        def put(tensor: Tensor) -> _Slot:
            whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
            dtype = torch.int64 if whole else tensor.dtype
            slot = _Slot(dtype, filled.get(dtype, 0), tensor.shape)
            parts.setdefault(dtype, []).append(tensor.reshape(-1))
            filled[dtype] = slot.start + tensor.numel()
            return slot

        self.tree = mapped(tree, Tensor, put)
        self.buffers = {dtype: _joined(each, dtype) for dtype, each in parts.items()}
        if device.type == "cuda":  # only from pinned memory does a copy run beside what the GPU computes meanwhile
            with torch.cuda.device(device):  # a thread of its own would ask the first GPU, whichever this rank has
                self.buffers = {dtype: buffer.pin_memory() for dtype, buffer in self.buffers.items()}

    def on(self, device: torch.device) -> Any:
        """The structure with its tensors on the device, views of one buffer for each dtype."""
        buffers = {dtype: one.to(device, non_blocking=True).to(dtype) for dtype, one in self.buffers.items()}
        return mapped(self.tree, _Slot, lambda at: _part(buffers[at.dtype], at))


def mapped(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same structure of tuples, dictionaries and dataclasses with ``function`` of everything of a kind in it."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(part, kind, function) for name, part in tree.items()}
    if isinstance(tree, tuple):
        parts = [mapped(part, kind, function) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{one.name: mapped(getattr(tree, one.name), kind, function) for one in fields(tree)})
    return tree


def moved(tree: Any, device: torch.device) -> Any:
    """The same structure on a device."""
    return mapped(tree, Tensor, lambda tensor: tensor.to(device))


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    if dtype == torch.int64 and all(part.dtype != dtype or _fits(part) for part in parts):
        dtype = torch.int32
    return torch.cat(parts, out=torch.empty(sum(map(len, parts)), dtype=dtype))


def _fits(part: Tensor) -> bool:
    return not len(part) or max(-int(part.min()), int(part.max())) <= _WIDEST


def _part(buffer: Tensor, slot: _Slot) -> Tensor:
    return buffer[slot.start : slot.start + slot.shape.numel()].view(slot.shape)
