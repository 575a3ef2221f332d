"""Turns and boxes of a conversation's page: worked by hand, and what must hold of any."""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.page.turns import Box, Span, chunks_as_boxes, spans_of, tokens_as_boxes, turns

# <s> user \n | When ? | </s> <s> bot \n | In 2026 . | </s> | \n
ROW: dict[str, Any] = {
    "span_kind": ["template", "user", "template", "assistant", "stop", "template"],
    "span_message": [-1, 0, -1, 1, 1, -1],
    "span_learn": [False, False, False, True, True, False],
    "span_byte_end": [0, 5, 5, 13, 13, 13],
    "span_token_end": [3, 5, 9, 12, 13, 14],
}
TEACHER = [0, 0, 0, 4, 5, 5, 5, 5, 5, 7, 12, 13, 13, 13]
# the student's template is shorter, its tokens of the answer are others, and it ends the question at the same bytes
STUDENT = [0, 4, 5, 5, 5, 7, 10, 12, 13, 13]
CHUNKS = [(9, 5, False), (10, 6, True), (11, 8, True), (12, 9, True), (13, 10, True)]


def test_boxes_of_targets() -> None:
    boxes = chunks_as_boxes(spans_of(ROW), TEACHER, CHUNKS, STUDENT)
    assert boxes == [
        Box(3, 1, -1, 0),  # both templates
        Box(4, 2, -1, 1),  # When
        Box(5, 3, -1, 1),  # ?
        Box(9, 5, -1, 2),
        Box(10, 6, 1, 3),
        Box(11, 8, 2, 3),
        Box(12, 9, 3, 3),
        Box(13, 10, 4, 4),
        Box(14, 10, -1, 5),  # behind the last chunk; the student's template writes nothing there
    ]


def test_boxes_of_a_capture_are_its_tokens() -> None:
    boxes = tokens_as_boxes(spans_of(ROW))
    assert [box.teacher_end for box in boxes] == list(range(1, 15))
    assert [box.chunk for box in boxes] == [-1] * 9 + [9, 10, 11, 12] + [-1]
    assert [box.span for box in boxes] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5]


def test_what_the_student_has_not_has_no_tokens_of_it() -> None:
    # the student's template leaves the question out: its ends stay at byte 0 until the answer begins at 5
    student = [0, 5, 7, 12, 13, 13]
    chunks = [(9, 2, False), (10, 3, True), (11, 4, True), (12, 5, True), (13, 6, True), (14, 6, False)]
    boxes = chunks_as_boxes(spans_of(ROW), TEACHER, chunks, student)
    assert boxes[:3] == [Box(3, 1, -1, 0), Box(5, 2, -1, 1), Box(9, 2, -1, 2)]
    assert boxes[-1] == Box(14, 6, -1, 5)


def test_what_only_the_student_has_stands_in_a_box_of_its_own() -> None:
    # the student thinks aloud before the answer, where the teacher's template has nothing
    spans = [Span("user", 0, False, 0, 2, 0, 1), Span("assistant", 1, True, 2, 4, 1, 3)]
    boxes = chunks_as_boxes(
        spans, [2, 3, 4], [(1, 1, False), (1, 4, False), (2, 5, True), (3, 6, True)], [2, 2, 2, 2, 3, 4]
    )
    assert boxes == [Box(1, 1, -1, 0), Box(1, 4, -1, 1), Box(2, 5, 2, 1), Box(3, 6, 3, 1)]


def test_turns() -> None:
    found = turns(spans_of(ROW))
    assert [(turn["role"], turn["message"], turn["taught"], turn["spans"]) for turn in found] == [
        ("template", -1, False, [0, 1]),
        ("user", 0, False, [1, 2]),
        ("template", -1, False, [2, 3]),
        ("assistant", 1, True, [3, 5]),
        ("template", -1, False, [5, 6]),
    ]


def test_template_within_a_message_is_of_its_turn() -> None:
    kinds = ["template", "call", "template", "call", "stop", "template", "result", "template"]
    messages = [-1, 1, -1, 1, 1, -1, 2, -1]
    spans = [
        Span(kind, message, kind in ("call", "stop"), at, at, at, at + 1)
        for at, (kind, message) in enumerate(zip(kinds, messages, strict=True))
    ]
    assert [(turn["role"], turn["spans"]) for turn in turns(spans)] == [
        ("template", [0, 1]),
        ("assistant", [1, 5]),
        ("template", [5, 6]),
        ("tool", [6, 7]),
        ("template", [7, 8]),
    ]


@st.composite
def targets(draw: st.DrawFn) -> tuple[list[Span], list[int], list[tuple[int, int, bool]], list[int]]:
    """Spans of a teacher, its ends, chunks and a student's ends, as align makes them: gaps between taught spans."""
    spans: list[Span] = []
    teacher, student = [0], [0]
    chunks: list[tuple[int, int, bool]] = []
    for message in range(draw(st.integers(1, 4))):
        for kind, learn in (("template", False), ("user", False), ("template", False), ("assistant", True)):
            first, start = len(teacher), teacher[-1]
            size = draw(st.integers(1, 6)) if kind in ("user", "assistant") else 0
            for side in (teacher, student):
                inner = sorted(draw(st.lists(st.integers(start, start + size), max_size=4)))
                if learn or size or draw(st.booleans()):
                    side += [*inner, start + size]
            if len(teacher) == first:
                teacher.append(start + size)
            spans.append(Span(kind, message, learn, start, start + size, first - 1, len(teacher) - 1))
            if learn:
                chunks.append((len(teacher) - 1, len(student) - 1, True))
            else:
                chunks.append((len(teacher) - 1, len(student) - 1, False))
    return spans, teacher[1:], chunks, student[1:]


@given(made=targets())
def test_boxes_partition_both_sides_and_keep_every_chunk(
    made: tuple[list[Span], list[int], list[tuple[int, int, bool]], list[int]],
) -> None:
    spans, teacher, chunks, student = made
    boxes = chunks_as_boxes(spans, teacher, chunks, student)
    for before, box in pairwise([Box(0, 0, -1, 0), *boxes]):
        assert before.teacher_end <= box.teacher_end
        assert before.student_end <= box.student_end
        assert before[:2] != box[:2], "no box is empty"
        assert before.span <= box.span
        span = spans[box.span]
        assert span.token_start <= before.teacher_end <= box.teacher_end <= span.token_end
    assert (boxes[-1].teacher_end, boxes[-1].student_end) == (len(teacher), len(student))
    taught = [box for box in boxes if box.chunk >= 0]
    assert [(box.teacher_end, box.student_end) for box in taught] == [chunk[:2] for chunk in chunks if chunk[2]]
    assert [chunks[box.chunk][:2] for box in taught] == [(box.teacher_end, box.student_end) for box in taught]
    assert np.diff([turn["spans"][0] for turn in turns(spans)]).min(initial=1) > 0
