"""Top-k, ranks and masses of rows that are full of ties, against sorting."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.teachers import logit_rows
from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.logit_rows import RowReader, cut, join, top_k


def ranking(values: torch.Tensor) -> np.ndarray:
    return np.argsort(-values.numpy(), axis=1, kind="stable")


@settings(deadline=None, max_examples=200)
@given(
    levels=st.integers(1, 6),
    width=st.integers(1, 40),
    rows=st.integers(1, 5),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_top_k_is_the_head_of_the_stable_ranking(
    levels: int, width: int, rows: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels, (rows, width), generator=generator).float()
    top, ids = top_k(values, k)
    np.testing.assert_array_equal(ids.numpy(), ranking(values)[:, :k])
    np.testing.assert_array_equal(top.numpy(), np.take_along_axis(values.numpy(), ids.numpy(), axis=1))


@settings(deadline=None, max_examples=100)
@given(levels=st.integers(1, 6), width=st.integers(2, 40), seed=st.integers(0, 1000), data=st.data())
def test_rows_hold_ranks_and_masses_of_the_whole_row(levels: int, width: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (width, width), generator=generator).float()
    target = torch.arange(width)
    space = torch.arange(0, width, 2)
    rows = RowReader(k, space).read(logits.clone(), target)
    probability = torch.softmax(logits.double(), dim=-1).numpy()
    places = np.argsort(ranking(logits), axis=1)
    np.testing.assert_array_equal(rows.target_rank, 1 + places[np.arange(width), np.arange(width)])
    np.testing.assert_allclose(np.exp(rows.target_logprob), np.diagonal(probability), rtol=1e-5)
    assert rows.lse is not None
    assert rows.space_logprob is not None
    np.testing.assert_allclose(rows.lse, torch.logsumexp(logits.double(), -1).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(rows.space_logprob), probability[:, ::2].sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("part", [1, 3 * 50, 7 * 50 + 49])
def test_parts_of_a_block_give_what_it_gives_at_once(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-9, 9, (20, 50), generator=generator).float()
    target, uniform = torch.arange(20), np.linspace(0, 0.99, 20)
    reader = RowReader(4, torch.arange(0, 50, 2), (0.5, 2.0), Sampler(3, 0, 45))
    whole = reader.figures(logits.clone(), target, uniform)
    monkeypatch.setattr(logit_rows, "_PART_LOGITS", part)
    parts = reader.figures(logits.clone(), target, uniform)
    for one in fields(whole):
        torch.testing.assert_close(getattr(parts, one.name), getattr(whole, one.name), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(levels=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_cpu_counts_ranks_as_a_gpu_does(levels: int, seed: int) -> None:
    values = torch.randint(0, levels, (9, 9), generator=torch.Generator().manual_seed(seed)).float()
    values[1, :4], values[2, 3] = float("-inf"), float("nan")
    target, missed = torch.arange(9), torch.tensor([1, 2, 3, 8])
    expected = logit_rows._counted(values, target, missed)
    assert logit_rows._counted_on_cpu(values, target, missed).tolist() == expected.tolist()


@pytest.mark.parametrize("count", [1, 15, 16, 33])
def test_normalisers_at_other_temperatures_are_of_the_whole_row(count: int) -> None:
    temperatures = (0.5, 2.0, 7.0)
    logits = torch.randn(count, 500, generator=torch.Generator().manual_seed(count)) * 6
    logits[0, 3:400] = float("-inf")
    rows = RowReader(5, torch.arange(3), temperatures).read(logits.clone(), torch.zeros(count, dtype=torch.int64))
    assert rows.tau_lognorm is not None
    assert (rows.tau_lognorm.dtype, rows.tau_lognorm.shape) == (np.float32, (count, 3))
    logits = logits.double()
    for index, tau in enumerate(temperatures):
        expected = torch.logsumexp(logits / tau, -1) - torch.logsumexp(logits, -1) / tau
        np.testing.assert_allclose(rows.tau_lognorm[:, index], expected.numpy(), atol=2e-5, rtol=0)


def test_rows_keep_their_normalisers_when_joined_and_cut() -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    target = torch.zeros(6, dtype=torch.int64)
    reader = RowReader(2, torch.arange(3), (2.0, 4.0))
    whole = reader.read(logits.clone(), target)
    both = join([reader.read(logits[:4].clone(), target[:4]), reader.read(logits[4:].clone(), target[4:])])
    assert both.tau_lognorm is not None
    assert whole.tau_lognorm is not None
    np.testing.assert_allclose(both.tau_lognorm, whole.tau_lognorm, atol=1e-6)
    part = cut(both, 3, 5)
    assert part.tau_lognorm is not None
    np.testing.assert_array_equal(part.tau_lognorm, both.tau_lognorm[3:5])
    without = RowReader(2, torch.arange(3)).read(logits.clone(), target)
    assert without.tau_lognorm is join([without, without]).tau_lognorm is cut(without, 0, 1).tau_lognorm is None


def test_no_token_starts_with_a_space() -> None:
    rows = RowReader(2, torch.zeros(0, dtype=torch.int64)).read(torch.zeros(3, 5), torch.tensor([0, 1, 2]))
    assert rows.space_logprob is not None
    assert np.isneginf(rows.space_logprob).all()


def test_a_token_of_probability_zero_has_its_place() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    rows = RowReader(4, torch.tensor([1])).read(logits, torch.tensor([3]))
    assert rows.ids.tolist() == [[2, 0, 1, 3]]
    assert rows.target_rank.tolist() == [4]
    assert np.isneginf(rows.target_logprob).all()
