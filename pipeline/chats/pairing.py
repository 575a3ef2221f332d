"""The spans of one conversation in two models' renderings: which are the same, and where the student's tokens lie.

Spans are matched by kind, message and part, never by their bytes alone: several may have none at one place. The byte
axis is the teacher's. Shapes: S student tokens of a sample.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats.conversation import Conversation
from xtoken.pipeline.chats.encode import Span
from xtoken.pipeline.chats.slots import slots_of, with_texts
from xtoken.pipeline.chats.spans import Key

Reason = Literal["absent", "other bytes", "out of order", "not taught"]


class Spanned(Protocol):
    """A sample as one model reads it: ``ChatTokens``, or what a capture says of one."""

    @property
    def text(self) -> str:
        """Its byte axis."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """In order; together all tokens and all bytes."""
        ...


@dataclass(frozen=True)
class Match:
    """The same span of both: of the same bytes, or a stop or marker of both.

    Chunks lie within its token ranges, in order, and end where both have a token end, counted in bytes from the span's
    starts; a stop, a marker and a span without bytes are one chunk of all their tokens, if both have some.
    """

    teacher: Span
    student: Span

    @property
    def taught(self) -> bool:
        """Whether it gives chunks."""
        return self.teacher.learn and self.student.learn


@dataclass(frozen=True)
class Pairing:
    """What two renderings share.

    Attributes:
        matches: in the order of both.
        lost: what the teacher would teach and the student has not, or not at its place.
        alone: what the student learns from its own text alone.
    """

    matches: tuple[Match, ...]
    lost: tuple[tuple[Key, Reason], ...]
    alone: tuple[Key, ...]


def pair(teacher: Spanned, student: Spanned) -> Pairing:
    """Match the spans of a teacher's rendering with those of a student's."""
    texts = teacher.text.encode(), student.text.encode()
    theirs: dict[Key, Span] = {}
    for span in student.spans:
        theirs.setdefault(span.key, span)
    matches: list[Match] = []
    lost: list[tuple[Key, Reason]] = []
    own = [span for span in teacher.spans if span.kind != "template"]
    # what is taught comes first: a question that the student's template moves must not displace answers
    for span in sorted(own, key=lambda one: (not one.learn, one.token_start)):
        reason = _place(span, theirs.get(span.key), texts, matches)
        if reason is not None and span.learn:
            lost.append((span.key, reason))
    kept = {match.student.key for match in matches if match.taught}
    return Pairing(
        tuple(matches), tuple(lost), tuple(span.key for span in student.spans if span.learn and span.key not in kept)
    )


def _place(span: Span, other: Span | None, texts: tuple[bytes, bytes], matches: list[Match]) -> Reason | None:
    """Put a match where it belongs; else why there is none."""
    if other is None:
        return "absent"
    first = texts[0][span.byte_start : span.byte_end]
    if first != texts[1][other.byte_start : other.byte_end]:
        return "other bytes"
    at = bisect_left(matches, _tokens(span), key=lambda match: _tokens(match.teacher))
    before, after = matches[at - 1 : at] if at else [], matches[at : at + 1]
    if any(match.student.token_end > other.token_start for match in before) or any(
        match.student.token_start < other.token_end for match in after
    ):
        return "out of order"
    matches.insert(at, Match(span, other))
    return None if other.learn or not span.learn else "not taught"


def _tokens(span: Span) -> tuple[int, int]:
    return span.token_start, span.token_end


def as_written(conversation: Conversation, teacher: Spanned) -> Conversation:
    """The conversation with its contents as the teacher's template writes them, trimmed where it trims.

    What is rendered for a student: its bytes are the teacher's where the student's template leaves blanks alone.
    """
    data = teacher.text.encode()
    slots = [slot.key for slot in slots_of(conversation)]
    there = {span.key: data[span.byte_start : span.byte_end].decode() for span in teacher.spans}
    return with_texts(conversation, {key: there[key] for key in slots if key in there})


def on_axis(pairing: Pairing, ends_S: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ends of the student's tokens on the teacher's byte axis, int32 [S].

    In spans that are not matched, and in the template, they stay at the place reached.

    Args:
        pairing: of both.
        ends_S: their ends on the student's own axis.
    """
    axis = np.zeros(len(ends_S), np.int32)
    for match in pairing.matches:
        mine, theirs = match.student, match.teacher
        part = slice(mine.token_start, mine.token_end)
        axis[part] = ends_S[part] - mine.byte_start + theirs.byte_start
        axis[mine.token_end :] = theirs.byte_end
    return axis


def span_columns(spans: Sequence[Span]) -> dict[str, list[Any]]:
    """Spans as a capture stores them; a start is the end before."""
    return {
        "span_kind": [span.kind for span in spans],
        "span_byte_end": [span.byte_end for span in spans],
        "span_token_end": [span.token_end for span in spans],
        "span_message": [span.message for span in spans],
        "span_part": [span.part for span in spans],
        "span_learn": [span.learn for span in spans],
    }


def spans_of(columns: dict[str, list[Any]]) -> tuple[Span, ...]:
    """Inverse of ``span_columns``."""
    rows = zip(*(columns[name] for name in span_columns([])), strict=True)
    spans, byte, token = [], 0, 0
    for kind, byte_end, token_end, message, part, learn in rows:
        spans.append(Span(kind, message, part, byte, byte_end, token, token_end, learn))
        byte, token = byte_end, token_end
    return tuple(spans)
