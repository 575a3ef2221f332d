"""The spans of one conversation in two models' renderings: which are the same, and where the student's tokens lie.

Spans are matched by kind, message and part, never by their bytes alone: several may have none at one place. Where one
template trims a content and the other does not, what both have of it is matched. The byte axis is the teacher's.
Shapes: S student tokens and T teacher tokens of a sample.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats.encode import Span
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
    """The same span of both: of the same bytes but for blanks at its ends, or a stop or marker of both.

    Attributes:
        teacher: the teacher's.
        student: the student's.
        teacher_start: byte of the teacher's rendering where what both have begins.
        student_start: the same byte in the student's rendering.
        size: how many bytes both have.
    """

    teacher: Span
    student: Span
    teacher_start: int
    student_start: int
    size: int

    @property
    def taught(self) -> bool:
        """Whether it gives chunks."""
        return self.teacher.learn and self.student.learn

    @property
    def trimmed(self) -> bool:
        """Whether a side has blanks that the other has not."""
        widths = [span.byte_end - span.byte_start for span in (self.teacher, self.student)]
        return widths != [self.size, self.size]


@dataclass(frozen=True, eq=False)
class Part:
    """One side's tokens of what both have of a span.

    Attributes:
        first: index of the first of them in the sample.
        ends: where each ends, in bytes from where the first begins.
    """

    first: int
    ends: NDArray[np.int32]


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
    match = _match(span, other, texts)
    if match is None:
        return "other bytes"
    at = bisect_left(matches, _tokens(span), key=lambda match: _tokens(match.teacher))
    before, after = matches[at - 1 : at] if at else [], matches[at : at + 1]
    if any(match.student.token_end > other.token_start for match in before) or any(
        match.student.token_start < other.token_end for match in after
    ):
        return "out of order"
    matches.insert(at, match)
    return None if other.learn or not span.learn else "not taught"


def _match(span: Span, other: Span, texts: tuple[bytes, bytes]) -> Match | None:
    """What both have of a span; None where they differ in more than blanks at its ends."""
    spans = span, other
    data = [text[one.byte_start : one.byte_end] for one, text in zip(spans, texts, strict=True)]
    if data[0] == data[1]:
        return Match(span, other, span.byte_start, other.byte_start, len(data[0]))
    contents = [one.decode() for one in data]
    inner, same = (one.strip() for one in contents)  # what "trim" of a template does
    if not inner or inner != same:
        return None
    heads, tails = zip(*(one.split(inner, 1) for one in contents), strict=True)
    # of the blanks before and behind, those next to the rest that both have
    before = _alike(*(head[::-1] for head in heads))
    behind = _alike(*tails)
    leads = [len(head[: len(head) - before].encode()) for head in heads]
    size = len((heads[0][len(heads[0]) - before :] + inner + tails[0][:behind]).encode())
    return Match(span, other, span.byte_start + leads[0], other.byte_start + leads[1], size)


def _alike(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    differ = (at for at, (one, two) in enumerate(zip(first, second, strict=False)) if one != two)
    return next(differ, min(len(first), len(second)))


def shared_parts(match: Match, student_end_S: NDArray[np.int32], teacher_end_T: NDArray[np.int32]) -> tuple[Part, Part]:
    """The student's and the teacher's tokens of what both have of a span, from the first place where both have a border
    of tokens to the last; chunks end where both have a token end.

    All tokens of a stop, a marker and a span without bytes end at byte 1: they are one chunk, if both have some. A
    token that holds a blank which one side trims, and a letter, is left out.

    Args:
        match: of a pairing.
        student_end_S, teacher_end_T: ends of all tokens of the sample, each on its own rendering's bytes.
    """
    mine = _part(match.student, match.student_start, student_end_S)
    theirs = _part(match.teacher, match.teacher_start, teacher_end_T)
    if not match.trimmed:
        return mine, theirs
    begins = match.student.byte_start - match.student_start, match.teacher.byte_start - match.teacher_start
    both = np.intersect1d(np.append(begins[0], mine.ends), np.append(begins[1], theirs.ends))
    both = both[(both >= 0) & (both <= match.size)]
    cut = (both[0], both[-1]) if len(both) else (0, 0)
    return _between(mine, *cut), _between(theirs, *cut)


def _part(span: Span, start: int, ends: NDArray[np.int32]) -> Part:
    inside = ends[span.token_start : span.token_end]
    empty = span.byte_start == span.byte_end
    return Part(span.token_start, np.ones_like(inside) if empty else inside - np.int32(start))


def _between(part: Part, start: int, end: int) -> Part:
    """Those of the tokens that lie between two bytes."""
    first, last = np.searchsorted(part.ends, [start, end], side="right").tolist()
    return Part(part.first + first, part.ends[first:last] - np.int32(start))


def _tokens(span: Span) -> tuple[int, int]:
    return span.token_start, span.token_end


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
        ends = ends_S[part] - match.student_start + match.teacher_start
        axis[part] = np.clip(ends, theirs.byte_start, match.teacher_start + match.size)
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
