"""Strict against its reference, by hand, and what it must not see.

Shapes: P positions, C chunks, V student vocabulary, K entries summed over chunks.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses import open_loss, reference

EXACT = 1e-10  # float64 sums of some dozen terms
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
SLOPE = 1e-7  # central differences with step 1e-5 in float64
FIRST, POSITIONS, V = [0, 2, 3, 6], 7, 24
KL = pytest.mark.parametrize("kl", ["forward", "reverse"])


def some_chunks(rng: np.random.Generator, sizes: tuple[int, ...] = (5, 2, 9, 3)) -> dict[str, np.ndarray]:
    """Columns of chunks whose entries add up to about a half: the others were of other bytes, or not kept."""
    ids = [rng.permutation(np.arange(2, V))[:size] for size in sizes]
    logp = [np.log(np.sort(rng.dirichlet(np.ones(size)) * rng.uniform(0.2, 0.9))[::-1]) for size in sizes]
    return {
        "strict_count": np.array(sizes, np.int32),
        "strict_ids": np.concatenate(ids).astype(np.int32),
        "strict_logprob": np.concatenate(logp),
    }


def logits(rng: np.random.Generator, scale: float = 2.0) -> Tensor:
    return torch.tensor(rng.normal(0, scale, (POSITIONS, V)), requires_grad=True)


def slow_terms(z: Tensor, columns: dict[str, np.ndarray], tau: float = 1.0, kl: str = "forward") -> Tensor:
    stops = np.cumsum(columns["strict_count"])[:-1]
    parts = zip(FIRST, np.split(columns["strict_ids"], stops), np.split(columns["strict_logprob"], stops), strict=True)
    rows = (z / tau).softmax(-1)
    return torch.stack(
        [
            reference.strict(rows[first], dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True)), kl=kl)
            for first, ids, logp in parts
        ]
    )


def weighted(terms: Tensor) -> Tensor:
    """A sum in which no chunk counts like another, so that a mix-up shows."""
    return (terms * torch.linspace(0.5, 2.0, len(terms), dtype=terms.dtype)).sum()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ("forward", 0.8 * np.log(0.8 / 0.6) + 0.2 * np.log(0.2 / 0.4)),
        ("reverse", 0.6 * np.log(0.6 / 0.8) + 0.4 * np.log(0.4 / 0.2)),
    ],
)
def test_by_hand(pair: Any, make_view: Any, kl: str, expected: float) -> None:
    """The teacher keeps .4 and .1 on tokens of equal bytes, .5 elsewhere: (.8, .2). The student has .3 and .2 there, .5
    elsewhere: (.6, .4).
    """
    p = torch.full((1, V), 0.5 / (V - 2), dtype=torch.float64)
    p[0, 4], p[0, 9] = 0.3, 0.2
    columns = {"strict_count": [2], "strict_ids": [4, 9], "strict_logprob": np.log([0.4, 0.1])}
    terms = open_loss("strict", pair.setup(kl=kl)).terms(make_view(p.log(), [0], columns=columns))
    assert terms.tolist() == pytest.approx([expected], rel=1e-12)


def test_its_gradient_by_hand(pair: Any, make_view: Any) -> None:
    """Forward, by the logits: q - p inside the set, (.6 - .8, .4 - .2), and nothing outside it."""
    p = torch.full((1, V), 0.5 / (V - 2), dtype=torch.float64)
    p[0, 4], p[0, 9] = 0.3, 0.2
    z = p.log().requires_grad_()
    columns = {"strict_count": [2], "strict_ids": [4, 9], "strict_logprob": np.log([0.4, 0.1])}
    (grad,) = torch.autograd.grad(open_loss("strict", pair.setup()).terms(make_view(z, [0], columns=columns)).sum(), z)
    expected = torch.zeros(1, V, dtype=torch.float64)
    expected[0, 4], expected[0, 9] = -0.2, 0.2
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@KL
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_it_equals_its_reference(pair: Any, make_view: Any, kl: str, tau: float) -> None:
    rng = np.random.default_rng(1)
    z, columns = logits(rng), some_chunks(rng)
    loss = open_loss("strict", pair.setup(kl=kl, tau=tau))
    assert loss.temperature == tau
    fast = loss.terms(make_view(z, FIRST, columns=columns, tau=tau))
    slow = slow_terms(z, columns, tau, kl)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    (ours,), (theirs,) = torch.autograd.grad(weighted(fast), z), torch.autograd.grad(weighted(slow), z)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    assert ours.abs().max() > 1e-2


@KL
def test_gradients_equal_finite_differences(pair: Any, make_view: Any, slopes: Any, kl: str) -> None:
    rng = np.random.default_rng(2)
    z, columns, loss = logits(rng, 1.0), some_chunks(rng), open_loss("strict", pair.setup(kl=kl))

    def at(x: Tensor) -> Tensor:
        return weighted(loss.terms(make_view(x, FIRST, columns=columns)))

    torch.testing.assert_close(torch.autograd.grad(at(z), z)[0], slopes(at, z), rtol=SLOPE, atol=SLOPE)


@KL
def test_all_entries_of_equal_bytes_is_the_kl_of_whole_distributions(pair: Any, make_view: Any, kl: str) -> None:
    """With K = V and nothing outside there is nothing to renormalise."""
    rng = np.random.default_rng(3)
    z, p = logits(rng), rng.dirichlet(np.ones(V), len(FIRST))
    columns = {
        "strict_count": np.full(len(FIRST), V),
        "strict_ids": np.tile(np.arange(V), len(FIRST)),
        "strict_logprob": np.log(p).reshape(-1),
    }
    terms = open_loss("strict", pair.setup(kl=kl)).terms(make_view(z, FIRST, columns=columns))
    q = z.detach()[FIRST].softmax(-1).numpy()
    a, b = (p, q) if kl == "forward" else (q, p)
    assert terms.tolist() == pytest.approx((a * np.log(a / b)).sum(1).tolist(), rel=EXACT)


@KL
def test_what_either_side_gives_to_other_tokens_does_not_count(pair: Any, make_view: Any, kl: str) -> None:
    rng = np.random.default_rng(4)
    z, columns, loss = logits(rng), some_chunks(rng), open_loss("strict", pair.setup(kl=kl))
    before = loss.terms(make_view(z, FIRST, columns=columns))
    moved = z.detach().clone()
    stops = np.cumsum(columns["strict_count"])[:-1]
    for first, ids in zip(FIRST, np.split(columns["strict_ids"], stops), strict=True):
        others = np.setdiff1d(np.arange(V), ids)
        moved[first, others] += torch.tensor(rng.normal(0, 3, len(others)))
    half = columns | {"strict_logprob": columns["strict_logprob"] - np.log(2)}  # of a teacher with more mass elsewhere
    torch.testing.assert_close(loss.terms(make_view(moved, FIRST, columns=half)), before, rtol=EXACT, atol=EXACT)
    (grad,) = torch.autograd.grad(before.sum(), z)
    outside = torch.ones(POSITIONS, V, dtype=torch.bool)
    for first, ids in zip(FIRST, np.split(columns["strict_ids"], stops), strict=True):
        outside[first, ids] = False
    assert not grad[outside].abs().max() > EXACT


@KL
def test_one_entry_says_nothing(pair: Any, make_view: Any, kl: str) -> None:
    """Why align builds no such target."""
    z = logits(np.random.default_rng(5))
    columns = {"strict_count": [1], "strict_ids": [7], "strict_logprob": np.log([0.6])}
    terms = open_loss("strict", pair.setup(kl=kl)).terms(make_view(z, [2], columns=columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert terms.tolist() == [0.0]
    assert not grad.abs().max() > EXACT


@KL
def test_float32_equals_the_reference_in_float64_and_is_never_negative(pair: Any, make_view: Any, kl: str) -> None:
    rng = np.random.default_rng(6)
    z, columns = logits(rng, 5.0), some_chunks(rng)
    z32 = z.detach().float().requires_grad_()
    stored = columns | {"strict_logprob": columns["strict_logprob"].astype(np.float32)}
    fast = open_loss("strict", pair.setup(kl=kl)).terms(make_view(z32, FIRST, columns=stored))
    slow = slow_terms(z, columns, kl=kl)
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)
    (ours,), (theirs,) = torch.autograd.grad(fast.sum(), z32), torch.autograd.grad(slow.sum(), z)
    torch.testing.assert_close(ours.double(), theirs, rtol=FLOAT32, atol=FLOAT32)
    # the student as its own teacher: nothing but rounding is left, and no value lies below zero
    ids = columns["strict_ids"]
    chunk = np.repeat(np.arange(len(FIRST)), columns["strict_count"])
    own = z32.detach().log_softmax(-1)[torch.tensor(FIRST)[chunk], ids].numpy()
    same = open_loss("strict", pair.setup(kl=kl)).terms(make_view(z32, FIRST, columns=stored | {"strict_logprob": own}))
    assert same.min() >= 0
    assert same.max() < FLOAT32


@KL
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_far_logits_give_numbers(pair: Any, make_view: Any, scale: float, kl: str) -> None:
    rng = np.random.default_rng(7)
    z = (torch.tensor(rng.normal(0, 1, (POSITIONS, V)), dtype=torch.float32) * scale).requires_grad_()
    columns = some_chunks(rng)
    columns["strict_logprob"] = columns["strict_logprob"].astype(np.float32)
    terms = open_loss("strict", pair.setup(kl=kl)).terms(make_view(z, FIRST, columns=columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert torch.isfinite(grad).all()


def test_no_chunks_give_no_terms(pair: Any, make_view: Any) -> None:
    z = logits(np.random.default_rng(8))
    columns = {
        "strict_count": np.zeros(0, np.int32),
        "strict_ids": np.zeros(0, np.int32),
        "strict_logprob": np.zeros(0),
    }
    terms = open_loss("strict", pair.setup()).terms(make_view(z, [], columns=columns))
    assert terms.shape == (0,)
    assert not torch.autograd.grad(terms.sum(), z)[0].any()


def test_ids_that_the_student_lacks_are_refused(pair: Any) -> None:
    loss = open_loss("strict", pair.setup())
    loss.check({"strict_ids": np.arange(V, dtype=np.int32)})
    for bad in (-1, V):
        with pytest.raises(VerificationError, match=f"id {bad} in strict_ids"):
            loss.check({"strict_ids": np.array([3, bad], np.int32)})
