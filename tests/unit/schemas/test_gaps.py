"""Log-probabilities in steps: compiled passes against plain loops, by hand, and what rounding may cost."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xtoken.schemas.gaps import MOST, NO_TAIL, TAIL_UNKNOWN, from_gaps, probabilities, to_gaps

STEP = 1 / 32
FLOAT32 = 2e-6  # float32 log-probabilities of a few nats are off by less


def nearest(value: float) -> int:
    return math.floor(value + 0.5)


def slow_encode(logprobs: list[float], tail: float, step: float) -> tuple[list[int], int]:
    """One target, as ``gaps.py`` describes it, without its bounds."""
    first = logprobs[0] if logprobs else 0.0
    base = max(0, nearest(-first / step))
    levels = [base + nearest((first - value) / step) for value in logprobs]
    gaps = [level - before for level, before in zip(levels, [0, *levels], strict=False)]
    if math.isnan(tail):
        return gaps, TAIL_UNKNOWN
    return gaps, NO_TAIL if tail == -math.inf else max(0, base + nearest((first - tail) / step))


def slow_decode(gaps: list[int], tail: int, step: float, *, whole: bool) -> tuple[list[float], float]:
    """One target, as ``gaps.py`` describes it."""
    logprobs, level = [], 0
    for gap in gaps:
        level += gap
        logprobs.append(-level * step)
    rest = {NO_TAIL: -math.inf, TAIL_UNKNOWN: math.nan}.get(tail, -tail * step)
    if not gaps or not whole:
        return logprobs, rest
    cells = [*logprobs, *([] if math.isnan(rest) else [rest])]
    top = max(cells)
    scale = top + math.log(math.fsum(math.exp(cell - top) for cell in cells))
    return [value - scale for value in logprobs], rest - scale


def arrays(targets: list[tuple[list[float], float]]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    counts = np.array([len(values) for values, _ in targets], np.int32)
    flat = np.array([value for values, _ in targets for value in values], np.float32)
    return counts, flat, np.array([tail for _, tail in targets], np.float32)


def test_by_hand() -> None:
    """1/2, 1/4, 1/8 and REST 1/8 lie 22.18, 44.36 and 66.54 steps down; the distances are 22.18 each."""
    p = math.log(0.5), math.log(0.25), math.log(0.125)
    count, flat, tail = arrays([(list(p), p[2]), ([], 0.0), ([0.0], -math.inf)])
    gap, tail_gap, bad = to_gaps(count, flat, tail, STEP)
    assert gap.tolist() == [22, 22, 22, 0]
    assert tail_gap.tolist() == [66, 0, NO_TAIL]
    assert bad == -1
    total = math.exp(-22 / 32) + math.exp(-44 / 32) + 2 * math.exp(-66 / 32)
    logprob, rest = from_gaps(count, gap, tail_gap, STEP, probabilities(STEP), True)
    wanted = [-steps / 32 - math.log(total) for steps in (22, 44, 66)]
    assert logprob.tolist() == pytest.approx([*wanted, 0.0], abs=FLOAT32)
    assert rest.tolist() == pytest.approx([wanted[2], 0.0, -math.inf], abs=FLOAT32)
    logprob, rest = from_gaps(count, gap, tail_gap, STEP, probabilities(STEP), False)
    assert logprob.tolist() == [-22 / 32, -44 / 32, -66 / 32, 0.0]
    assert rest.tolist() == [-66 / 32, 0.0, -math.inf]


TAILS = st.one_of(st.floats(-30, 0), st.sampled_from([-math.inf, math.nan]))
TARGET = st.tuples(st.lists(st.floats(-70, 0), max_size=40).map(lambda values: sorted(values, reverse=True)), TAILS)


@settings(max_examples=200, deadline=None)
@given(st.lists(TARGET, max_size=8), st.sampled_from([STEP, 1 / 1024]), st.booleans())
def test_compiled_passes_are_the_plain_ones(targets: list[tuple[list[float], float]], step: float, whole: bool) -> None:
    count, flat, tail = arrays(targets)
    gap, tail_gap, bad = to_gaps(count, flat, tail, step)
    assert bad == -1
    split = np.split(flat.astype(np.float64), np.cumsum(count)[:-1]) if len(count) else []
    coded = [slow_encode(one.tolist(), float(rest), step) for one, rest in zip(split, tail, strict=True)]
    levels = [np.minimum(np.cumsum(gaps), MOST) for gaps, _ in coded]
    assert gap.tolist() == [x for one in levels for x in np.diff(one, prepend=0).tolist()]
    assert tail_gap.tolist() == [
        code if (code > MOST and math.isinf(t)) or math.isnan(t) else min(code, MOST)
        for (_, code), t in zip(coded, tail.tolist(), strict=True)
    ]
    logprob, rest = from_gaps(count, gap, tail_gap, step, probabilities(step), whole)
    gaps = [one.tolist() for one in np.split(gap.astype(int), np.cumsum(count)[:-1])] if len(count) else []
    plain = [slow_decode(one, int(code), step, whole=whole) for one, code in zip(gaps, tail_gap, strict=True)]
    np.testing.assert_allclose(logprob, [x for values, _ in plain for x in values], rtol=3e-7, atol=FLOAT32)
    np.testing.assert_allclose(rest, [value for _, value in plain], rtol=3e-7, atol=FLOAT32)


def grid_targets(seed: int, step: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Rows of a capture, in whole steps, over what they add up to: what most targets are."""
    rng = np.random.default_rng(seed)
    targets = []
    for _ in range(300):
        p = rng.dirichlet(np.full(int(rng.integers(2, 30)), 0.3))
        levels = np.floor(-np.log(np.maximum(p, 1e-12)) / step + 0.5) * -step
        levels -= math.log(np.exp(levels).sum())
        targets.append((np.sort(levels[1:])[::-1].tolist(), float(levels[0])))
    return arrays(targets)


