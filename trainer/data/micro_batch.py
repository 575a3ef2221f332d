"""Samples of one forward pass, and what each teacher wants learnt from it.

Shapes: B samples (in ``input_BL`` rows), L inputs of a row, P predicting positions, C chunks of a teacher, K entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from xtoken.trainer.data.layout import running
from xtoken.trainer.data.packing import Shape, packed_shapes, padded_shapes
from xtoken.trainer.data.samples import Sample, SampleTargets
from xtoken.trainer.losses.base import Array, Columns, Loss

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lesson:
    """One teacher's targets for a micro-batch.

    Attributes:
        first_C, length_C, next_C: int64, as in ``View``, positions counted in P of the micro-batch; ascending.
        sample_C: int64, the sample of each chunk.
        weight_B: float64, the teacher's weight in each sample; 0 where it does not hold it.
        columns: the loss's columns, all samples in order; spec: their axes.
    """

    first_C: Ints
    length_C: Ints
    next_C: Ints
    sample_C: Ints
    weight_B: NDArray[np.float64]
    columns: Mapping[str, Array]
    spec: Columns

    @cached_property
    def entry_starts(self) -> dict[str, Ints]:
        """Per count column, the first entry of each chunk or position, and the number of entries."""
        return {name: running(self.columns[name]) for name in self.spec.entries}

    def chunks(self, low: int, high: int) -> tuple[int, int]:
        """First chunk, and one past the last, whose first position lies in ``low`` to ``high``."""
        first, last = np.searchsorted(self.first_C, [low, high]).tolist()
        return first, last

    def slice(self, low: int, high: int) -> dict[str, Array]:
        """The columns that belong to positions ``low`` to ``high`` and to the chunks that start there; views."""
        first, last = self.chunks(low, high)
        picked = {name: self.columns[name][first:last] for name in self.spec.chunk}
        picked |= {name: self.columns[name][low:high] for name in self.spec.token}
        for count_name, names in self.spec.entries.items():
            begin, end = (first, last) if count_name in self.spec.chunk else (low, high)
            starts = self.entry_starts[count_name]
            start, stop = int(starts[begin]), int(starts[end])
            picked[count_name] = self.columns[count_name][begin:end].astype(np.int64)
            picked |= {name: self.columns[name][start:stop] for name in names}
        return picked


@dataclass(frozen=True)
class Micro:
    """Samples of one forward pass: rows of one or several samples, filled up on the right.

    No attention mask goes with it: rows are causal, and the samples of a row are told apart by positions that start
    again. What fills a row is a segment of its own.

    Attributes:
        sample_ids: the samples, row after row.
        input_BL, position_BL: int64, tokens and position ids; 0 at the first input of each sample and of the filling.
        place_P: int64, flat places in [B, L] that predict a token. label_P: int64, these tokens.
        sample_P: int64, the sample of each position.
        lessons: one per teacher.
    """

    sample_ids: tuple[str, ...]
    input_BL: Ints
    position_BL: Ints
    place_P: Ints
    label_P: Ints
    sample_P: Ints
    lessons: tuple[Lesson, ...]


def make_micro(rows: Sequence[Sequence[Sample]], width: int, losses: Sequence[Loss]) -> Micro:
    """Lay rows of samples (each with at least one input, together at most ``width``) into one forward pass."""
    samples = [sample for row in rows for sample in row]
    length_B = np.array([sample.inputs for sample in samples], np.int64)
    start_B = running(length_B)
    row_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    used_R = np.bincount(row_B, length_B, len(rows)).astype(np.int64)
    # a sample begins as far behind its row's start as the inputs of the row before it
    place_B = start_B[:-1] + (np.arange(len(rows)) * width - running(used_R)[:-1])[row_B]
    rising_P = np.arange(start_B[-1])
    place_P = rising_P + np.repeat(place_B - start_B[:-1], length_B)
    input_BL, position_BL = np.zeros((2, len(rows), width), np.int64)
    input_BL.flat[place_P] = np.concatenate([sample.sequence[:-1] for sample in samples])
    position_BL.flat[place_P] = rising_P - np.repeat(start_B[:-1], length_B)
    for row, used in enumerate(used_R.tolist()):
        position_BL[row, used:] = rising_P[: width - used] if width - used <= len(rising_P) else range(width - used)
    return Micro(
        tuple(sample.sample_id for sample in samples),
        input_BL,
        position_BL,
        place_P,
        np.concatenate([sample.sequence[1:] for sample in samples]).astype(np.int64),
        np.repeat(np.arange(len(samples)), length_B),
        tuple(_lesson(samples, length_B, source, loss.columns) for source, loss in enumerate(losses)),
    )


def _lesson(samples: Sequence[Sample], length_B: Ints, source: int, spec: Columns) -> Lesson:
    parts = [
        sample.targets[source] or _nothing(spec, int(length)) for sample, length in zip(samples, length_B, strict=True)
    ]
    chunks_B = [len(part.first_C) for part in parts]
    offset_C = np.repeat(running(length_B)[:-1], chunks_B)
    next_C = np.concatenate([part.next_C for part in parts])
    lesson = Lesson(
        np.concatenate([part.first_C for part in parts]) + offset_C,
        np.concatenate([part.length_C for part in parts]),
        np.where(next_C >= 0, next_C + offset_C, -1),
        np.repeat(np.arange(len(samples)), chunks_B),
        np.array([sample.weights[source] for sample in samples], np.float64),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in spec.names},
        spec,
    )
    assert lesson.entry_starts is not None  # worked out here, in a reader's thread, not in the step
    return lesson


def _nothing(spec: Columns, positions: int) -> SampleTargets:
    """The targets of a sample that a teacher does not hold."""
    none = np.zeros(0, np.int64)
    columns = {name: np.zeros(positions if name in spec.token else 0, np.int32) for name in spec.names}
    return SampleTargets(none, none, none, columns)


def split_micros(
    samples: Sequence[Sample], micro_tokens: int, losses: Sequence[Loss], pack_tokens: int | None = None
) -> list[Micro]:
    """Micro-batches of at most ``micro_tokens`` inputs, filling included (or one row), widest first.

    Args:
        samples: those without an input are left out.
        pack_tokens: pack samples into rows of at most this many inputs; None: one sample per row.
    """
    kept = [sample for sample in samples if sample.inputs > 0]
    sizes = [sample.inputs for sample in kept]
    if pack_tokens is None:
        shapes = padded_shapes(sizes, micro_tokens)
    else:
        shapes = packed_shapes(sizes, micro_tokens, pack_tokens)
    return [_shaped(kept, shape, losses) for shape in shapes]


def _shaped(samples: Sequence[Sample], shape: Shape, losses: Sequence[Loss]) -> Micro:
    return make_micro([[samples[at] for at in row] for row in shape.rows], shape.width, losses)
