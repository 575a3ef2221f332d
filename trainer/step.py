"""One optimizer step: the gradient of its objective over all micro-batches and ranks.

All sums are divided by the predicted tokens and valid chunks of the whole step, on all ranks, so the objective does
not depend on how a step is split into micro-batches, nor on how many ranks share it.

Shapes: D teachers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.objective import score
from xtoken.trainer.ranks import Ranks


@dataclass(frozen=True)
class Mixing:
    """How KD and CE become one objective (see ``xtoken.schemas.configs.train.LossGroup.mix``)."""

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
    """One step of all ranks, in nats.

    Attributes:
        loss: the objective.
        kd: sum over teachers of the weighted mean per valid chunk; None without a distillation loss.
        ce: mean per predicted token.
        teachers: per teacher, the mean per valid chunk without weights.
        agreement: share of the first teacher's chunks on whose first token both sides agree; None if not asked.
    """

    loss: float
    kd: float | None
    ce: float
    teachers: tuple[float, ...] = ()
    agreement: float | None = None


@dataclass(frozen=True)
class StepCounts:
    """Denominators and counts of a step over all ranks."""

    predicted: int
    chunks: tuple[int, ...]
    held: tuple[int, ...]
    tokens: int
    padded: int
    cut: int


def count_step(batch: StepBatch, ranks: Ranks) -> StepCounts:
    """Add up what the ranks hold of a step."""
    plain = [batch.predicted, batch.tokens, batch.padded, batch.cut]
    found = [int(value) for value in ranks.sum([*plain, *batch.chunks, *batch.held])]
    predicted, tokens, padded, cut = found[: len(plain)]
    chunks, held = found[len(plain) : len(plain) + len(batch.chunks)], found[len(plain) + len(batch.chunks) :]
    return StepCounts(predicted, tuple(chunks), tuple(held), tokens, padded, cut)


def run_step(
    objective: Any,
    batch: StepBatch,
    counts: StepCounts,
    mixing: Mixing,
    ranks: Ranks,
    *,
    seed: str = "",
    agree: bool = False,
) -> Figures:
    """Gradient of one optimizer step, left in the parameters' ``grad``; every rank returns the same figures.

    Dynamic mixing needs KD and CE of the whole step before any gradient: it pays one more forward pass.

    Args:
        objective: an ``Objective``, or DDP or FSDP around one.
        seed: of dropout in this step; a micro-batch's numbers depend on it and on its first sample alone.
    """
    losses = _losses(objective)
    passes = int(ranks.max(len(batch.micros)))
    kd_weight, ce_weight = _weights(objective, batch, counts, mixing, ranks, passes, seed)
    factors = [ce_weight / max(1, counts.predicted), *(kd_weight / max(1, chunks) for chunks in counts.chunks)]
    sums = torch.zeros(3 + 2 * len(losses), dtype=torch.float64)
    for at in range(passes):
        micro, counted = _turn(batch, at)
        ranks.synchronise(objective, at == passes - 1)
        seed_all(seed, micro)
        # DDP and FSDP average over ranks; the factors already divide by the step of all of them.
        value, found = objective(score, micro, [factor * ranks.size * counted for factor in factors], agree)
        value.backward()
        sums += found.cpu() * counted
    return _figures(ranks.sum(sums.tolist()), counts, losses, kd_weight, ce_weight)


def seed_all(seed: str, micro: Micro) -> None:
    """Dropout depends on the step and the samples, not on what ran before or on which rank."""
    digest = hashlib.blake2b(f"{seed}/{micro.sample_ids[0]}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def _turn(batch: StepBatch, at: int) -> tuple[Micro, int]:
    """The micro-batch of a turn, counted 1, or where another rank has more of them the first again, counted 0."""
    return (batch.micros[at], 1) if at < len(batch.micros) else (batch.micros[0], 0)


def _losses(objective: Any) -> tuple[Loss, ...]:
    found: tuple[Loss, ...] = getattr(objective, "module", objective).losses
    return found


def _distils(losses: Sequence[Loss]) -> bool:
    return any(loss.columns.names for loss in losses)


def _weights(
    objective: Any, batch: StepBatch, counts: StepCounts, mixing: Mixing, ranks: Ranks, passes: int, seed: str
) -> tuple[float, float]:
    losses = _losses(objective)
    if not _distils(losses):
        return 0.0, 1.0
    if mixing.mode == "fixed":
        return mixing.weights(0.0, 0.0)
    sums = torch.zeros(3 + 2 * len(losses), dtype=torch.float64)
    nothing = (0.0,) * (1 + len(losses))
    with torch.no_grad():
        for at in range(passes):
            micro, counted = _turn(batch, at)
            seed_all(seed, micro)
            sums += objective(score, micro, nothing)[1].cpu() * counted
    figures = _figures(ranks.sum(sums.tolist()), counts, losses, 1.0, 1.0)
    return mixing.weights(figures.kd or 0.0, figures.ce)


def _figures(
    sums: Sequence[float], counts: StepCounts, losses: Sequence[Loss], kd_weight: float, ce_weight: float
) -> Figures:
    ce, *terms, agreed, compared = sums
    ce /= max(1, counts.predicted)
    means = [value / max(1, chunks) for value, chunks in zip(terms, counts.chunks * 2, strict=True)]
    kd = sum(means[: len(losses)])
    teachers = tuple(means[len(losses) :]) if _distils(losses) else ()
    agreement = agreed / compared if compared else None
    return Figures(kd_weight * kd + ce_weight * ce, kd if _distils(losses) else None, ce, teachers, agreement)
