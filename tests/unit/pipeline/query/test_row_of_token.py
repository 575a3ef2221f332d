"""The macro that says which tokens have rows, against the function of the schema that says it to all other code."""

from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.query.views import sql
from xtoken.schemas.spans import row_of_token, rows_per_sample

Sample = tuple[int, list[int], list[bool]]  # first_row, tokens of each span, whether it is taught


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with duckdb.connect() as connection:
        connection.execute(sql("macros"))
        yield connection


def batch_of(samples: list[Sample], *, chat: bool) -> pa.RecordBatch:
    """What a capture holds of such samples, of the columns that decide."""
    columns = {
        "teacher_ids": pa.array([[7] * sum(sizes) for _, sizes, _ in samples], pa.list_(pa.int32())),
        "first_row": pa.array([first for first, _, _ in samples], pa.int32()),
    }
    if chat:
        ends = [np.cumsum(sizes).tolist() for _, sizes, _ in samples]
        columns["span_token_end"] = pa.array(ends, pa.list_(pa.int32()))
        columns["span_learn"] = pa.array([learn for *_, learn in samples], pa.list_(pa.bool_()))
    return pa.RecordBatch.from_pydict(columns)


def by_sql(session: Any, samples: list[Sample]) -> list[list[int | None]]:
    """Rows of the tokens of each sample, counted in the sample."""
    found = []
    for first, sizes, learn in samples:
        ends = np.cumsum(sizes).tolist()
        asked = "SELECT row_of_token($1, $2::INTEGER[], $3::BOOLEAN[])"
        found.append(session.execute(asked, [first, ends, learn]).fetchone()[0])
    return found


def by_schema(batch: pa.RecordBatch) -> list[list[int | None]]:
    """The same by the schema's function, which counts over the batch."""
    rows_T, tokens_N = row_of_token(batch), [len(ids) for ids in batch["teacher_ids"].to_pylist()]
    before_N = np.cumsum(rows_per_sample(batch)) - rows_per_sample(batch)
    split = np.split(rows_T, np.cumsum(tokens_N)[:-1])
    return [
        [None if row < 0 else int(row - before) for row in rows] for rows, before in zip(split, before_N, strict=True)
    ]


@st.composite
def a_sample(draw: st.DrawFn, spans: int = 6) -> Sample:
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=spans).filter(sum))
    return draw(st.integers(0, 1)), sizes, [draw(st.booleans()) for _ in sizes]


@given(samples=st.lists(a_sample(), min_size=1, max_size=4))
def test_conversations(session: Any, samples: list[Sample]) -> None:
    assert by_sql(session, samples) == by_schema(batch_of(samples, chat=True))


@given(first=st.integers(0, 1), tokens=st.integers(1, 40))
def test_plain_text_is_one_taught_span(session: Any, first: int, tokens: int) -> None:
    samples = [(first, [tokens], [True])]
    assert by_sql(session, samples) == by_schema(batch_of(samples, chat=False))


def test_worked_by_hand(session: Any) -> None:
    # a header, an answer, its end; a taught first token has no row, and rows are counted on without it
    assert by_sql(session, [(1, [2, 3, 1, 1], [False, True, True, False])]) == [[None, None, 0, 1, 2, 3, None]]
    assert by_sql(session, [(1, [2, 1, 2], [True, False, True])]) == [[None, 0, None, 1, 2]]
    assert by_sql(session, [(0, [2, 1, 2], [True, False, True])]) == [[0, 1, None, 2, 3]]


def test_numbers_to_elements_and_back(session: Any) -> None:
    rows = "row_of_token(1, [2, 4, 5], [false, true, true])"
    assert session.execute(f"SELECT taken(['a', 'b', 'c'], {rows})").fetchone()[0] == [None, None, "a", "b", "c"]
    assert session.execute(f"SELECT token_of_row({rows})").fetchone()[0] == [2, 3, 4]
