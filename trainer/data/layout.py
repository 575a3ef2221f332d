"""How samples become inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

from xtoken.trainer.losses.base import Loss

BASE_COLUMNS = ("student_ids", "chunk_student_end")
SCORE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "static": (),
    "ce": ("teacher_logprob",),
    "entropy": ("teacher_entropy",),
    "confidence": ("teacher_top1",),
}


@dataclass(frozen=True)
class Layout:
    """How samples become inputs.

    Attributes:
        context: token shown before each sample, or None: then a sample's first token is not predicted.
        max_tokens: student tokens kept of a sample.
        vocabulary: ids of the student's tokenizer.
        losses: one per target folder.
        weights: one per target folder.
        weighting: what a sample's teachers are weighed by (see ``xtoken.schemas.configs.train.DataGroup.weighting``).
    """

    context: int | None
    max_tokens: int
    vocabulary: int
    losses: tuple[Loss, ...]
    weights: tuple[float, ...] = (1.0,)
    weighting: str = "static"

    def columns(self, source: int) -> tuple[str, ...]:
        """Columns to read of a target folder."""
        loss = self.losses[source]
        ends = () if loss.kinds is None else ("chunk_teacher_end",)
        wanted = (*BASE_COLUMNS, *ends, *loss.columns.names, *SCORE_COLUMNS[self.weighting])
        return tuple(dict.fromkeys(wanted))

    @property
    def shift(self) -> int:
        """Token i of a sample is predicted at position i + shift."""
        return 0 if self.context is not None else -1
