"""Forward, loss and backward of one optimizer step.

The logits of a micro-batch are scored in blocks of positions: float32 log-probabilities and everything the losses
build from them exist for one block at a time, and the gradient of the logits is written block by block before one
backward pass through the model. Peak memory is the logits and their gradient plus one block.

All sums are divided by the predicted tokens and valid chunks of the whole step, so the objective does not depend on
how a step is split into micro-batches.

Shapes: B samples, L padded inputs, P predicting positions, C chunks, V ids of the tokenizer, M >= V model width.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches import Micro, StepBatch
from trainer.losses.base import Loss
from trainer.losses.ce import cross_entropy_total

BLOCK_ELEMENTS = 1 << 24  # log-probabilities held at once: 64 MB in float32


@dataclass(frozen=True)
class Mixing:
    """How KD and CE become one objective (see ``schemas.config.TrainConfig.mix``)."""

    mode: str
    kd_weight: float
    ce_weight: float


@dataclass(frozen=True)
class Figures:
    """One step in nats: the objective, KD per valid chunk (None without a distillation loss), CE per token."""

    loss: float
    kd: float | None
    ce: float


@dataclass(frozen=True)
class Student:
    """The model and how it is run.

    ``vocabulary`` columns of the head count: the ids of the tokenizer. More are padding and are cut before the
    softmax; a head that lacks some (special tokens only, which no sample holds) sets a smaller number.
    """

    model: Any
    device: torch.device
    autocast: torch.dtype | None
    vocabulary: int

    def logits(self, micro: Micro) -> Tensor:
        """[B, L, M] logits."""
        inputs = torch.from_numpy(micro.input_BL).to(self.device)
        length_B = torch.from_numpy(micro.length_B).to(self.device)
        mask = torch.arange(inputs.shape[1], device=self.device)[None, :] < length_B[:, None]
        with self._precision():
            logits: Tensor = self.model(input_ids=inputs, attention_mask=mask.long(), use_cache=False).logits
        return logits

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(frozen=True)
class Block:
    """Log-probabilities of some positions of a micro-batch, with what is to be predicted there.

    Attributes:
        low, high: positions ``low`` to ``high`` of P.
        rows: the logits [high - low, V] as a leaf of their own. logp: their log-softmax.
        first, last: chunks whose position lies in the block.
    """

    low: int
    high: int
    rows: Tensor
    logp: Tensor
    first: int
    last: int


def blocks(logits_BLM: Tensor, micro: Micro, vocabulary: int, gradient: bool = False) -> Any:
    """Iterate over the blocks of a micro-batch's predicting positions."""
    flat = logits_BLM.detach().reshape(-1, logits_BLM.shape[-1])
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    for low in range(0, len(micro.place_P), size):
        high = min(low + size, len(micro.place_P))
        place = torch.from_numpy(micro.place_P[low:high]).to(flat.device)
        rows = flat[place][:, :vocabulary]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).requires_grad_(gradient)
        first, last = np.searchsorted(micro.row_C, [low, high]).tolist()
        yield Block(low, high, rows, torch.log_softmax(rows, dim=-1), first, last)


def chunk_rows(block: Block, micro: Micro) -> Tensor:
    """Log-probabilities [C, V] at the positions of the block's chunks."""
    row_C = torch.from_numpy(micro.row_C[block.first : block.last] - block.low)
    return block.logp.index_select(0, row_C.to(block.logp.device))


def chunk_targets(block: Block, micro: Micro, loss: Loss) -> dict[str, Tensor]:
    """The loss's columns for the block's chunks, checked and on the device."""
    arrays = micro.chunk_slice(block.first, block.last)
    loss.check(arrays)
    return {name: torch.from_numpy(np.array(array)).to(block.logp.device) for name, array in arrays.items()}


def _block_sums(block: Block, micro: Micro, loss: Loss) -> tuple[Tensor, Tensor]:
    label_P = torch.from_numpy(micro.label_P[block.low : block.high]).to(block.logp.device)
    ce = cross_entropy_total(block.logp, label_P)
    if block.first == block.last:
        return torch.zeros_like(ce), ce
    return loss.total(chunk_rows(block, micro), chunk_targets(block, micro, loss)), ce


def measure(student: Student, micro: Micro, loss: Loss) -> Tensor:
    """float64 [2]: sums of KD over chunks and of CE over positions, without gradient."""
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    with torch.no_grad():
        for block in blocks(student.logits(micro), micro, student.vocabulary):
            sums += torch.stack(_block_sums(block, micro, loss)).double()
    return sums


def backward(student: Student, micro: Micro, loss: Loss, kd_factor: float, ce_factor: float) -> Tensor:
    """Add the gradient of kd_factor * sum KD + ce_factor * sum CE to the model; returns the sums as ``measure``."""
    logits_BLM = student.logits(micro)
    grad_BLM = torch.zeros_like(logits_BLM)
    flat = grad_BLM.view(-1, grad_BLM.shape[-1])
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    for block in blocks(logits_BLM, micro, student.vocabulary, gradient=True):
        kd, ce = _block_sums(block, micro, loss)
        torch.autograd.backward(kd_factor * kd + ce_factor * ce)
        sums += torch.stack([kd.detach(), ce.detach()]).double()
        place = torch.from_numpy(micro.place_P[block.low : block.high]).to(flat.device)
        assert block.rows.grad is not None
        flat[place, : block.rows.shape[1]] = block.rows.grad.to(flat.dtype)
    logits_BLM.backward(grad_BLM)  # type: ignore[no-untyped-call]
    return sums


def run_step(student: Student, batch: StepBatch, loss: Loss, mixing: Mixing) -> Figures:
    """Gradient of one optimizer step, left in the parameters' ``grad``.

    Dynamic mixing needs KD and CE of the whole step before any gradient: it pays one more forward pass.
    """
    kd_weight, ce_weight = _weights(student, batch, loss, mixing)
    chunks, predicted = max(1, batch.chunks), max(1, batch.predicted)
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    for micro in batch.micros:
        sums += backward(student, micro, loss, kd_weight / chunks, ce_weight / predicted)
    return _figures(sums, batch, loss, kd_weight, ce_weight)


def _weights(student: Student, batch: StepBatch, loss: Loss, mixing: Mixing) -> tuple[float, float]:
    if not loss.columns.names:
        return 0.0, 1.0
    if mixing.mode == "fixed":
        return mixing.kd_weight, mixing.ce_weight
    sums = torch.stack([measure(student, micro, loss) for micro in batch.micros]).sum(0)
    kd, ce = float(sums[0]) / max(1, batch.chunks), float(sums[1]) / max(1, batch.predicted)
    # H-KL can be negative: the ratio of magnitudes keeps the direction of its gradient.
    return (abs(ce / kd) if kd else 1.0), 1.0


def _figures(sums: Tensor, batch: StepBatch, loss: Loss, kd_weight: float, ce_weight: float) -> Figures:
    kd, ce = float(sums[0]) / max(1, batch.chunks), float(sums[1]) / max(1, batch.predicted)
    return Figures(kd_weight * kd + ce_weight * ce, kd if loss.columns.names else None, ce)
