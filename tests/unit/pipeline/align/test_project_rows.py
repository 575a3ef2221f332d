"""The projection for any sparse map against its SQL: collisions, shares, REST, a limit on entries."""

import math
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.align.kernels_project import FATES, MASS_CLASSES, project_rows
from xtoken.pipeline.align.queries import query

SIZE = 60
STAYS, SPREAD, TO_REST, LEFT_OUT = range(len(FATES))


def made_rows(rng: np.random.Generator, rows: int) -> tuple[NDArray[Any], ...]:
    """Rows that sum to 1 with REST, a third of them alone: offsets, ids, log-probabilities, probabilities, REST.

    Probabilities are multiples of a power of two, so that sums are exact and equal ones are equal to the last bit.
    """
    width_R = rng.integers(1, 30, rows)
    offsets = np.concatenate([[0], np.cumsum(width_R)])
    ids = np.concatenate([rng.permutation(SIZE)[:width] for width in width_R]).astype(np.int32)
    parts_R = [rng.multinomial(256, np.full(width + 1, 1 / (width + 1))) for width in width_R]
    parts_R = [np.append(np.maximum(part[:-1], 1), part[-1] * (row % 3 > 0)) for row, part in enumerate(parts_R)]
    p = np.concatenate([np.sort(part[:-1])[::-1] / part.sum() for part in parts_R])
    with np.errstate(divide="ignore"):
        rest = np.log(np.array([part[-1] / part.sum() for part in parts_R]))
    return offsets, ids, np.log(p), p, rest


def made_map(rng: np.random.Generator, nonzeros: int) -> tuple[NDArray[Any], ...]:
    """A map onto few targets, some of them ids that stay: fate, mass class, offsets, targets and shares."""
    fate = rng.choice([STAYS, SPREAD, SPREAD, TO_REST, LEFT_OUT], SIZE).astype(np.int8)
    count = np.where(fate == SPREAD, rng.integers(1, nonzeros + 1, SIZE), 0)
    offsets = np.concatenate([[0], np.cumsum(count)])
    to = rng.integers(0, 12, offsets[-1]).astype(np.int32)
    share = np.concatenate([np.full(n, 1 / n) for n in count if n] or [np.zeros(0)])
    return fate, np.zeros(SIZE, np.int8), offsets, to, share


def sql_targets(rows: tuple[NDArray[Any], ...], made: tuple[NDArray[Any], ...], **params: Any) -> list[tuple[Any, ...]]:
    offsets, ids, logprob, _, rest = rows
    fate, _, starts, to, share = made
    owner = np.repeat(np.arange(SIZE), np.diff(starts))
    pairs = [*zip(owner.tolist(), to.tolist(), share.tolist(), strict=True)]
    pairs += [(int(token), int(token), 1.0) for token in np.flatnonzero(fate == STAYS)]
    pairs += [(int(token), None, 1.0) for token in np.flatnonzero(fate == TO_REST)]
    teacher_id, to_id, shares = zip(*pairs, strict=True)
    chunk = np.repeat(np.arange(len(rest)), np.diff(offsets))
    with duckdb.connect() as connection:
        connection.register("entries", pa.table({"chunk": chunk, "teacher_id": ids, "logprob": logprob}))
        connection.register("rest", pa.table({"chunk": np.arange(len(rest)), "logprob": rest}))
        columns = {"teacher_id": teacher_id, "to_id": pa.array(to_id, pa.int64()), "share": shares}
        connection.register("map", pa.table(columns))
        found: list[tuple[Any, ...]] = connection.execute(query("project"), params).fetchall()
    return found


def as_rows(targets: tuple[NDArray[Any], ...], closed: bool) -> list[tuple[int, int | None, float]]:
    count, ids, logprob, rest, _ = targets
    found: list[tuple[int, int | None, float]] = []
    at = 0
    for chunk, entries in enumerate(count.tolist()):
        found += [(chunk, int(ids[i]), float(logprob[i])) for i in range(at, at + entries)]
        found += [] if closed else [(chunk, None, float(rest[chunk]))]
        at += entries
    return found


@pytest.mark.parametrize("nonzeros", [1, 4])
@pytest.mark.parametrize("most", [1, 5, 100])
@pytest.mark.parametrize("closed", [False, True])
def test_any_map_is_what_the_sql_says(nonzeros: int, most: int, closed: bool) -> None:
    rng = np.random.default_rng(nonzeros * 1000 + most)
    rows, made = made_rows(rng, 60), made_map(rng, nonzeros)
    mine = as_rows(project_rows(np.arange(60), *rows, *made, closed, most), closed)
    theirs = sql_targets(rows, made, entries=most, closed=closed)
    # a chunk whose mass was all left out has no target: REST alone, which SQL has no row for
    theirs += [(chunk, None, 0.0) for chunk in range(60) if not closed and chunk not in {row[0] for row in theirs}]
    expected = _cells(theirs)
    assert _cells(mine) == pytest.approx(expected, abs=2e-6)
    assert len(expected) > 50


def _cells(found: list[tuple[Any, ...]]) -> dict[tuple[int, int | None], float]:
    """Log-probabilities by chunk and target; a REST of nothing is not a cell."""
    return {(chunk, to_id): logprob for chunk, to_id, logprob in found if logprob > -math.inf}


def test_entries_come_in_order_and_ties_by_id() -> None:
    rng = np.random.default_rng(7)
    rows, made = made_rows(rng, 200), made_map(rng, 3)
    count, ids, logprob, _, _ = project_rows(np.arange(200), *rows, *made, False, 100)
    for first, last in zip(np.cumsum(count) - count, np.cumsum(count), strict=True):
        pairs = list(zip((-logprob[first:last]).tolist(), ids[first:last].tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert len({token for _, token in pairs}) == len(pairs)


def test_mass_is_counted_by_class_before_anything_moves() -> None:
    rng = np.random.default_rng(3)
    rows, made = made_rows(rng, 50), made_map(rng, 2)
    classes = rng.integers(0, len(MASS_CLASSES) - 1, SIZE).astype(np.int8)
    mass = project_rows(np.arange(50), *rows, made[0], classes, *made[2:], False, 3)[4]
    offsets, ids, _, p, rest = rows
    for row in range(50):
        span = slice(offsets[row], offsets[row + 1])
        expected = np.bincount(classes[ids[span]], weights=p[span], minlength=len(MASS_CLASSES))
        expected[-1] += math.exp(rest[row])
        assert mass[row] == pytest.approx(expected, abs=1e-12)
    assert mass.sum(axis=1) == pytest.approx(np.ones(50))
