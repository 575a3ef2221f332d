"""What the manifests of conversations say of how these were read and rendered."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from xtoken.schemas.record import Record

_MOST_TOKENS = 1 << 24
Learned = Literal["assistant", "call", "stop", "thinking", "system", "user", "result", "text"]


class ChatInfo(Record):
    """One model's side of conversations."""

    template: str | None = Field(
        pattern="^[0-9a-f]{64}$", description="sha256 of the chat template; null: token ids, which none is for"
    )
    date: str | None = Field(
        max_length=40, description="ISO 8601: what a template that asks for the date is told; null: token ids"
    )
    arguments: dict[Annotated[str, Field(max_length=100)], Any] = Field(
        default_factory=dict, max_length=256, description="further variables of the template"
    )
    learn: list[Learned] = Field(max_length=16, description="kinds of spans that are taught")
    stop_token: int | None = Field(
        None, ge=0, le=_MOST_TOKENS, description="with which the template ends an answer; null: with none"
    )

    @field_validator("date")
    @classmethod
    def _a_date(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _rendered_or_not(self) -> Self:
        if (self.template is None) != (self.date is None):
            raise ValueError("a chat template has a date, and what none rendered has neither")
        return self


class Answering(Record):
    """How the teacher wrote answers itself."""

    tokens: int = Field(ge=1, le=_MOST_TOKENS, description="at most, of one answer; one that has more is cut")
    temperature: float = Field(ge=0.0, description="0: the most probable token")
    top_p: float = Field(gt=0.0, le=1.0)
    samples: int = Field(ge=1, le=_MOST_TOKENS, description="answers to each prompt")
    seed: int = Field(ge=0, lt=1 << 63)


class CaptureChat(ChatInfo):
    """The teacher's side, and what became samples."""

    form: str = Field(max_length=40, description="which columns of the corpus hold conversations, and how")
    turns: Literal["all", "last", "each"] = "all"
    long: Literal["cut", "skip"] = "cut"
    answering: Answering | None = Field(None, description="null: the corpus holds the answers")
