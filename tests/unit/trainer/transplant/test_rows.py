"""Rows of a new matrix: copies, means, sums, normal ones; every number by hand or by numpy."""

import numpy as np
import pytest
import torch

from xtoken.schemas.token_map import CONTROL, EQUAL, NEW_CONTROL, PIECES, UNDECODABLE, UNUSED, TokenMap
from xtoken.trainer.transplant.rows import Sums, moments, new_rows


def token_map(groups: list[tuple[int, list[int]]], known: list[int]) -> TokenMap:
    """The map of ``(kind, old ids)``, one per new token."""
    return TokenMap(
        np.array([one for _, ids in groups for one in ids], np.int32),
        np.cumsum([0, *(len(ids) for _, ids in groups)], dtype=np.int64),
        np.array([kind for kind, _ in groups], np.int8),
        np.array(known, np.int32),
    )


OLD = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [99.0, 99.0]])  # the last row belongs to no token
GROUPS = [(EQUAL, [2]), (PIECES, [0, 1, 1]), (CONTROL, [0]), (UNUSED, []), (UNDECODABLE, []), (NEW_CONTROL, [])]
MAP = token_map(GROUPS, [0, 1, 2])


def test_by_hand() -> None:
    found = new_rows(OLD, MAP, 8, (0, 0), "fvt")
    assert found[[0, 2]].tolist() == [[5, 1], [1, 2]]
    assert torch.allclose(found[1], torch.tensor([7 / 3, 14 / 3]))
    assert found[3].tolist() == found[6].tolist() == found[7].tolist() == [3.0, 3.0], "the mean row, padding too"
    assert not torch.equal(found[4], found[5])


def test_the_old_mean_is_of_tokens_only() -> None:
    mean, spread = moments(OLD, MAP.known)
    assert mean.tolist() == [3.0, 3.0]
    assert torch.allclose(spread, OLD[:3].double().std(0, correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_the_same_bits_and_the_dtype_stays(dtype: torch.dtype) -> None:
    old = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    order = np.random.default_rng(0).permutation(50)
    found = new_rows(old, token_map([(EQUAL, [int(one)]) for one in order], list(range(50))), 50, (0, 0), "fvt")
    assert found.dtype == dtype
    assert torch.equal(found, old[torch.from_numpy(order)])


def test_means_against_float64_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    old = torch.from_numpy(rng.standard_normal((200, 24))).float()
    groups = [(PIECES, rng.integers(0, 200, rng.integers(1, 9)).tolist()) for _ in range(300)]
    found = new_rows(old, token_map(groups, list(range(200))), 300, (0, 0), "fvt")
    wanted = np.stack([old.double().numpy()[ids].mean(0) for _, ids in groups])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-7)
    monkeypatch.setattr("xtoken.trainer.transplant.rows._BLOCK", 100)
    assert torch.equal(found, new_rows(old, token_map(groups, list(range(200))), 300, (0, 0), "fvt"))


def test_random_rows_have_the_old_moments_and_follow_from_the_seed() -> None:
    old = torch.randn(4000, 8, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 9) + torch.arange(8)
    groups = [(PIECES, [0, 1])] * 20000
    one, same, other = (
        new_rows(old, token_map(groups, list(range(4000))), 20000, seed, "random") for seed in ((5, 0), (5, 0), (5, 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.allclose(one.mean(0), old.mean(0), atol=0.1)  # of 20,000 rows: 8 / sqrt(20000) is .06
    assert torch.allclose(one.std(0), old.std(0, correction=0), rtol=0.03)


def test_sums_are_taken_where_they_are_given() -> None:
    sums = Sums(np.array([1, 4]), np.array([[0, 1], [2, 2]]), np.array([[2.0, -1.0], [0.5, 0.0]]))
    found = new_rows(OLD, MAP, 6, (0, 0), "omp", sums)
    assert found[1].tolist() == [-1.0, -2.0]
    assert found[4].tolist() == [2.5, 0.5]
    assert found[0].tolist() == [5.0, 1.0]
