"""Samples of one forward pass, and what each teacher wants learnt from it.

Shapes: B samples, L padded inputs, P predicting positions, C chunks of one teacher, K entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.samples import Sample, SampleTargets
from trainer.losses.base import Array, Columns, Loss


@dataclass(frozen=True)
class Lesson:
    """One teacher's targets for a micro-batch.

    Attributes:
        first_C, length_C, next_C: int64, as in ``View``, positions counted in P of the micro-batch; ascending.
        sample_C: int64, the sample of each chunk.
        weight_B: float64, the teacher's weight in each sample; 0 where it does not hold it.
        columns: the loss's columns, all samples in order; spec: their axes.
    """

    first_C: NDArray[np.int64]
    length_C: NDArray[np.int64]
    next_C: NDArray[np.int64]
    sample_C: NDArray[np.int64]
    weight_B: NDArray[np.float64]
    columns: Mapping[str, Array]
    spec: Columns

    def chunks(self, low: int, high: int) -> tuple[int, int]:
        """First chunk, and one past the last, whose first position lies in ``low`` to ``high``."""
        first, last = np.searchsorted(self.first_C, [low, high]).tolist()
        return first, last

    def slice(self, low: int, high: int) -> dict[str, Array]:
        """The columns that belong to positions ``low`` to ``high`` and to the chunks that start there."""
        first, last = self.chunks(low, high)
        picked = {name: self.columns[name][first:last] for name in self.spec.chunk}
        picked |= {name: self.columns[name][low:high] for name in self.spec.token}
        for count_name, names in self.spec.entries.items():
            count = self.columns[count_name].astype(np.int64)
            begin, end = (first, last) if count_name in self.spec.chunk else (low, high)
            start, stop = int(count[:begin].sum()), int(count[:end].sum())
            picked[count_name] = count[begin:end]
            picked |= {name: self.columns[name][start:stop] for name in names}
        return picked


@dataclass(frozen=True)
class Micro:
    """Samples of one forward pass, padded on the right.

    Attributes:
        input_BL: int64. length_B: int64, inputs per sample.
        place_P: int64, flat places in [B, L] that predict a token. label_P: int64, these tokens.
        sample_P: int64, the sample of each position.
        lessons: one per teacher.
    """

    sample_ids: tuple[str, ...]
    input_BL: NDArray[np.int64]
    length_B: NDArray[np.int64]
    place_P: NDArray[np.int64]
    label_P: NDArray[np.int64]
    sample_P: NDArray[np.int64]
    lessons: tuple[Lesson, ...]


def make_micro(samples: Sequence[Sample], losses: Sequence[Loss]) -> Micro:
    """Pad samples (each with at least one input) into one forward pass."""
    length_B = np.array([sample.inputs for sample in samples], np.int64)
    width = int(length_B.max())
    input_BL = np.zeros((len(samples), width), np.int64)
    for row, sample in enumerate(samples):
        input_BL[row, : sample.inputs] = sample.sequence[:-1]
    places = [row * width + np.arange(n, dtype=np.int64) for row, n in enumerate(length_B)]
    return Micro(
        tuple(sample.sample_id for sample in samples),
        input_BL,
        length_B,
        np.concatenate(places),
        np.concatenate([sample.sequence[1:] for sample in samples]).astype(np.int64),
        np.repeat(np.arange(len(samples)), length_B),
        tuple(_lesson(samples, length_B, source, loss.columns) for source, loss in enumerate(losses)),
    )


def _lesson(samples: Sequence[Sample], length_B: NDArray[np.int64], source: int, spec: Columns) -> Lesson:
    parts = [
        sample.targets[source] or _nothing(spec, int(length)) for sample, length in zip(samples, length_B, strict=True)
    ]
    chunks_B = [len(part.first_C) for part in parts]
    offset_C = np.repeat(np.cumsum(length_B) - length_B, chunks_B)
    next_C = np.concatenate([part.next_C for part in parts])
    return Lesson(
        np.concatenate([part.first_C for part in parts]) + offset_C,
        np.concatenate([part.length_C for part in parts]),
        np.where(next_C >= 0, next_C + offset_C, -1),
        np.repeat(np.arange(len(samples)), chunks_B),
        np.array([sample.weights[source] for sample in samples], np.float64),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in spec.names},
        spec,
    )


def _nothing(spec: Columns, positions: int) -> SampleTargets:
    """The targets of a sample that a teacher does not hold."""
    none = np.zeros(0, np.int64)
    columns = {name: np.zeros(positions if name in spec.token else 0, np.int32) for name in spec.names}
    return SampleTargets(none, none, none, columns)


def split_micros(samples: Sequence[Sample], micro_tokens: int, losses: Sequence[Loss]) -> list[Micro]:
    """Micro-batches of at most ``micro_tokens`` padded inputs (or one sample), longest first to pad little."""
    ordered = sorted((s for s in samples if s.inputs > 0), key=lambda sample: -sample.inputs)
    piles: list[list[Sample]] = []
    for sample in ordered:
        if piles and (len(piles[-1]) + 1) * piles[-1][0].inputs <= micro_tokens:
            piles[-1].append(sample)
        else:
            piles.append([sample])
    return [make_micro(pile, losses) for pile in piles]
