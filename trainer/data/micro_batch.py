"""Samples of one forward pass, and each teacher's targets for them.

Shapes: B samples (in ``input_BL`` rows), L inputs of a row, I inputs of all samples, P predicting positions (of
conversations those of taught tokens alone, else all inputs), C chunks of a teacher, K entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.trainer.data.packing import Shape, packed_shapes, padded_shapes
from xtoken.trainer.data.samples import Sample
from xtoken.trainer.losses.base import WEIGHT, Loss
from xtoken.trainer.packed import Packed
from xtoken.trainer.ragged import Array, Columns, Ints, Ragged, running


@dataclass(frozen=True)
class TeacherTargets(Ragged[Array]):
    """One teacher's targets for a micro-batch: all samples in order, positions counted in P of the micro-batch.

    Attributes:
        sample_C: int64, the sample of each chunk.
        weight_B: float64, the teacher's weight in each sample; 0 where it does not hold it.
    """

    sample_C: Ints
    weight_B: NDArray[np.float64]

    @classmethod
    def of(cls, chunks: Ragged[Array], sample_C: Ints, weight_B: NDArray[np.float64]) -> "TeacherTargets":
        """From the chunks of all samples."""
        return cls(chunks.first_C, chunks.length_C, chunks.next_C, chunks.columns, chunks.spec, sample_C, weight_B)

    @property
    def total(self) -> float:
        """What the sum over the chunks is divided by: their number, or the sum of their weights by kind."""
        return float(self.columns[WEIGHT].sum()) if WEIGHT in self.columns else float(len(self.first_C))


@dataclass(frozen=True)
class Micro:
    """Samples of one forward pass: rows of one or several samples, padded on the right.

    No attention mask goes with it: rows are causal, and the samples of a row are told apart by positions that start
    again. The padding of a row is a segment of its own.

    Attributes:
        sample_ids: the samples, row after row.
        input_BL, position_BL: int64, tokens and position ids; 0 at the first input of each sample and of the padding.
        place_P: int64, flat places in [B, L] that predict a taught token. label_P: int64, these tokens.
        sample_P: int64, the sample of each position.
        targets: one per teacher.
        pieces: what ``xtoken.trainer.pieces.cut`` made of it, for a run's losses and device; None: not made yet.
    """

    sample_ids: tuple[str, ...]
    input_BL: Ints
    position_BL: Ints
    place_P: Ints
    label_P: Ints
    sample_P: Ints
    targets: tuple[TeacherTargets, ...]
    pieces: Packed | None = None


def make_micro(rows: Sequence[Sequence[Sample]], width: int, losses: Sequence[Loss]) -> Micro:
    """Lay rows of samples (each with a token to predict, together at most ``width`` inputs) into one forward pass."""
    samples = [sample for row in rows for sample in row]
    length_B = np.array([sample.inputs for sample in samples], np.int64)
    start_B = running(length_B)
    row_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    used_R = np.bincount(row_B, length_B, len(rows)).astype(np.int64)
    # a sample begins as far behind its row's start as the inputs of the row before it
    place_B = start_B[:-1] + (np.arange(len(rows)) * width - running(used_R)[:-1])[row_B]
    rising_I = np.arange(start_B[-1])
    place_I = rising_I + np.repeat(place_B - start_B[:-1], length_B)
    input_BL, position_BL = np.zeros((2, len(rows), width), np.int64)
    input_BL.flat[place_I] = np.concatenate([sample.sequence[:-1] for sample in samples])
    position_BL.flat[place_I] = rising_I - np.repeat(start_B[:-1], length_B)
    # padding counts from 0: it is not a continuation of the sample before it, and positions stay within the context
    for row, used in enumerate(used_R.tolist()):
        position_BL[row, used:] = rising_I[: width - used] if width - used <= len(rising_I) else range(width - used)
    predicts_I = np.concatenate([sample.predicts for sample in samples])
    positions_B = np.array([sample.positions for sample in samples], np.int64)
    return Micro(
        tuple(sample.sample_id for sample in samples),
        input_BL,
        position_BL,
        place_I[predicts_I],
        np.concatenate([sample.sequence[1:] for sample in samples])[predicts_I].astype(np.int64),
        np.repeat(np.arange(len(samples)), positions_B),
        tuple(_teacher_targets(samples, positions_B, at, loss.spec) for at, loss in enumerate(losses)),
    )


def _teacher_targets(samples: Sequence[Sample], positions_B: Ints, teacher: int, spec: Columns) -> TeacherTargets:
    parts = [
        sample.targets[teacher] or Ragged.empty(spec, positions)
        for sample, positions in zip(samples, positions_B.tolist(), strict=True)
    ]
    weight_B = np.array([sample.weights[teacher] for sample in samples], np.float64)
    sample_C = np.repeat(np.arange(len(samples)), [len(part.first_C) for part in parts])
    targets = TeacherTargets.of(Ragged.concat(parts, positions_B, spec), sample_C, weight_B)
    assert targets.entry_starts is not None  # worked out here, in a reader's thread, not in the step
    return targets


def split_micros(
    samples: Sequence[Sample], micro_tokens: int, losses: Sequence[Loss], pack_tokens: int | None = None
) -> list[Micro]:
    """Micro-batches of at most ``micro_tokens`` inputs, padding included (or one row), widest first.

    Args:
        samples: those without a token to predict are left out.
        pack_tokens: pack samples into rows of at most this many inputs; None: one sample per row.
    """
    kept = [sample for sample in samples if sample.positions > 0]
    sizes = [sample.inputs for sample in kept]
    if pack_tokens is None:
        shapes = padded_shapes(sizes, micro_tokens)
    else:
        shapes = packed_shapes(sizes, micro_tokens, pack_tokens)
    return [_shaped(kept, shape, losses) for shape in shapes]


def _shaped(samples: Sequence[Sample], shape: Shape, losses: Sequence[Loss]) -> Micro:
    return make_micro([[samples[at] for at in row] for row in shape.rows], shape.width, losses)
