"""Orthogonal matching pursuit against least squares written plainly, and where the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.token_map import EQUAL, PIECES, TokenMap
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.transplant.omp import pursue, shared_sums
from xtoken.trainer.transplant.rows import new_rows

CPU = torch.device("cpu")


def plain_omp(row: np.ndarray[Any, Any], atoms: np.ndarray[Any, Any], most: int) -> tuple[list[int], Any]:
    """As books write it: the atom nearest to what is left, then least squares over all that were chosen."""
    direction = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    left, chosen, weight = row.copy(), list[int](), np.zeros(0)
    for _ in range(most):
        score = abs(direction @ left)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        weight, *_ = np.linalg.lstsq(atoms[chosen].T, row, rcond=None)
        left = row - atoms[chosen].T @ weight
    return chosen, weight


@pytest.mark.parametrize("most", [1, 4, 12])
def test_against_numpy(most: int) -> None:
    rng = np.random.default_rng(most)
    rows, atoms = rng.standard_normal((30, 24)), rng.standard_normal((100, 24)) * rng.uniform(0.2, 5, (100, 1))
    pick, weight = pursue(torch.from_numpy(rows), torch.from_numpy(atoms), most)
    for at, row in enumerate(rows):
        chosen, wanted = plain_omp(row, atoms, most)
        assert pick[at].tolist() == chosen
        np.testing.assert_allclose(weight[at].numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_a_sum_of_few_atoms_is_found_again() -> None:
    """Orthogonal atoms, so that the first choice is right each time; then nothing is left and the rest weighs 0."""
    atoms = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    atoms = atoms * torch.linspace(0.5, 4, 32)[:, None]
    rows = torch.stack([2 * atoms[3] - 0.5 * atoms[7] + atoms[20], atoms[5]])
    pick, weight = pursue(rows, atoms, 6)
    found = [dict(zip(pick[at].tolist(), weight[at].tolist(), strict=True)) for at in range(2)]
    for sums, wanted in zip(found, ({3: 2.0, 7: -0.5, 20: 1.0}, {5: 1.0}), strict=True):
        assert {atom: round(value, 9) for atom, value in sums.items() if abs(value) > 1e-9} == wanted


def test_equal_atoms_and_rows_of_nothing_give_finite_weights() -> None:
    atoms = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    rows = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    pick, weight = pursue(rows, atoms, 4)
    assert torch.isfinite(weight).all()
    made = (atoms[pick] * weight[:, :, None].float()).sum(1)
    assert torch.allclose(made, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert sorted(pick[0].tolist()) == [0, 1, 2, 3], "no atom is taken twice"


def test_a_donor_that_is_the_model_turned_gives_the_models_own_rows() -> None:
    """The donor's space is the model's, turned: a row that is a sum of two shared ones there is the same sum here."""
    rng = np.random.default_rng(7)
    model = torch.from_numpy(rng.standard_normal((60, 16)))
    turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((16, 16))))[0]
    order = rng.permutation(60)  # new token t is old token order[t]; the last two are new, sums of shared rows
    wanted = torch.stack([3 * model[4], 2 * model[9]])
    donor = torch.cat([model[torch.from_numpy(order)], wanted]) @ turn
    groups = [(EQUAL, [int(old)]) for old in order] + [(PIECES, [0]), (PIECES, [1])]
    found = TokenMap(
        np.array([ids[0] for _, ids in groups], np.int32),
        np.arange(len(groups) + 1, dtype=np.int64),
        np.array([kind for kind, _ in groups], np.int8),
        np.arange(60, dtype=np.int32),
    )
    sums = shared_sums(donor, found, 8, CPU, Silent())
    assert [ids[0] for ids in sums.old.tolist()] == [4, 9]
    rows = new_rows(model, found, 62, (0, 0), "omp", sums)
    assert torch.allclose(rows[60:], wanted, rtol=0, atol=1e-9)
    assert torch.equal(rows[:60], model[torch.from_numpy(order)])


def test_fewer_shared_tokens_than_asked_for() -> None:
    donor = torch.eye(3)
    found = TokenMap(
        np.array([0, 1, 0], np.int32), np.arange(4, dtype=np.int64), np.array([EQUAL, EQUAL, PIECES], np.int8),
        np.arange(2, dtype=np.int32),
    )  # fmt: skip
    assert shared_sums(donor, found, 64, CPU, Silent()).weight.shape == (1, 2)
