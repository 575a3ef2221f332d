"""A conversation as its page draws it: boxes of both sides' tokens, and the turns that they stand in.

What is taught is a box for each chunk of its targets. A gap between such chunks is cut for the eye alone: at the
spans of the teacher's template, and in a content where both sides end a token at one byte.

Shapes: T teacher tokens, S student tokens, G spans.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

_ROLES = {
    "template": "template",
    "text": "text",
    "system": "system",
    "user": "user",
    "result": "tool",
    "assistant": "assistant",
    "thinking": "assistant",
    "marker": "assistant",
    "call": "assistant",
    "stop": "assistant",
}


@dataclass(frozen=True)
class Span:
    """One span of the teacher's rendering (``xtoken.schemas.tables``)."""

    kind: str
    message: int
    learn: bool
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int


class Box(NamedTuple):
    """What stands together on the page: the index after its last token on either side.

    Attributes:
        chunk: of the targets; -1: not taught, no target.
        span: the teacher's span it is of.
    """

    teacher_end: int
    student_end: int
    chunk: int
    span: int


def spans_of(row: dict[str, Any]) -> list[Span]:
    """The spans of a sample of a capture."""
    places = (pairwise([0, *row[name]]) for name in ("span_byte_end", "span_token_end"))
    columns = zip(row["span_kind"], row["span_message"], row["span_learn"], *places, strict=True)
    return [Span(kind, message, learn, *in_bytes, *in_tokens) for kind, message, learn, in_bytes, in_tokens in columns]


def turns(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Who speaks, and in which spans: a message of several spans is one turn, with the template between them."""
    owner, found = [span.message for span in spans], []
    for at, span in enumerate(spans):
        around = {owner[at - 1] if at else -1, spans[at + 1].message if at + 1 < len(spans) else -1}
        if span.message < 0 and len(around) == 1:
            owner[at] = around.pop()
    for message, group in groupby(range(len(spans)), lambda at: owner[at]):
        inside = list(group)
        role = next((_ROLES[spans[at].kind] for at in inside if spans[at].message >= 0), _ROLES["template"])
        taught = any(spans[at].learn for at in inside)
        found.append({"role": role, "message": message, "taught": taught, "spans": [inside[0], inside[-1] + 1]})
    return found


def tokens_as_boxes(spans: Sequence[Span]) -> list[Box]:
    """Of a capture alone each token stands for itself."""
    of_token = [at for at, span in enumerate(spans) for _ in range(span.token_start, span.token_end)]
    return [Box(token + 1, 0, token if spans[at].learn else -1, at) for token, at in enumerate(of_token)]


def chunks_as_boxes(
    spans: Sequence[Span],
    teacher_end: Sequence[int],
    chunks: Sequence[tuple[int, int, bool]],
    student_end: Sequence[int],
) -> list[Box]:
    """Boxes of a sample of targets.

    Args:
        spans: of the teacher.
        teacher_end: [T] cumulative byte ends.
        chunks: index after the last teacher and the last student token of each, and whether it has a target; what lies
            behind the last one is a gap.
        student_end: [S] cumulative byte ends on the same axis.
    """
    of_token = [at for at, span in enumerate(spans) for _ in range(span.token_start, span.token_end)]
    sides = (0, 0)
    boxes: list[Box] = []
    for chunk, (teacher, student, has_target) in enumerate([*chunks, (len(teacher_end), len(student_end), False)]):
        if has_target:
            boxes.append(Box(teacher, student, chunk, of_token[sides[0]]))
        elif (teacher, student) != sides:
            boxes += _gap(spans, teacher_end, student_end, sides, (teacher, student))
        sides = teacher, student
    return boxes


def _gap(
    spans: Sequence[Span],
    teacher_end: Sequence[int],
    student_end: Sequence[int],
    start: tuple[int, int],
    stop: tuple[int, int],
) -> Iterator[Box]:
    """The boxes between two pairs of tokens."""
    inside = [at for at, span in enumerate(spans) if span.token_start < stop[0] and span.token_end > start[0]]
    if not inside:  # only the student has tokens here
        behind = next((at for at, span in enumerate(spans) if span.token_start >= start[0]), len(spans) - 1)
        yield Box(*stop, -1, behind)
        return
    last = start[1]
    for at, student in zip(inside, _students(spans, inside, student_end, start[1], stop[1]), strict=True):
        first = max(spans[at].token_start, start[0])
        teacher = min(spans[at].token_end, stop[0])
        yield from (Box(*both, -1, at) for both in _cut(teacher_end, student_end, (first, last), (teacher, student)))
        last = student


def _students(
    spans: Sequence[Span], inside: Sequence[int], student_end: Sequence[int], first: int, stop: int
) -> list[int]:
    """For each span of a gap, the index after its last student token, by where that ends on the axis."""
    ends, now, before = [first] * len(inside), 0, student_end[first - 1] if first else 0
    for token in range(first, stop):
        end = student_end[token]
        if end > before:
            while now + 1 < len(inside) and spans[inside[now]].byte_end < end:
                now += 1
        elif spans[inside[now]].byte_end > spans[inside[now]].byte_start and before >= spans[inside[now]].byte_end:
            now = min(now + 1, len(inside) - 1)
        ends[now] = token + 1
        before = end
    for at in range(1, len(ends)):
        ends[at] = max(ends[at], ends[at - 1])
    ends[-1] = stop
    return ends


def _cut(
    teacher_end: Sequence[int], student_end: Sequence[int], start: tuple[int, int], stop: tuple[int, int]
) -> list[tuple[int, int]]:
    """Where both sides end a token at the same byte, and the end."""
    theirs = {teacher_end[at]: at + 1 for at in range(start[0], stop[0])}
    ours = {student_end[at]: at + 1 for at in range(start[1], stop[1])}
    common = [(theirs[byte], ours[byte]) for byte in sorted(theirs.keys() & ours.keys())][:-1]
    return [*common, stop]
