"""From stored rows to one training sample with each teacher's targets for it.

Shapes: S student tokens, P predicted positions, C chunks, K entries summed over chunks or positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.rows import GroupTargets, group_targets
from xtoken.trainer.data.targets import RowGroup
from xtoken.trainer.ragged import Array, Ragged

Stored = tuple[RowGroup, int]  # a row of a row group


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        sequence: int32, the context token (if any) and the student tokens; input j predicts token j + 1.
        targets: per teacher, positions counted in the sample's taught tokens; None where it does not hold the sample.
        weights: per teacher, summing to 1 over those that hold the sample (or all 0).
        cut: tokens of the stored sample beyond ``Layout.max_tokens``.
        taught: bool, of each input, whether the token that it predicts is taught; None: all are, as in plain text.
    """

    sample_id: str
    sequence: NDArray[np.int32]
    targets: tuple[Ragged[Array] | None, ...]
    weights: tuple[float, ...]
    cut: int = 0
    taught: NDArray[np.bool_] | None = None

    @property
    def inputs(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.sequence) - 1

    @property
    def predicts(self) -> NDArray[np.bool_]:
        """``taught``, in full."""
        return np.ones(max(0, self.inputs), np.bool_) if self.taught is None else self.taught

    @property
    def positions(self) -> int:
        """Tokens that are predicted and taught."""
        return max(0, self.inputs) if self.taught is None else int(self.taught.sum())


def context_token(tokenizer: TokenizerInfo) -> int | None:
    """The token before every sample: BOS where the tokenizer adds one, else eos as document separator, else none."""
    return tokenizer.bos_id if tokenizer.adds_bos and tokenizer.bos_id is not None else tokenizer.eos_id


def with_context(ids: NDArray[np.int32], layout: Layout) -> NDArray[np.int32]:
    """Context token and at most ``max_tokens`` tokens."""
    ids = ids[: layout.max_tokens]
    if layout.context is None:
        return ids.astype(np.int32)
    sequence = np.empty(len(ids) + 1, np.int32)
    sequence[0], sequence[1:] = layout.context, ids
    return sequence


def read_sample(stored: Sequence[Stored | None], layout: Layout) -> Sample:
    """Build a sample from its stored row in each target folder (None: that folder lacks it).

    Raises:
        VerificationError: the row's lists do not fit each other, or hold an id outside the vocabulary.
    """
    alone = [None if one is None else (one[0].row(one[1]), 0) for one in stored]
    return read_samples([alone], layout)[0]


def read_samples(stored: Sequence[Sequence[Stored | None]], layout: Layout) -> list[Sample]:
    """Build samples, each from its stored row in each target folder; the row groups are checked as a whole.

    Raises:
        VerificationError: see ``read_sample``; of any row of these row groups.
    """
    opened: dict[tuple[int, int], GroupTargets] = {}
    for rows in stored:
        for source, one in enumerate(rows):
            if one is not None and (source, id(one[0])) not in opened:
                opened[source, id(one[0])] = group_targets(one[0], layout.losses[source], layout)
    return [_sample(rows, opened, layout) for rows in stored]


def _sample(stored: Sequence[Stored | None], opened: Mapping[tuple[int, int], GroupTargets], layout: Layout) -> Sample:
    group, row = next(one for one in stored if one is not None)
    ids = group.values("student_ids", row)
    held = [None if one is None else (opened[at, id(one[0])], one[1]) for at, one in enumerate(stored)]
    targets = tuple(None if one is None else one[0].row(one[1]) for one in held)
    scores = [None if one is None else one[0].score_R[one[1]] for one in held]
    weights = sample_weights(layout.weights, scores, layout.weighting)
    cut = max(0, len(ids) - layout.max_tokens)
    taught = group.values("learn", row)[1 : layout.max_tokens] if layout.chat else None
    return Sample(group.sample_ids[row], with_context(ids, layout), targets, weights, cut, taught)


def sample_weights(base: Sequence[float], scores: Sequence[float | None], weighting: str) -> tuple[float, ...]:
    """Weights of a sample's teachers: ``base``, or ``base`` times exp(score), over those that hold it; they sum to 1.

    A score of NaN (the teacher holds the sample but has no distribution in it) takes part only when no other does.
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
