"""Chunk boundaries: against a plain set intersection, against the SQL, and at the awkward ends."""

from collections.abc import Sequence
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import cut
from xtoken.pipeline.align.kernels import boundaries
from xtoken.pipeline.align.queries import query

ENDS = st.lists(st.integers(0, 40), max_size=30).map(sorted)


def _ends(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def _plain(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """A byte above 0 at which both sides end a token; of tokens that end there the last one counts."""
    common = sorted((set(student) & set(teacher)) - {0})
    return [
        (
            max(i for i, end in enumerate(student) if end == byte) + 1,
            max(i for i, end in enumerate(teacher) if end == byte) + 1,
        )
        for byte in common
    ]


@given(ENDS, ENDS)
@settings(max_examples=500, deadline=None)
def test_walk_is_the_set_intersection(student: list[int], teacher: list[int]) -> None:
    s_end, t_end = boundaries(_ends(student), _ends(teacher))
    assert list(zip(s_end.tolist(), t_end.tolist(), strict=True)) == _plain(student, teacher)


@given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_sql_cuts_the_same_spans(samples: list[tuple[list[int], list[int]]]) -> None:
    expected = []
    for doc, (student, teacher) in enumerate(samples):
        chunks = cut(_ends(student), _ends(teacher), student_eos=False, teacher_eos=False)
        spans = list(zip(_spans(chunks.student_end), _spans(chunks.teacher_end), strict=True))[
            int(chunks.gap[:1].sum()) :
        ]
        expected += [(doc, *s, *t) for s, t in spans]
    assert _sql_cut(samples) == expected


def _spans(end: NDArray[np.int32]) -> list[tuple[int, int]]:
    return list(pairwise([0, *end.tolist()]))


def _sql_cut(samples: list[tuple[list[int], list[int]]]) -> list[tuple[int, ...]]:
    schema = pa.schema([("doc", pa.int32()), ("pos", pa.int32()), ("end_byte", pa.int32())])
    with duckdb.connect() as connection:
        for side, name in enumerate(("student", "teacher")):
            rows = [
                {"doc": doc, "pos": pos, "end_byte": end}
                for doc, both in enumerate(samples)
                for pos, end in enumerate(both[side])
            ]
            connection.register(name, pa.Table.from_pylist(rows, schema))
        found: list[tuple[int, ...]] = connection.execute(query("cut")).fetchall()
    return found


@pytest.mark.parametrize(
    ("student", "teacher", "eos", "expected"),
    [
        # "ab", "c" against "a", "bc": one chunk
        ([2, 3], [1, 3], (False, False), [(2, 2)]),
        # eos on both sides is a chunk of its own
        ([2, 3, 3], [3, 3], (True, True), [(2, 1), (3, 2)]),
        # on one side only it has no counterpart
        ([2, 3, 3], [3], (True, False), [(2, 1)]),
        ([2, 3], [3, 3], (False, True), [(2, 1)]),
        # what lies after the last common boundary is dropped, and eos after it has no chunk
        ([2, 3], [2, 4], (False, False), [(1, 1)]),
        ([2, 3, 3], [2, 4, 4], (True, True), [(1, 1)]),
        # a zero-width first token is set aside in a chunk of its own
        ([0, 2, 3], [2, 3], (False, False), [(1, 0), (2, 1), (3, 2)]),
        ([2, 3, 3], [0, 2, 3, 3], (True, True), [(0, 1), (1, 2), (2, 3), (3, 4)]),
        # a snapped block: the boundary stands after its last token
        ([1, 4, 4, 4, 5], [1, 2, 4, 5], (False, False), [(1, 1), (4, 3), (5, 4)]),
        # nothing but eos
        ([0], [0], (True, True), [(1, 1)]),
        ([], [], (False, False), []),
    ],
)
def test_ends(student: list[int], teacher: list[int], eos: tuple[bool, bool], expected: list[tuple[int, int]]) -> None:
    chunks = cut(_ends(student), _ends(teacher), student_eos=eos[0], teacher_eos=eos[1])
    assert list(zip(chunks.student_end.tolist(), chunks.teacher_end.tolist(), strict=True)) == expected


def test_one_to_one_leaves_the_set_aside_chunk_out() -> None:
    chunks = cut(_ends([0, 1, 3]), _ends([0, 1, 2, 3]), student_eos=False, teacher_eos=False)
    assert chunks.gap.tolist() == [True, *[False] * (len(chunks.gap) - 1)]
    assert chunks.one_to_one == 1


def test_decreasing_ends_are_a_defect() -> None:
    with pytest.raises(AssertionError, match="must not decrease"):
        cut(_ends([2, 1]), _ends([1, 2]), student_eos=False, teacher_eos=False)
