"""Forward, loss and backward of one optimizer step.

The logits of a micro-batch are scored in blocks of positions: float32 log-probabilities and everything the losses
build from them exist for one block at a time, and the gradient of the logits is written block by block before one
backward pass through the model. Peak memory is the logits and their gradient plus one block. A block holds whole
chunks, so one grows beyond its size only for a chunk that is longer.

All sums are divided by the predicted tokens and valid chunks of the whole step, so the objective does not depend on
how a step is split into micro-batches.

Shapes: B samples, L padded inputs, P predicting positions, C chunks, V ids of the tokenizer, M >= V model width,
F features, D teachers.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import StepBatch
from trainer.data.micro import Lesson, Micro
from trainer.losses.base import FeatureLoss, Loss, View
from trainer.losses.ce import cross_entropy_total

# Log-probabilities held at once: 16 MB in float32, near a CPU's cache. A GPU wants fewer, larger launches: 128 MB.
BLOCK_ELEMENTS = 1 << 22
GPU_BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Mixing:
    """How KD and CE become one objective (see ``schemas.config.TrainConfig.mix``)."""

    mode: str
    kd_weight: float
    ce_weight: float

    def weights(self, kd: float, ce: float) -> tuple[float, float]:
        """Weights of KD and CE in a step where these are their values; constants for the gradient."""
        if self.mode == "fixed":
            return self.kd_weight, self.ce_weight
        # H-KL can be negative: the ratio of magnitudes keeps the direction of its gradient.
        return (abs(ce / kd) if kd else 1.0), 1.0


@dataclass(frozen=True)
class Figures:
    """One step in nats.

    Attributes:
        loss: the objective.
        kd: sum over teachers of the weighted mean per valid chunk; None without a distillation loss.
        ce: mean per predicted token.
        teachers: per teacher, the mean per valid chunk without weights.
    """

    loss: float
    kd: float | None
    ce: float
    teachers: tuple[float, ...] = ()


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
    """Positions ``low`` to ``high`` of a micro-batch; ``rows`` are their logits [high - low, V] as a leaf."""

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


def blocks(
    logits_BLM: Tensor, micro: Micro, vocabulary: int, losses: Sequence[Loss] = (), gradient: bool = False
) -> Iterator[Block]:
    """The blocks of a micro-batch's predicting positions; chunks of ``losses`` are not torn."""
    flat = logits_BLM.detach().reshape(-1, logits_BLM.shape[-1])
    size = max(1, (GPU_BLOCK_ELEMENTS if flat.is_cuda else BLOCK_ELEMENTS) // vocabulary)
    # A loss of features takes its chunks from all positions together.
    whole = [lesson for lesson, loss in zip(micro.lessons, losses, strict=False) if not isinstance(loss, FeatureLoss)]
    low = 0
    while low < len(micro.place_P):
        high = _whole_chunks(whole, low, min(low + size, len(micro.place_P)))
        place = torch.from_numpy(micro.place_P[low:high]).to(flat.device)
        rows = flat[place][:, :vocabulary]
        yield Block(low, high, rows.to(torch.promote_types(rows.dtype, torch.float32)).requires_grad_(gradient))
        low = high


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
    return _view(block.logp(loss.temperature), micro, lesson, loss, block.low, block.high)


def _view(logp_PV: Tensor, micro: Micro, lesson: Lesson, loss: Loss, low: int, high: int) -> View:
    device, (first, last) = logp_PV.device, lesson.chunks(low, high)
    arrays = lesson.slice(low, high)
    loss.check(arrays)
    next_C = lesson.next_C[first:last]
    spans = (lesson.first_C[first:last] - low, lesson.length_C[first:last], np.where(next_C >= 0, next_C - low, -1))
    label_P = torch.from_numpy(micro.label_P[low:high]).to(device)
    first_C, length_C, following_C = (torch.from_numpy(span).to(device) for span in spans)
    columns = {name: torch.from_numpy(np.array(array)).to(device) for name, array in arrays.items()}
    return View(logp_PV, label_P, first_C, length_C, following_C, columns)


def _weigh(terms: Tensor, weight: Any, loss: Loss) -> tuple[Tensor, Tensor]:
    """Weighted and plain sum of a loss's terms, temperature squared included."""
    weights = torch.from_numpy(weight).to(terms.device, terms.dtype)
    return (terms * weights).sum() * loss.temperature**2, terms.sum() * loss.temperature**2


def _block_terms(block: Block, micro: Micro, lesson: Lesson, loss: Loss) -> tuple[Tensor, Tensor] | None:
    first, last = lesson.chunks(block.low, block.high)
    if loss.per == "chunk":
        if first == last:
            return None
        weight = lesson.weight_B[lesson.sample_C[first:last]]
    else:
        weight = lesson.weight_B[micro.sample_P[block.low : block.high]]
    return _weigh(loss.terms(block_view(block, micro, lesson, loss)), weight, loss)


@dataclass(frozen=True)
class _Features:
    """The features of a whole micro-batch: the loss's sums and, per position, the gradient of the weighted one."""

    weighted: float
    plain: float
    grad_PF: Tensor


def _collect(student: Student, logits: Tensor, micro: Micro, losses: Sequence[Loss]) -> dict[int, _Features]:
    """First pass over the blocks for losses of features, without gradient through the logits."""
    wanted = {i: loss for i, loss in enumerate(losses) if isinstance(loss, FeatureLoss) and len(_first(micro, i))}
    if not wanted:
        return {}
    pieces: dict[int, list[Tensor]] = {i: [] for i in wanted}
    with torch.no_grad():
        for block in blocks(logits, micro, student.vocabulary, losses):
            label_P = torch.from_numpy(micro.label_P[block.low : block.high]).to(logits.device)
            for i, loss in wanted.items():
                pieces[i].append(loss.features(block.logp(loss.temperature), label_P))
    found = {}
    for i, loss in wanted.items():
        lesson, leaf = micro.lessons[i], torch.cat(pieces[i]).requires_grad_()
        with torch.enable_grad():
            view = _view(leaf.new_zeros(0, 0), micro, lesson, loss, 0, len(micro.place_P))
            weighted, plain = _weigh(loss.terms_of(leaf, view), lesson.weight_B[lesson.sample_C], loss)
            (grad_PF,) = torch.autograd.grad(weighted, leaf)
        found[i] = _Features(float(weighted.detach()), float(plain.detach()), grad_PF)
    return found


def _first(micro: Micro, teacher: int) -> Any:
    return micro.lessons[teacher].first_C


def measure(student: Student, micro: Micro, losses: Sequence[Loss]) -> Tensor:
    """float64 [1 + 2 D], without gradient: the sum of CE, the weighted sums of KD, the plain sums of KD."""
    with torch.no_grad():
        logits = student.logits(micro)
        collected = _collect(student, logits, micro, losses)
        sums = _collected_sums(collected, len(losses))
        for block in blocks(logits, micro, student.vocabulary, losses):
            sums += _score(block, micro, losses, collected)[0].cpu()
    return sums


def _collected_sums(collected: dict[int, _Features], teachers: int) -> Tensor:
    sums = torch.zeros(1 + 2 * teachers, dtype=torch.float64)
    for i, features in collected.items():
        sums[1 + i], sums[1 + teachers + i] = features.weighted, features.plain
    return sums


def _score(
    block: Block, micro: Micro, losses: Sequence[Loss], collected: dict[int, _Features]
) -> tuple[Tensor, list[Tensor | None]]:
    """Sums of a block as in ``measure`` and, per teacher, what its weighted term's gradient is taken of."""
    label_P = torch.from_numpy(micro.label_P[block.low : block.high]).to(block.rows.device)
    ce = cross_entropy_total(block.logp(), label_P)
    sums = torch.zeros(1 + 2 * len(losses), dtype=torch.float64, device=block.rows.device)
    sums[0] = ce.detach()
    terms: list[Tensor | None] = [ce]
    for i, (lesson, loss) in enumerate(zip(micro.lessons, losses, strict=True)):
        if isinstance(loss, FeatureLoss):
            terms.append(_linearised(block, loss, label_P, collected[i]) if i in collected else None)
        elif (found := _block_terms(block, micro, lesson, loss)) is not None:
            sums[1 + i], sums[1 + len(losses) + i] = found[0].detach(), found[1].detach()
            terms.append(found[0])
        else:
            terms.append(None)
    return sums, terms


def _linearised(block: Block, loss: FeatureLoss, label_P: Tensor, collected: _Features) -> Tensor:
    """A sum whose gradient is that of the loss: its features times the gradient taken by them."""
    features = loss.features(block.logp(loss.temperature), label_P)
    return (features * collected.grad_PF[block.low : block.high]).sum()


def backward(student: Student, micro: Micro, losses: Sequence[Loss], factors: Sequence[float]) -> Tensor:
    """Add the gradient of sum_i factors_i * term_i to the model (CE first, then teachers); sums as ``measure``."""
    logits_BLM = student.logits(micro)
    grad_BLM = torch.zeros_like(logits_BLM)
    sums = write_gradient(student, logits_BLM, grad_BLM, micro, losses, factors)
    logits_BLM.backward(grad_BLM)  # type: ignore[no-untyped-call]
    return sums


def write_gradient(
    student: Student,
    logits_BLM: Tensor,
    grad_BLM: Tensor,
    micro: Micro,
    losses: Sequence[Loss],
    factors: Sequence[float],
) -> Tensor:
    """Write the gradient by the logits into ``grad_BLM``, block by block; see ``backward``."""
    flat = grad_BLM.view(-1, grad_BLM.shape[-1])
    collected = _collect(student, logits_BLM, micro, losses)
    sums = _collected_sums(collected, len(losses))
    for block in blocks(logits_BLM, micro, student.vocabulary, losses, gradient=True):
        found, terms = _score(block, micro, losses, collected)
        weighted = [factor * term for factor, term in zip(factors, terms, strict=True) if term is not None and factor]
        sums += found.cpu()
        if not weighted:
            continue
        torch.autograd.backward(torch.stack(weighted).sum())
        place = torch.from_numpy(micro.place_P[block.low : block.high]).to(flat.device)
        assert block.rows.grad is not None
        flat[place, : block.rows.shape[1]] = block.rows.grad.to(flat.dtype)
    return sums


def run_step(student: Student, batch: StepBatch, losses: Sequence[Loss], mixing: Mixing) -> Figures:
    """Gradient of one optimizer step, left in the parameters' ``grad``.

    Dynamic mixing needs KD and CE of the whole step before any gradient: it pays one more forward pass.
    """
    kd_weight, ce_weight = _weights(student, batch, losses, mixing)
    factors = [ce_weight / max(1, batch.predicted), *(kd_weight / max(1, chunks) for chunks in batch.chunks)]
    sums = torch.zeros(1 + 2 * len(losses), dtype=torch.float64)
    for micro in batch.micros:
        sums += backward(student, micro, losses, factors)
    return _figures(sums, batch, losses, kd_weight, ce_weight)


def _distils(losses: Sequence[Loss]) -> bool:
    return any(loss.columns.names for loss in losses)


def _weights(student: Student, batch: StepBatch, losses: Sequence[Loss], mixing: Mixing) -> tuple[float, float]:
    if not _distils(losses):
        return 0.0, 1.0
    if mixing.mode == "fixed":
        return mixing.weights(0.0, 0.0)
    sums = torch.stack([measure(student, micro, losses) for micro in batch.micros]).sum(0)
    figures = _figures(sums, batch, losses, 1.0, 1.0)
    return mixing.weights(figures.kd or 0.0, figures.ce)


def _figures(sums: Tensor, batch: StepBatch, losses: Sequence[Loss], kd_weight: float, ce_weight: float) -> Figures:
    ce, *terms = sums.tolist()
    ce /= max(1, batch.predicted)
    means = [value / max(1, chunks) for value, chunks in zip(terms, batch.chunks * 2, strict=True)]
    kd = sum(means[: len(losses)])
    teachers = tuple(means[len(losses) :]) if _distils(losses) else ()
    return Figures(kd_weight * kd + ce_weight * ce, kd if _distils(losses) else None, ce, teachers)
