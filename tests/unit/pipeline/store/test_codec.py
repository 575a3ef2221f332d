"""The codec against a slow, obvious one, row by row and number by number."""

import math
from dataclasses import replace
from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.store.codecs.topk import NO_TAIL, STEP, Packed, decode, decode_tau_tail, encode
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.errors import XtokenError

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
    rest_gap = NO_TAIL if rest <= 0 else math.floor(-rest.ln() / Decimal(STEP) + Decimal("0.5"))
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


@settings(max_examples=100, deadline=None)
@given(teacher_rows(), st.integers(1, 12), st.sampled_from([0.0, 0.003, 0.05]))
def test_entries_that_cannot_be_kept_change_nothing_behind_the_others(rows, k, min_p):
    """A padded head's impossible ids, below all others: what is kept is still the beginning of each row."""
    count = len(rows.ids)
    ids = np.concatenate([rows.ids, np.full((count, 1), 20, np.int32)], axis=1)
    logprob = np.concatenate([rows.logprob, np.full((count, 1), -np.inf, np.float32)], axis=1)
    plain, padded = (
        encode(one, k=k, min_p=min_p, vocab_size=20) for one in (rows, replace(rows, ids=ids, logprob=logprob))
    )
    for name in ("kept", "topk_ids", "topk_gap", "rest_gap"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(padded, name))


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
    assert np.exp(found.tail_logprob[0]) == pytest.approx(0.625, rel=STEP)


def test_one_entry_is_kept_below_min_p_and_rest_of_a_sure_row_is_small():
    packed = encode(rows_of([[1, 2], [1, 2]], [[-7.0, -7.0], [-1e-6, -14.5]]), k=8, min_p=0.01, vocab_size=9)
    assert packed.kept.tolist() == [1, 1]
    assert packed.rest_gap.tolist() == [0, round(-math.log(1e-6) / STEP)]


def test_no_mass_left():
    packed = encode(rows_of([[1, 2]], [[0.0, -np.inf]]), k=8, min_p=0.01, vocab_size=9)
    assert packed.rest_gap.tolist() == [NO_TAIL]
    assert decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).tail_logprob[0] == -np.inf


@pytest.mark.parametrize(
    ("ids", "logprob", "message"),
    [
        ([[1, 2]], [[-0.5, -3000.0]], "does not fit"),
        ([[1, 2]], [[np.nan, -3.0]], "NaN"),
        ([[1, 2, 3]], [[-1.0, -3.0, np.nan]], "NaN"),
        ([[1]], [[np.nan]], "NaN"),
        ([[1, 2]], [[-3.0, -0.5]], "sorted"),
        ([[1, 2]], [[-0.1, -0.2]], "sum to 1.7"),
        ([[7, 8]], [[-0.5, -2.0]], "no entry among the tokenizer's 5"),
    ],
)
def test_refuses_what_is_no_distribution_or_does_not_fit(ids, logprob, message):
    with pytest.raises(XtokenError, match=message):
        encode(rows_of(ids, logprob), k=8, min_p=0.0, vocab_size=5)


TEMPERATURES = (0.5, 2.0, 4.0)


def whole_rows(size: int, sharpness: float, count: int = 40) -> TeacherRows:
    """Rows of all ``size`` entries with the normalisers a backend gives, float32 as it does."""
    logits = np.random.default_rng(size).normal(size=(count, size)) * sharpness
    logprob = -np.sort(np.logaddexp.reduce(logits, axis=1, keepdims=True) - logits, axis=1).astype(np.float32)
    ids = np.argsort(np.random.default_rng(1).random((count, size)), axis=1)
    norms = [np.logaddexp.reduce(logprob.astype(np.float64) / tau, axis=1) for tau in TEMPERATURES]
    rows = rows_of(ids.tolist(), logprob.tolist())
    return replace(rows, tau_lognorm=np.stack(norms, axis=1).astype(np.float32))


def slow_tau_rest(logprob, kept, tau):
    """REST at ``tau`` from the whole row, in exact arithmetic."""
    weights = [(Decimal(float(value)) / Decimal(tau)).exp() for value in logprob]
    return 1 - sum(weight for weight, keep in zip(weights, kept, strict=True) if keep) / sum(weights)


@pytest.mark.parametrize(("size", "sharpness"), [(20, 0.5), (20, 3.0), (200, 2.0)])
def test_rest_at_other_temperatures_is_what_the_kept_entries_leave(size, sharpness):
    rows = whole_rows(size, sharpness)
    packed = encode(rows, k=12, min_p=0.01, vocab_size=size - 3, temperatures=TEMPERATURES)
    plain = encode(rows, k=12, min_p=0.01, vocab_size=size - 3)
    assert plain.tau_rest_odds is None
    for name in ("kept", "topk_ids", "topk_gap", "rest_gap"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(plain, name))
    offsets = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).offsets
    for tau in TEMPERATURES:
        found = decode_tau_tail(packed.tau_rest_odds, (1.0, *TEMPERATURES), tau, STEP)
        assert found.shape == (len(rows.ids),)
        for r, logprob in enumerate(rows.logprob):
            kept = np.isin(rows.ids[r], packed.topk_ids[offsets[r] : offsets[r + 1]])
            rest = slow_tau_rest(logprob, kept, tau)
            # the float32 normaliser moves REST by its own rounding
            assert math.exp(found[r]) == pytest.approx(float(rest), rel=STEP / 2 + 1e-4, abs=1e-6)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_nothing_is_left_at_any_temperature_where_all_is_kept(sharpness):
    packed = encode(whole_rows(200, sharpness), k=200, min_p=0.0, vocab_size=200, temperatures=TEMPERATURES)
    assert (packed.tau_rest_odds == -32768).all()
    for tau in TEMPERATURES:
        assert np.isneginf(decode_tau_tail(packed.tau_rest_odds, (1.0, *TEMPERATURES), tau, STEP)).all()


def test_a_temperature_that_was_not_captured_is_named():
    for held, message in (((1.0, 2.0), "temperature 4 .*it holds 2.*--temperatures 4"), ((1.0,), "holds none but 1")):
        with pytest.raises(XtokenError, match=message):
            decode_tau_tail(np.zeros(2, np.int16), held, 4.0, STEP)
    with pytest.raises(XtokenError, match="temperature 1 "):
        decode_tau_tail(np.zeros(2, np.int16), (1.0, 2.0), 1.0, STEP)


def test_normalisers_that_belong_to_other_rows_are_refused():
    rows = whole_rows(20, 1.0)
    for spoil, message in ((-1.0, "sum to 2.7"), (np.nan, "NaN or inf")):
        wrong = replace(rows, tau_lognorm=rows.tau_lognorm + np.float32(spoil))
        with pytest.raises(XtokenError, match=message):
            encode(wrong, k=20, min_p=0.0, vocab_size=20, temperatures=TEMPERATURES)


def test_no_rows():
    packed = encode(rows_of([], []), k=4, min_p=0.1, vocab_size=5)
    assert isinstance(packed, Packed)
    assert decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).offsets.tolist() == [0]
