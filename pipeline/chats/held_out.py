"""Conversations that a student is measured on, as its own template writes them; and whose template that must be."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats.conversation import Conversation
from xtoken.pipeline.chats.encode import LEARNED, ChatModel, ChatTokens, open_chat_model
from xtoken.pipeline.chats.refused import Refused
from xtoken.pipeline.chats.slots import Kind
from xtoken.pipeline.chats.turns import fit, samples_of
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.errors import XtokenError

_SHOWN = ("thinking", "assistant", "call")


class Taught(NamedTuple):
    """A taught span: its kind, first token and the one after its last, and bytes of its text."""

    kind: str
    start: int
    stop: int
    size: int


class Asked(NamedTuple):
    """The first answer as a question: the tokens up to it, with what asks for it; the same as text; the answer; and the
    token with which the template ends one (None: none)."""

    ids: NDArray[np.int32]
    text: str
    answer: str
    stop: int | None


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A conversation to be measured on.

    Attributes:
        ids: int32, all its tokens.
        taught: what of it counts, in order.
        asked: None where the template cannot ask.
    """

    ids: NDArray[np.int32]
    taught: tuple[Taught, ...]
    asked: Asked | None

    @property
    def taught_bytes(self) -> int:
        """Bytes of what counts."""
        return sum(span.size for span in self.taught)


def open_student(
    source: str,
    info: ChatInfo | None,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> ChatModel:
    """The chat model of a student.

    Args:
        source: its tokenizer.
        info: what the manifest of its targets says of its side, which it must agree with; None: it has no targets of
            conversations.
        template: file that counts instead of its own chat template.
        arguments, date: what its template is told; left out: what the targets say, else nothing, and today (UTC).

    Raises:
        XtokenError: it has no template, or another one than the targets were written with, or is told otherwise.
    """
    if info is None:
        day = datetime.now(UTC).replace(tzinfo=None) if date is None else datetime.fromisoformat(date)
        return open_chat_model(source, template=template, arguments=arguments, date=day)
    assert info.template is not None, "targets of token ids say nothing of a template"
    for name, asked, told in (("--template-arg", arguments, info.arguments), ("--date", date, info.date)):
        if asked and asked != told:
            raise XtokenError(f"{name}: {asked} was asked for, and the targets were written with {told}; leave it out")
    assert info.date is not None, "what is rendered has a date"
    day = datetime.fromisoformat(info.date)
    model = open_chat_model(source, template=template, arguments=info.arguments, date=day)
    if model.template.sha256 != info.template:
        raise XtokenError(
            f"the chat template of {template or source} ({model.template.sha256[:12]}) is not the one that the "
            f"targets were written with ({info.template[:12]}); give that one with --template FILE, or align again"
        )
    return model


def held_out(model: ChatModel, conversation: Conversation, learn: Collection[Kind], limit: int) -> HeldOut:
    """A conversation as a model reads it; one that is too long loses its last messages.

    Args:
        model: the student's.
        conversation: what it is measured on.
        learn: kinds of spans that count.
        limit: tokens.

    Raises:
        Refused: the template refuses it, nothing of it is taught, or not one answer fits.
    """
    (sample,) = samples_of(conversation, "all")
    kept, tokens = fit(sample.conversation, lambda one: model.encode(one, learn), limit, "cut")
    taught = [Taught(s.kind, s.token_start, s.token_end, s.byte_end - s.byte_start) for s in tokens.spans if s.learn]
    return HeldOut(tokens.ids, tuple(one for one in taught if one.stop > one.start), _asked(model, kept, tokens))


def _asked(model: ChatModel, conversation: Conversation, tokens: ChatTokens) -> Asked | None:
    message = min(span.message for span in tokens.spans if span.learn)
    before = conversation.cut(message)
    try:
        asked, text = model.encode_prompt(before), replace(model.template, asks=True).render(before)
    except Refused:
        return None
    axis = tokens.text.encode()
    answer = [axis[s.byte_start : s.byte_end] for s in tokens.spans if s.message == message and s.kind in _SHOWN]
    return Asked(asked.ids, text, b"".join(answer).decode(errors="replace"), model.stop_token)


@dataclass(frozen=True)
class StudentChats:
    """A student that conversations are read for; its template and tokenizer are opened when it is asked for them.

    Attributes:
        source, info, template, arguments, date: see ``open_student``.
        more: kinds of spans that count beside those that are taught, of its targets or by default.
    """

    source: str
    info: ChatInfo | None = None
    template: str | None = None
    more: tuple[Kind, ...] = ()
    arguments: Mapping[str, Any] | None = None
    date: str | None = None

    @cached_property
    def model(self) -> ChatModel:
        """See ``open_student``."""
        return open_student(self.source, self.info, self.template, self.arguments, self.date)

    def read(self, conversation: Conversation, limit: int) -> HeldOut:
        """See ``held_out``."""
        taught = LEARNED if self.info is None else self.info.learn
        return held_out(self.model, conversation, (*taught, *self.more), limit)
