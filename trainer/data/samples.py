"""From stored rows to one training sample with what each teacher says about it.

Shapes: S student tokens, P predicted positions, C chunks, K entries summed over chunks or positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import VerificationError
from schemas.manifest import TokenizerInfo
from trainer.data.targets import RowGroup
from trainer.losses.base import Array, Columns, Loss

BASE_COLUMNS = ("student_ids", "chunk_student_end")
NORMALISED_WITHIN = 1e-3  # float32 log-probabilities of up to 256 cells sum to 1 far closer than this
SCORE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "static": (),
    "ce": ("teacher_logprob",),
    "entropy": ("teacher_entropy",),
    "confidence": ("teacher_top1",),
}
Stored = tuple[RowGroup, int]  # a row of a row group


@dataclass(frozen=True)
class Layout:
    """How samples become inputs.

    Attributes:
        context: token shown before each sample, or None: then a sample's first token is not predicted.
        max_tokens: student tokens kept of a sample.
        vocabulary: ids of the student's tokenizer.
        losses: one per target folder.
        weights: one per target folder.
        weighting: what a sample's teachers are weighed by (see ``schemas.config.TrainConfig``).
    """

    context: int | None
    max_tokens: int
    vocabulary: int
    losses: tuple[Loss, ...]
    weights: tuple[float, ...] = (1.0,)
    weighting: str = "static"

    def columns(self, source: int) -> tuple[str, ...]:
        """Columns to read of a target folder."""
        wanted = (*BASE_COLUMNS, *self.losses[source].columns.names, *SCORE_COLUMNS[self.weighting])
        return tuple(dict.fromkeys(wanted))

    @property
    def shift(self) -> int:
        """Token i of a sample is predicted at position i + shift."""
        return 0 if self.context is not None else -1


@dataclass(frozen=True)
class SampleTargets:
    """What one teacher says about a sample.

    Attributes:
        first_C, length_C, next_C: as in ``View``, positions counted from the sample's first.
        columns: the loss's columns: chunk columns of the valid chunks, token columns of all predicted tokens.
        score: what the sample's weight is a softmax of; NaN = the teacher has no row here.
    """

    first_C: NDArray[np.int64]
    length_C: NDArray[np.int64]
    next_C: NDArray[np.int64]
    columns: Mapping[str, Array]
    score: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        sequence: int32, the context token (if any) and the student tokens; position j predicts token j + 1.
        targets: per teacher, None where it does not hold the sample.
        weights: per teacher, summing to 1 over those that hold the sample (or all 0).
        cut: tokens of the stored sample beyond ``Layout.max_tokens``.
    """

    sample_id: str
    sequence: NDArray[np.int32]
    targets: tuple[SampleTargets | None, ...]
    weights: tuple[float, ...]
    cut: int = 0

    @property
    def inputs(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.sequence) - 1


def context_token(tokenizer: TokenizerInfo) -> int | None:
    """The token before every sample: BOS where the tokenizer adds one, else eos as document separator, else none."""
    return tokenizer.bos_id if tokenizer.adds_bos and tokenizer.bos_id is not None else tokenizer.eos_id


def with_context(ids: NDArray[np.int32], layout: Layout) -> NDArray[np.int32]:
    """Context token and at most ``max_tokens`` tokens."""
    context = [] if layout.context is None else [layout.context]
    return np.concatenate([np.asarray(context, np.int32), ids[: layout.max_tokens]])


def read_sample(stored: Sequence[Stored | None], layout: Layout) -> Sample:
    """Build a sample from its stored row in each target folder (None: that folder lacks it).

    Raises:
        VerificationError: the row's lists do not fit each other, or hold an id outside the vocabulary.
    """
    group, row = next(one for one in stored if one is not None)
    ids = group.values("student_ids", row)
    targets = tuple(
        None if one is None else _read_targets(*one, loss, layout)
        for one, loss in zip(stored, layout.losses, strict=True)
    )
    scores = [None if one is None else one.score for one in targets]
    weights = sample_weights(layout.weights, scores, layout.weighting)
    sequence = with_context(ids.astype(np.int32), layout)
    return Sample(group.sample_ids[row], sequence, targets, weights, max(0, len(ids) - layout.max_tokens))


