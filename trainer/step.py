"""One optimizer step: the gradient of its objective over all micro-batches and ranks.

All sums are divided by the predicted tokens and valid chunks of the whole step, on all ranks, so the objective does
not depend on how a step is split into micro-batches, nor on how many ranks share it.

Shapes: D teachers, T = 1 + D terms: CE, then the teachers.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective
from xtoken.trainer.pieces import cut
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.score import Sums, gradient_sizes, score, sums_of


@dataclass(frozen=True)
class Figures:
    """One step of all ranks, in nats.

    Attributes:
        loss: the objective.
        kd: sum over teachers of the weighted mean per valid chunk; None without a distillation loss.
        ce: mean per predicted token.
        teachers: per teacher, the mean per valid chunk without weights.
        agreement: share of the first teacher's chunks on whose first token both sides agree; None if not asked.
        weights: of the T terms in the objective.
        norms: of the gradients of the T terms (see ``xtoken.trainer.mixing``); None if not measured.
    """

    loss: float
    kd: float | None
    ce: float
    teachers: tuple[float, ...] = ()
    agreement: float | None = None
    weights: tuple[float, ...] = ()
    norms: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StepCounts:
    """Denominators and counts of a step over all ranks.

    Attributes:
        totals: of each teacher, what its term is divided by: its chunks, or the sum of their weights by kind.
    """

    predicted: int
    chunks: tuple[int, ...]
    held: tuple[int, ...]
    tokens: int
    inputs: int
    padded: int
    cut: int
    untaught: int
    totals: tuple[float, ...]

    @property
    def total_T(self) -> list[float]:
        """Denominators of the T terms; 1 for one that has nothing in the step, whose sum is 0."""
        return [total or 1.0 for total in (float(self.predicted), *self.totals)]


def count_step(batch: StepBatch, ranks: Ranks) -> StepCounts:
    """Add up what the ranks hold of a step."""
    teachers = len(batch.chunks)
    sizes = [batch.predicted, batch.tokens, batch.inputs, batch.padded, batch.cut, batch.untaught]
    plain = [*sizes, *batch.chunks, *batch.held]
    sums = ranks.sum([*plain, *batch.totals])
    predicted, tokens, inputs, padded, cut, untaught, *each = (int(value) for value in sums[: len(plain)])
    chunks, held, totals = tuple(each[:teachers]), tuple(each[teachers:]), tuple(sums[len(plain) :])
    return StepCounts(predicted, chunks, held, tokens, inputs, padded, cut, untaught, totals)


def run_step(
    objective: Any,
    batch: StepBatch,
    counts: StepCounts,
    mixing: Mixing,
    ranks: Ranks,
    *,
    seed: str = "",
    step: int = 0,
    agree: bool = False,
) -> Figures:
    """Gradient of one optimizer step, left in the parameters' ``grad``; every rank returns the same figures.

    ``dynamic`` needs KD and CE of the whole step before any gradient, and ``gradmag`` norms before the first: such a
    step pays one more forward pass. Norms measured in a later step are taken into ``mixing`` when it is done.

    Args:
        objective: an ``Objective``, or DDP or FSDP around one.
        seed: of dropout in this step; a micro-batch's numbers depend on it and on its first sample alone.
        step: its number, from 1; ``gradmag`` alone asks.
        agree: look for the agreement.
    """
    losses = _own(objective).losses
    turns = _Turns(objective, batch, ranks, int(ranks.max(len(batch.micros))), seed)
    distils = _distils(losses)
    if distils and mixing.measures(step) and step == 1:
        mixing.observe(_norms(turns.look(gradient_sizes, mixing.user_T), counts))
    weight_T = _weights(turns, counts, mixing, losses)
    factor_T = [weight / total for weight, total in zip(weight_T, counts.total_T, strict=True)]
    norms = distils and mixing.measures(step) and step > 1
    # added where they are made: a GPU is asked for them once, when the whole step is on its way
    sums = torch.zeros(Sums.size(len(losses)), dtype=torch.float64, device=ranks.device)
    for at, (micro, counted) in enumerate(turns):
        ranks.synchronise(objective, at == turns.count - 1)
        # DDP and FSDP average over ranks; the factors already divide by the step of all of them.
        value, found = objective(score, micro, [factor * ranks.size * counted for factor in factor_T], agree, norms)
        value.backward()
        sums += found * counted
    return _figures(Sums.of(ranks.sum(sums.tolist()), len(losses)), counts, losses, weight_T)


@dataclass(frozen=True)
class _Turns:
    """The micro-batches of a step; where another rank has more of them, the first again, counted 0."""

    objective: Any
    batch: StepBatch
    ranks: Ranks
    count: int
    seed: str

    def __iter__(self) -> Iterator[tuple[Micro, int]]:
        for at, micro in enumerate(self._cut_ahead() if cuts_ahead(self.ranks.device) else self._whole()):
            seed_all(self.seed, micro)
            yield micro, int(at < len(self.batch.micros))

    def _whole(self) -> Iterator[Micro]:
        """Not cut: the pass does so itself."""
        micros = self.batch.micros
        return (micros[at if at < len(micros) else 0] for at in range(self.count))

    def _cut_ahead(self) -> Iterator[Micro]:
        """Each cut beside the pass before it: one in advance is enough, and those of a whole step would fill memory."""
        with ThreadPoolExecutor(1, thread_name_prefix="cutter") as pool:
            begun: deque[Future[Micro]] = deque()
            for micro in self._whole():
                begun.append(pool.submit(self._cut, micro))
                if len(begun) > 1:
                    yield begun.popleft().result()
            yield begun.popleft().result()

    def _cut(self, micro: Micro) -> Micro:
        objective = _own(self.objective)
        student = objective.student
        return replace(micro, pieces=cut(micro, student.vocabulary, objective.losses, student.device))

    def look(self, work: Callable[..., Tensor], factor_T: Sequence[float]) -> Sums:
        """``Sums`` of all ranks; ``work`` makes those of a micro-batch under ``no_grad``."""
        losses = _own(self.objective).losses
        sums = torch.zeros(Sums.size(len(losses)), dtype=torch.float64, device=self.ranks.device)
        with torch.no_grad():
            for micro, counted in self:
                sums += self.objective(work, micro, factor_T) * counted
        return Sums.of(self.ranks.sum(sums.tolist()), len(losses))


def cuts_ahead(device: torch.device) -> bool:
    """Whether micro-batches are cut beside the passes: not on a CPU, whose cores a second thread would take."""
    return device.type != "cpu"


def seed_all(seed: str, micro: Micro) -> None:
    """Dropout depends on the step and the samples, not on what ran before or on which rank."""
    digest = hashlib.blake2b(f"{seed}/{micro.sample_ids[0]}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


def _own(objective: Any) -> Objective:
    """What DDP or FSDP is around."""
    own: Objective = getattr(objective, "module", objective)
    return own


def _distils(losses: Sequence[Loss]) -> bool:
    return any(loss.columns.names for loss in losses)


def _weights(turns: _Turns, counts: StepCounts, mixing: Mixing, losses: Sequence[Loss]) -> list[float]:
    """Of the T terms."""
    if not _distils(losses):
        return [1.0] + [0.0] * len(losses)
    if mixing.mode == "gradmag":
        return mixing.by_norms()
    kd = ce = 0.0
    if mixing.mode == "dynamic":
        figures = _figures(turns.look(sums_of, [0.0] * (1 + len(losses))), counts, losses, [1.0] * (1 + len(losses)))
        kd, ce = figures.kd or 0.0, figures.ce
    kd_weight, ce_weight = mixing.weights(kd, ce)
    return [ce_weight] + [kd_weight] * len(losses)


def _norms(sums: Sums, counts: StepCounts) -> list[float]:
    """Of the terms' gradients, [T]; each term divided by its denominator."""
    return [math.sqrt(square) / total for square, total in zip(sums.squares, counts.total_T, strict=True)]


def _figures(sums: Sums, counts: StepCounts, losses: Sequence[Loss], weight_T: Sequence[float]) -> Figures:
    ce_total, *totals = counts.total_T
    ce = sums.ce / ce_total
    kd_D, plain_D = (
        [value / total for value, total in zip(values, totals, strict=True)] for values in (sums.weighted, sums.plain)
    )
    total = sum(weight * term for weight, term in zip(weight_T, (ce, *kd_D), strict=True))
    if not _distils(losses):
        return Figures(total, None, ce)
    return Figures(
        loss=total,
        kd=sum(kd_D),
        ce=ce,
        teachers=tuple(plain_D),
        agreement=sums.agreed / sums.compared if sums.compared else None,
        weights=tuple(weight_T),
        norms=tuple(_norms(sums, counts)) if any(sums.squares) else None,
    )
