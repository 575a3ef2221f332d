"""The codec against a slow, obvious one, row by row and number by number."""

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import NO_REST, STEP, Packed, decode, encode
from pipeline.teachers.base import TeacherRows
from schemas.errors import XtokenError

getcontext().prec = 60


def rows_of(ids: list[list[int]], logprob: list[list[float]]) -> TeacherRows:
    values = np.array(logprob, np.float32).reshape(len(logprob), len(logprob[0]) if logprob else 4)
    empty = np.zeros(len(ids), np.float32)
    return TeacherRows(np.array(ids, np.int32).reshape(values.shape), values, empty, empty.astype(np.int32))


def nearest(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def slow_row(ids, logprob, k, min_p, vocab_size):
    """One row in exact arithmetic: (ids, gaps from the running decoded value, rest gap)."""
    usable = [(t, float(x)) for t, x in zip(ids, logprob, strict=True) if t < vocab_size and x != -np.inf]
    floor = math.log(min_p) if min_p > 0 else -math.inf
    kept = [pair for pair in usable if pair[1] >= floor][:k] or usable[:1]
    running, gaps = Fraction(0), []
    for _, value in kept:
        gap = nearest((-Fraction(value) - running) / Fraction(STEP))
        running += gap * Fraction(STEP)
        gaps.append(gap)
    rest = 1 - sum(Decimal(value).exp() for _, value in kept)
    rest_gap = NO_REST if rest <= 0 else math.floor(-rest.ln() / Decimal(STEP) + Decimal("0.5"))
    return [t for t, _ in kept], gaps, rest_gap, float(rest)


@st.composite
def teacher_rows(draw):
    entries = draw(st.integers(1, 12))
    count = draw(st.integers(0, 6))
    sharp = draw(st.floats(0.0, 30.0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = np.round(rng.normal(size=(count, entries + 3)) * sharp, draw(st.integers(0, 4)))
    logprob = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(rng.random((count, 20)), axis=1)
    order = np.argsort(-logprob, axis=1, kind="stable")
    logprob = np.take_along_axis(logprob, order, axis=1)[:, :entries]
    logprob = np.minimum.accumulate(logprob.astype(np.float32), axis=1)
    if draw(st.booleans()) and entries > 1:
        logprob[:, -1] = -np.inf
    ids = ids[:, :entries]
    ids[:, 0] = ids[:, 0] % 10
    for row in ids:  # distinct again
        seen = set()
        for place, value in enumerate(row):
            while value in seen:
                value = (value + 1) % 20
            row[place] = value
            seen.add(value)
    return rows_of(ids.tolist(), logprob.tolist()) if count else rows_of([], [])


@settings(max_examples=300, deadline=None)
@given(teacher_rows(), st.integers(1, 12), st.sampled_from([0.0, 0.003, 0.05, 0.5]), st.sampled_from([10, 14, 20]))
def test_equals_the_slow_codec(rows, k, min_p, vocab_size):
    packed = encode(rows, k=k, min_p=min_p, vocab_size=vocab_size)
    found = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap)
    assert len(packed.kept) == len(rows.ids)
    for r in range(len(rows.ids)):
        span = slice(int(found.offsets[r]), int(found.offsets[r + 1]))
        ids, gaps, rest_gap, rest = slow_row(rows.ids[r], rows.logprob[r], k, min_p, vocab_size)
        assert packed.topk_ids[span].tolist() == ids
        assert packed.topk_gap[span].tolist() == gaps
        if abs(rest) > 1e-12:  # below, the complement is float64 noise
            assert abs(int(packed.rest_gap[r]) - rest_gap) <= (1 if rest < 1e-9 else 0)
        true = [float(rows.logprob[r][rows.ids[r].tolist().index(t)]) for t in ids]
        np.testing.assert_allclose(found.logprob[span], true, atol=STEP / 2 + 1e-9)


def test_errors_do_not_add_up_over_ranks():
    # every distance is 0.4 steps: rounding each alone would give zeros and lose 24 steps over 61 ranks
    logprob = -4.2 - np.arange(61, dtype=np.float32) * np.float32(0.4 * STEP)
    packed = encode(rows_of([list(range(61))], [logprob.tolist()]), k=64, min_p=0.0, vocab_size=100)
    found = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap)
    assert packed.topk_gap.sum() > 0
    np.testing.assert_allclose(found.logprob, logprob, atol=STEP / 2 + 1e-6)


def test_padded_head_and_impossible_tokens_are_rest():
    logprob = [*np.log([0.5, 0.25, 0.125]).tolist(), -np.inf]
    packed = encode(rows_of([[9, 3, 4, 5]], [logprob]), k=4, min_p=0.0, vocab_size=9)
    assert packed.topk_ids.tolist() == [3, 4]
    found = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap)
    assert np.exp(found.rest_logprob[0]) == pytest.approx(0.625, rel=STEP)


def test_one_entry_is_kept_below_min_p_and_rest_of_a_sure_row_is_small():
    packed = encode(rows_of([[1, 2], [1, 2]], [[-7.0, -7.0], [-1e-6, -14.5]]), k=8, min_p=0.01, vocab_size=9)
    assert packed.kept.tolist() == [1, 1]
    assert packed.rest_gap.tolist() == [0, round(-math.log(1e-6) / STEP)]


def test_no_mass_left():
    packed = encode(rows_of([[1, 2]], [[0.0, -np.inf]]), k=8, min_p=0.01, vocab_size=9)
    assert packed.rest_gap.tolist() == [NO_REST]
    assert decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).rest_logprob[0] == -np.inf


@pytest.mark.parametrize(
    ("ids", "logprob", "message"),
    [
        ([[1, 2]], [[-0.5, -3000.0]], "does not fit"),
        ([[1, 2]], [[np.nan, -3.0]], "NaN"),
        ([[1, 2]], [[-3.0, -0.5]], "sorted"),
        ([[1, 2]], [[-0.1, -0.2]], "sum to 1.7"),
        ([[7, 8]], [[-0.5, -2.0]], "no entry among the tokenizer's 5"),
    ],
)
def test_refuses_what_is_no_distribution_or_does_not_fit(ids, logprob, message):
    with pytest.raises(XtokenError, match=message):
        encode(rows_of(ids, logprob), k=8, min_p=0.0, vocab_size=5)


def test_no_rows():
    packed = encode(rows_of([], []), k=4, min_p=0.1, vocab_size=5)
    assert isinstance(packed, Packed)
    assert decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).offsets.tolist() == [0]