def sample_weights(base: Sequence[float], scores: Sequence[float | None], weighting: str) -> tuple[float, ...]:
    """Weights of a sample's teachers: ``base``, or ``base`` times exp(score), over those that hold it; they sum to 1.

    A score of NaN (the teacher holds the sample but has no row in it) takes part only when no other does.
    """
    held = [score is not None for score in scores]
    raw = [weight * here for weight, here in zip(base, held, strict=True)]
    known = [score for score in scores if score is not None and not math.isnan(score)]
    if weighting != "static" and known:
        top = max(known)
        raw = [
            0.0 if score is None or math.isnan(score) else weight * math.exp(score - top)
            for weight, score in zip(base, scores, strict=True)
        ]
    total = sum(raw)
    return tuple(weight / total if total else 0.0 for weight in raw)


def _read_targets(group: RowGroup, row: int, loss: Loss, layout: Layout) -> SampleTargets:
    ids, end_C = group.values("student_ids", row), group.values("chunk_student_end", row).astype(np.int64)
    columns: Mapping[str, Array] = {name: group.values(name, row) for name in loss.columns.names}
    if not _fits(ids, end_C, columns, loss.columns, layout.vocabulary):
        raise VerificationError(
            f"sample {group.sample_ids[row]!r} in part {group.ref.part} of the targets contradicts itself; "
            "run 'xtoken verify' on the targets and write them again"
        )
    score = _score(group, row, end_C, layout.weighting)
    end_C, columns = loss.regroup(end_C, columns)
    start_C = np.concatenate([[0], end_C[:-1]]).astype(np.int64)[: len(end_C)]
    kept, shift = min(len(ids), layout.max_tokens), layout.shift
    valid_C = (end_C > start_C) & (end_C <= kept) & (start_C + shift >= 0) & loss.valid(start_C, columns)
    next_C = np.where(end_C < kept, end_C + shift, -1)[valid_C]
    low = -shift  # without context the first token is not predicted
    selected = _select(columns, loss.columns, valid_C, np.arange(low, max(low, kept)))
    return SampleTargets((start_C + shift)[valid_C], (end_C - start_C)[valid_C], next_C, selected, score)


def _fits(ids: Array, end_C: NDArray[np.int64], columns: Mapping[str, Array], spec: Columns, vocabulary: int) -> bool:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocabulary):
        return False
    if len(end_C) and (end_C[0] < 0 or end_C[-1] > len(ids) or (np.diff(end_C) < 0).any()):
        return False
    for names, length in ((spec.chunk, len(end_C)), (spec.token, len(ids))):
        if any(len(columns[name]) != length for name in names):
            return False
    for count_name, names in spec.entries.items():
        count = columns[count_name]
        if (count < 0).any() or any(len(columns[name]) != count.sum() for name in names):
            return False
    return all(_normalised(columns, name) for name in columns if name.endswith("_rest_logprob"))


def _normalised(columns: Mapping[str, Array], rest_name: str) -> bool:
    """Entries and REST (if known) sum to 1 wherever there are entries; without that a KL could fall below zero."""
    prefix = rest_name.removesuffix("rest_logprob")
    count = columns[prefix + "count"].astype(np.int64)
    owner_K = np.repeat(np.arange(len(count)), count)
    kept = np.bincount(owner_K, np.exp(columns[prefix + "logprob"].astype(np.float64)), len(count))
    total = kept + np.exp(np.nan_to_num(columns[rest_name].astype(np.float64), nan=-np.inf))
    return bool((np.abs(total - 1)[count > 0] < NORMALISED_WITHIN).all())


def _score(group: RowGroup, row: int, end_C: NDArray[np.int64], weighting: str) -> float:
    """Higher = more trusted. CE is per student token, so that teachers of other tokenizers compare."""
    if weighting == "static":
        return 0.0
    (name,) = SCORE_COLUMNS[weighting]
    value = group.values(name, row).astype(np.float64)
    if weighting == "ce":
        known_C = ~np.isnan(value)
        tokens = np.diff(end_C, prepend=0)[known_C].sum()
        return float(value[known_C].sum() / tokens) if tokens else math.nan
    return float(-value[0] if weighting == "entropy" else value[0])


def _select(
    columns: Mapping[str, Array], spec: Columns, valid_C: NDArray[np.bool_], tokens: NDArray[np.int64]
) -> dict[str, Array]:
    """Chunk columns of valid chunks, token columns of ``tokens``, with the entries that belong to them."""
    kept = {name: columns[name][valid_C] for name in spec.chunk}
    kept |= {name: columns[name][tokens] for name in spec.token}
    for count_name, names in spec.entries.items():
        count = columns[count_name].astype(np.int64)
        chosen = np.zeros(len(count), np.bool_)
        chosen[np.flatnonzero(valid_C) if count_name in spec.chunk else tokens] = True
        chosen_K = np.repeat(chosen, count)
        kept |= {name: columns[name][chosen_K] for name in names}
    return kept
