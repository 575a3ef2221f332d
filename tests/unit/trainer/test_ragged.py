"""The ragged record: slices of what was joined are what went in, and columns are views."""

from typing import Any

import numpy as np
import pytest

from xtoken.trainer.ragged import Columns, Ragged, running

SPEC = Columns(
    chunk=("count", "rest"), token=("each", "many"), entries={"count": ("ids", "logprob"), "many": ("child",)}
)


def record(rng: np.random.Generator, positions: int) -> Ragged[Any]:
    """Chunks of one or two of the ``positions``, the last position in none of them."""
    starts = np.unique(rng.integers(0, positions - 1, 4))
    length = np.minimum(np.diff(starts, append=positions - 1), 2)
    following = np.where(np.arange(len(starts)) < len(starts) - 1, starts + length, -1)
    count, many = rng.integers(0, 4, len(starts)).astype(np.int32), rng.integers(0, 3, positions).astype(np.int32)
    columns = {
        "count": count,
        "rest": rng.normal(size=len(starts)).astype(np.float32),
        "each": rng.integers(0, 9, positions),
        "many": many,
        "ids": rng.integers(0, 9, count.sum()).astype(np.int32),
        "logprob": rng.normal(size=count.sum()).astype(np.float32),
        "child": rng.normal(size=many.sum()),
    }
    return Ragged(starts, length, following, columns, SPEC)


def same(one: Ragged[Any], other: Ragged[Any]) -> None:
    for name in ("first_C", "length_C", "next_C"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert set(one.columns) == set(other.columns) == set(SPEC.names)
    for name in SPEC.names:
        np.testing.assert_array_equal(one.columns[name], other.columns[name], err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_a_slice_of_what_was_joined_is_the_part(seed: int) -> None:
    rng, positions = np.random.default_rng(seed), np.array([9, 5, 12, 6])
    parts = [record(rng, size) for size in positions.tolist()]
    whole = Ragged.concat(parts, positions, SPEC)
    for part, low, high in zip(parts, running(positions)[:-1], running(positions)[1:], strict=True):
        same(whole.slice(int(low), int(high)), part)


def test_a_part_without_chunks_takes_its_positions_alone() -> None:
    rng = np.random.default_rng(0)
    one, other = record(rng, 8), record(rng, 7)
    whole = Ragged.concat([one, Ragged.empty(SPEC, 5), other], np.array([8, 5, 7]), SPEC)
    same(whole.slice(13, 20), other)
    gap = whole.slice(8, 13)
    assert len(gap.first_C) == len(gap.columns["count"]) == len(gap.columns["ids"]) == 0
    assert gap.columns["each"].tolist() == gap.columns["many"].tolist() == [0] * 5


def test_shifting_moves_places_and_keeps_no_place() -> None:
    one = record(np.random.default_rng(1), 10)
    moved = one.shifted(3)
    np.testing.assert_array_equal(moved.first_C, one.first_C + 3)
    assert moved.next_C[-1] == one.next_C[-1] == -1, "nothing follows, wherever it stands"
    np.testing.assert_array_equal(moved.next_C[:-1], one.next_C[:-1] + 3)
    assert moved.columns is one.columns
    same(moved.shifted(-3), one)


def test_a_slice_copies_counts_alone() -> None:
    one = record(np.random.default_rng(2), 12)
    piece = one.slice(0, 12)
    for name in SPEC.names:
        counts = name in SPEC.entries
        assert np.shares_memory(piece.columns[name], one.columns[name]) != counts, name
        assert not counts or piece.columns[name].dtype == np.int64
