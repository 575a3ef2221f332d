"""How samples become inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

from xtoken.trainer.losses.base import Loss

BASE_COLUMNS = ("student_ids", "chunk_student_end")
# Of conversations: what is taught, and which chunks are gaps, which have no row.
CHAT_COLUMNS = ("learn", "teacher_logprob")
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
        context: token shown before each sample, or None: then a sample's first token is not predicted. None of
            conversations, whose template wrote all that stands before them.
        max_tokens: student tokens kept of a sample.
        vocabulary: ids of the student's tokenizer.
        losses: one per target folder.
        weights: one per target folder.
        weighting: what a sample's teachers are weighed by (see ``xtoken.schemas.configs.train.DataGroup.weighting``).
        chat: samples are conversations: of their tokens only those that are taught are predicted.
    """

    context: int | None
    max_tokens: int
    vocabulary: int
    losses: tuple[Loss, ...]
    weights: tuple[float, ...] = (1.0,)
    weighting: str = "static"
    chat: bool = False

    def __post_init__(self) -> None:
        assert not self.chat or self.context is None, "a conversation has its own beginning"

    def columns(self, source: int) -> tuple[str, ...]:
        """Columns to read of a target folder."""
        loss = self.losses[source]
        ends = () if loss.kinds is None else ("chunk_teacher_end",)
        chat = CHAT_COLUMNS if self.chat else ()
        wanted = (*BASE_COLUMNS, *chat, *ends, *loss.columns.names, *SCORE_COLUMNS[self.weighting])
        return tuple(dict.fromkeys(wanted))
