"""A conversation as tokens of one model, with their ends on the byte axis and what of them is taught.

Shapes: T tokens of a sample.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats.conversation import Conversation, Message
from xtoken.pipeline.chats.refused import Refused
from xtoken.pipeline.chats.slots import Kind
from xtoken.pipeline.chats.spans import Key, Rendered, TextSpan, render_spans
from xtoken.pipeline.chats.template import ChatTemplate, load_template
from xtoken.pipeline.tokens import ChatTokenizer, load_chat_tokenizer
from xtoken.pipeline.tokens.chat import Place
from xtoken.pipeline.tokens.failures import CannotTokenize

LEARNED: frozenset[Kind] = frozenset({"assistant", "call", "stop"})
_ANSWER = ("assistant", "thinking", "call", "marker")


@dataclass(frozen=True)
class Span:
    """A stretch of a sample's tokens.

    Attributes:
        kind: what it is.
        message: index of its message; -1 for the template.
        part: index of the call; 0 opens and 1 closes reasoning; else 0.
        byte_start, byte_end: on the byte axis; equal for template, marker and stop.
        token_start, token_end: its tokens.
        learn: whether they are taught.
    """

    kind: Kind
    message: int
    part: int
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    learn: bool

    @property
    def key(self) -> Key:
        """What it is, whichever model wrote it."""
        return self.kind, self.message, self.part


@dataclass(frozen=True, eq=False)
class ChatTokens:
    """A conversation as one model reads it.

    Attributes:
        text: the byte axis: its contents and calls, joined.
        ids: int32 [T].
        ends: int32 [T], byte of the axis at which each token ends; a template's tokens end where they begin.
        learn: bool [T], whether the token is taught.
        spans: in order; together all tokens and all bytes.
        absent: kind, message and part of what the model's template leaves out or writes otherwise.
        trimmed: of contents that it writes without the blanks at their ends.
        snapped: some ends within contents are not known and moved up.
        differs: the whole rendering, tokenized at once, has other tokens.
    """

    text: str
    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    learn: NDArray[np.bool_]
    spans: tuple[Span, ...]
    absent: tuple[Key, ...]
    trimmed: tuple[Key, ...]
    snapped: bool
    differs: bool

    def __len__(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def message_ends(self) -> list[tuple[int, int]]:
        """Of every message of which something is taught, the messages up to it and the tokens up to its end."""
        ends: dict[int, int] = {}
        for span in self.spans:
            if span.learn:
                ends[span.message + 1] = span.token_end
        return sorted(ends.items())


def learned(spans: Sequence[Span]) -> NDArray[np.bool_]:
    """bool [T]: which tokens of spans are taught."""
    return np.repeat([span.learn for span in spans], [span.token_end - span.token_start for span in spans])


@dataclass(frozen=True)
class ChatModel:
    """What a model's conversations depend on: its template and its tokenizer."""

    template: ChatTemplate
    tokenizer: ChatTokenizer

    @cached_property
    def stops(self) -> frozenset[int]:
        """Ids of tokens that end an answer: eos, end of turn, and those of generation_config.json."""
        by_role = (at for at, role in enumerate(self.tokenizer.table.role) if role in ("eos", "eot"))
        return frozenset([*by_role, *self.template.stops])

    @cached_property
    def stop_token(self) -> int | None:
        """The token with which its template ends a plain answer; None if it ends it with none."""
        try:
            tokens = self.encode(Conversation((Message("user", "a"), Message("assistant", "a"))))
        except Refused:
            return None
        return next((int(tokens.ids[span.token_start]) for span in tokens.spans if span.kind == "stop"), None)

    @property
    def markers(self) -> tuple[str, ...]:
        """How ``marks`` are spelt."""
        return tuple(map(self.tokenizer.added.__getitem__, sorted(self.marks)))

    @cached_property
    def marks(self) -> frozenset[int]:
        """Added tokens that the template can write: those with a role, and those in its source."""
        sources = [*self.template.sources.values(), *map(str, self.template.variables.values())]
        role = self.tokenizer.table.role
        return frozenset(
            token
            for token, one in self.tokenizer.added.items()
            if role[token] is not None or (not one.isspace() and any(one in source for source in sources))
        )

    def encode(self, conversation: Conversation, learn: Collection[Kind] = LEARNED) -> ChatTokens:
        """Render and tokenize a conversation.

        Args:
            conversation: one sample's.
            learn: kinds of spans that are taught, in messages that are; ``thinking`` brings its markers.

        Raises:
            Refused: the template or the tokenizer cannot write it, or nothing of it would be learned.
        """
        tokens = self._encode(conversation, learn, self.template)
        _refuse_untaught(tokens)
        return tokens

    def encode_prompt(self, conversation: Conversation) -> ChatTokens:
        """A conversation with what asks for its next answer; nothing of it is taught.

        Raises:
            Refused: the template or the tokenizer cannot write it.
        """
        return self._encode(conversation, (), self._asking)

    @cached_property
    def _asking(self) -> ChatTemplate:
        return replace(self.template, asks=True)

    def _encode(self, conversation: Conversation, learn: Collection[Kind], template: ChatTemplate) -> ChatTokens:
        stops = [self.tokenizer.added[token] for token in self.stops if token in self.tokenizer.added]
        rendered = render_spans(conversation, template, self.markers, stops)
        writer = Writer(self, self._taught(conversation, learn, rendered))
        last = {span.message: at for at, span in enumerate(rendered.spans) if span.kind in _ANSWER}
        answered = {at: message for message, at in last.items()}
        try:
            for at, span in enumerate(rendered.spans):
                writer.write(span, answered.get(at - 1))
            whole = self.tokenizer.template_ids(rendered.text, "start")
        except CannotTokenize as error:
            raise Refused("a content has no tokens", str(error), "leave it out") from error
        return writer.tokens(rendered.absent, rendered.trimmed, whole)

    def _taught(self, conversation: Conversation, learn: Collection[Kind], rendered: Rendered) -> set[tuple[Kind, int]]:
        """Kind and message of what is taught. An answer whose calls are left out does not end where it seems to."""
        kinds: set[Kind] = {*learn}
        if "thinking" in kinds:
            kinds.add("marker")
        unfinished = {message for kind, message, _ in rendered.absent if kind == "call"}
        pairs = {(kind, message) for kind in kinds for message in conversation.taught}
        return {(kind, message) for kind, message in pairs if kind != "stop" or message not in unfinished}