@pytest.mark.parametrize("seed", range(5))
def test_what_lies_on_the_captures_grid_is_not_moved(seed: int) -> None:
    count, flat, tail = grid_targets(seed, STEP)
    gap, tail_gap, _ = to_gaps(count, flat, tail, STEP)
    logprob, rest = from_gaps(count, gap, tail_gap, STEP, probabilities(STEP), True)
    np.testing.assert_allclose(logprob, flat, rtol=3e-7, atol=FLOAT32)
    np.testing.assert_allclose(rest, tail, rtol=3e-7, atol=FLOAT32)


@pytest.mark.parametrize("step", [STEP, 1 / 1024])
def test_rounding_costs_no_more_than_it_says(step: float) -> None:
    """KL of at most step^2 / 8, a distance of at most step / 2 in all, and no value moved by more than a step."""
    rng = np.random.default_rng(7)
    rows = [rng.dirichlet(np.full(int(size), 0.4)) for size in rng.integers(2, 40, 500)]
    with np.errstate(divide="ignore"):
        made = [(np.sort(np.log(p[1:]))[::-1].tolist(), float(np.log(p[0]))) for p in rows]
    count, flat, tail = arrays(made)
    gap, tail_gap, _ = to_gaps(count, flat, tail, step)
    logprob, rest = from_gaps(count, gap, tail_gap, step, probabilities(step), True)
    low, worst = 0, 0.0
    for at, size in enumerate(count.tolist()):
        before = np.append(flat[low : low + size], tail[at]).astype(np.float64)
        after = np.append(logprob[low : low + size], rest[at]).astype(np.float64)
        p, q = np.exp(before), np.exp(after)
        there = p > 1e-25
        kl = float((p[there] * (before - after)[there]).sum())
        worst = max(worst, kl)
        assert kl <= step**2 / 8 + FLOAT32
        assert abs(p - q).sum() <= step / 2 + FLOAT32
        assert abs(before - after)[there].max() <= step + 1e-5
        assert q.sum() == pytest.approx(1, abs=1e-5)
        low += size
    assert worst > step**2 / 200, "nothing was rounded"


def test_what_is_too_small_stands_at_the_end_of_the_scale() -> None:
    count, flat, tail = arrays([([0.0, -1e6, -math.inf], -1e5), ([-1e5, -2e5], -1e-9)])
    gap, tail_gap, bad = to_gaps(count, flat, tail, STEP)
    assert bad == -1
    assert gap.tolist() == [0, MOST, 0, MOST, 0]
    assert tail_gap.tolist() == [MOST, 0]
    logprob, rest = from_gaps(count, gap, tail_gap, STEP, probabilities(STEP), True)
    assert np.exp(logprob).tolist() == [1, 0, 0, 0, 0]
    assert np.exp(rest).tolist() == [0, 1]


@pytest.mark.parametrize("values", [[-1.0, -0.5], [math.nan], [-1.0, math.nan], [2.0], [math.inf, -1.0]])
def test_entries_that_do_not_fall_are_named(values: list[float]) -> None:
    count, flat, tail = arrays([([-0.1], -3.0), (values, -1.0)])
    assert to_gaps(count, flat, tail, STEP)[2] == 1


def test_hostile_gaps_are_numbers_all_the_same() -> None:
    """Whatever a file holds, what is read are probabilities."""
    rng = np.random.default_rng(3)
    count = rng.integers(0, 50, 400).astype(np.int32)
    gap = rng.integers(0, 65536, int(count.sum())).astype(np.uint16)
    tail_gap = rng.integers(0, 65536, 400).astype(np.uint16)
    logprob, rest = from_gaps(count, gap, tail_gap, STEP, probabilities(STEP), True)
    assert (logprob <= 1e-6).all()
    assert (rest[~np.isnan(rest)] <= 1e-6).all()