def open_chat_model(
    source: str,
    *,
    revision: str | None = None,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: datetime,
) -> ChatModel:
    """The chat template and tokenizer of a model; see ``load_template`` for the arguments.

    Raises:
        XtokenError: it has no template, or its tokenizer cannot be loaded.
    """
    found = load_template(source, revision=revision, file=template, arguments=arguments, date=date)
    return ChatModel(found, load_chat_tokenizer(source, revision=revision))


def _refuse_untaught(tokens: ChatTokens) -> None:
    """Raise Refused where nothing is taught, or the very first token is, which nothing predicts."""
    if not tokens.learn.any():
        absent = ", ".join(f"{kind} of message {message}" for kind, message, _ in tokens.absent[:4])
        why = f"the chat template leaves out: {absent}" if absent else "its answers are empty"
        raise Refused("nothing is taught", why, "leave it out, or give another template with --template")
    if tokens.learn[0]:
        raise Refused(
            "the assistant speaks first",
            "the chat template writes nothing before the first answer, so that nothing predicts its first token",
            "let a user or system message come first",
        )


class Writer:
    """Collects tokens and spans."""

    def __init__(self, model: ChatModel, taught: Collection[tuple[Kind, int]]) -> None:
        self._tokenizer, self._stops, self._taught = model.tokenizer, model.stops, taught
        self._ids: list[int] = []
        self._ends: list[int] = []
        self._learn: list[bool] = []
        self._spans: list[Span] = []
        self._texts: list[str] = []
        self._place: Place = "start"
        self._size = 0
        self._snapped = False

    def write(self, span: TextSpan, answered: int | None) -> None:
        """Tokenize the next span.

        Args:
            span: it.
            answered: the message that the span before it ends, if it is an assistant's.
        """
        if span.kind == "template" and not span.plain:
            ids = self._tokenizer.template_ids(span.text, self._place)
            stop = self._stop_at(ids) if answered is not None else None
            for kind, message, part in _around(stop, len(ids), answered):
                self._add(kind, message, 0, ids[part], [self._size] * len(ids[part]))
        elif span.kind in ("call", "marker"):
            ids = self._tokenizer.template_ids(span.text, self._place)
            ends = self._call_ends(span.text, ids) if span.kind == "call" else [self._size] * len(ids)
            self._add(span.kind, span.message, span.part, ids, ends, span.text if span.kind == "call" else "")
        else:
            ids = self._content(span)
        if ids:
            is_marker = not span.plain and ids[-1] in self._tokenizer.added
            self._place = "marker" if is_marker else "text"

    def write_ids(self, kind: Kind, message: int, ids: Sequence[int]) -> None:
        """Write tokens without bytes as they are."""
        self._add(kind, message, 0, ids, [self._size] * len(ids))
        self._place = "marker" if ids[-1] in self._tokenizer.added else "text"

    def _content(self, span: TextSpan) -> list[int]:
        """Write a content; a blank that the tokenizer puts in front of it is of the template."""
        encoded = self._tokenizer.encode(span.text, self._place)
        ids: list[int] = encoded.ids.tolist()
        ends: list[int] = encoded.ends.tolist()
        self._snapped |= encoded.snapped
        lead = len(ids) if span.kind == "template" else next((at for at, end in enumerate(ends) if end), 0)
        if lead:
            self._add("template", -1, 0, ids[:lead], [self._size] * lead)
        if span.kind != "template":
            ends = [self._size + end for end in ends[lead:]]
            self._add(span.kind, span.message, span.part, ids[lead:], ends, span.text)
        return ids

    def _add(
        self, kind: Kind, message: int, part: int, ids: Sequence[int], ends: Sequence[int], text: str = ""
    ) -> None:
        start, first = self._size, len(self._ids)
        self._size += len(text.encode())
        learn = (kind, message) in self._taught
        self._ids += ids
        self._ends += ends
        self._learn += [learn] * len(ids)
        self._texts.append(text)
        self._spans.append(Span(kind, message, part, start, self._size, first, len(self._ids), learn))

    def _stop_at(self, ids: Sequence[int]) -> int | None:
        """Index of the token that ends an answer: the first that is not blank, if it is one."""
        for at, token in enumerate(ids):
            if token in self._stops:
                return at
            if token in self._tokenizer.added and not self._tokenizer.added[token].isspace():
                return None
            if self._tokenizer.table.token(token).strip():
                return None
        return None

    def _call_ends(self, text: str, ids: Sequence[int]) -> list[int]:
        """Byte ends of a call's tokens, its control tokens as wide as they are spelt; all at its end if that fails."""
        added, table = self._tokenizer.added, self._tokenizer.table
        pieces = [added[token].encode() if token in added else table.token(token) for token in ids]
        data, joined = text.encode(), b"".join(pieces)
        space = int(joined[:1] == b" " and data[:1] != b" ")
        if joined[space:] != data:
            self._snapped = True
            return [self._size + len(data)] * len(ids)
        widths = np.cumsum([len(piece) for piece in pieces]) - space
        return [self._size + int(end) for end in widths]

    def tokens(self, absent: tuple[Key, ...], trimmed: tuple[Key, ...], whole: Sequence[int] | None) -> ChatTokens:
        """What was written; ``whole``: the tokens of the whole rendering, if there is one."""
        return ChatTokens(
            "".join(self._texts),
            np.array(self._ids, np.int32),
            np.array(self._ends, np.int32),
            np.array(self._learn, np.bool_),
            tuple(self._spans),
            absent,
            trimmed,
            self._snapped,
            whole is not None and self._ids != list(whole),
        )


def _around(stop: int | None, count: int, answered: int | None) -> list[tuple[Kind, int, slice]]:
    """Kind, message and tokens of the parts of template text that holds a stop at a place, or none."""
    if stop is None or answered is None:
        return [("template", -1, slice(0, count))]
    parts: list[tuple[Kind, int, slice]] = [
        ("template", -1, slice(0, stop)),
        ("stop", answered, slice(stop, stop + 1)),
        ("template", -1, slice(stop + 1, count)),
    ]
    return [part for part in parts if part[2].start < part[2].stop]
