"""ULD against its dense reference, where lists are cut, chained, empty or longer than the other side."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.base import View
from xtoken.trainer.losses.uld import ULD

EXACT = 1e-10  # float64 sums of some dozen terms
FLOAT32 = 1e-5  # float32 probabilities, absolute
STEP = 1e-6  # of central differences: their own error is about its square
LENGTHS = [1, 3, 1, 2]
FIRST = [0, 1, 4, 6]  # position 5 belongs to no chunk
POSITIONS = 8

MakeView = Callable[..., View]


def random_case(rng: np.random.Generator, width: int, kept: int) -> tuple[Tensor, list[int], dict[str, Any]]:
    """Logits, labels and targets; chunk c keeps ``kept - c`` entries."""
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, width)), requires_grad=True)
    rows = [np.sort(rng.dirichlet(np.full(40, 0.3)))[::-1][: max(1, kept - c)] for c in range(len(FIRST))]
    columns = {
        "uld_count": [len(row) for row in rows],
        "uld_logprob": np.log(np.concatenate(rows)),
        "factor_logprob": -rng.exponential(1.0, len(FIRST)),
    }
    return z, rng.integers(0, width, POSITIONS).tolist(), columns


def dense(z: Tensor, label: list[int], columns: dict[str, Any], merge: str) -> Tensor:
    p_PV, at, terms = z.softmax(-1), 0, []
    for c, (first, length) in enumerate(zip(FIRST, LENGTHS, strict=True)):
        chunk = slice(first, first + length)
        row = reference.chain_rule(p_PV[chunk], label[chunk], merge)
        logq = columns["uld_logprob"][at : at + columns["uld_count"][c]]
        terms.append(reference.sorted_l1(row, np.exp(logq + columns["factor_logprob"][c]).tolist()))
        at += columns["uld_count"][c]
    return torch.stack(terms)


@pytest.mark.parametrize("merge", ["first", "last"])
@pytest.mark.parametrize("kept", [40, 7, 1])
@pytest.mark.parametrize("width", [24, 60, 5])
def test_equals_its_reference(pair: Any, make_view: MakeView, merge: str, kept: int, width: int) -> None:
    z, label, columns = random_case(np.random.default_rng(1), width, kept)
    fast = ULD(pair.setup(merge=merge)).terms(make_view(z, FIRST, LENGTHS, columns, label=label))
    slow = dense(z, label, columns, merge)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    weight = torch.arange(1.0, 5.0, dtype=torch.float64)
    (fast_grad,) = torch.autograd.grad((fast * weight).sum(), z)
    (slow_grad,) = torch.autograd.grad((slow * weight).sum(), z)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=EXACT, atol=EXACT)


def test_gradient_equals_finite_differences(pair: Any, make_view: MakeView) -> None:
    rng = np.random.default_rng(2)
    z, label, columns = random_case(rng, 24, 6)
    loss = ULD(pair.setup())
    total = loss.terms(make_view(z, FIRST, LENGTHS, columns, label=label)).sum()
    (grad,) = torch.autograd.grad(total, z)
    for _ in range(5):
        way = torch.tensor(rng.normal(0, 1, z.shape))
        ends = [
            float(loss.terms(make_view(z.detach() + s * way, FIRST, LENGTHS, columns, label=label)).sum())
            for s in (STEP, -STEP)
        ]
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(float((grad * way).sum()), abs=1e-7)


def test_temperature_reaches_the_caller_and_the_factor(pair: Any, make_view: MakeView) -> None:
    z, label, columns = random_case(np.random.default_rng(3), 24, 6)
    loss = ULD(pair.setup(tau=2.0))
    assert loss.temperature == 2
    fast = loss.terms(make_view(z, FIRST, LENGTHS, columns, 2.0, label=label))
    torch.testing.assert_close(fast, dense(z / 2, label, columns, "first"), rtol=EXACT, atol=EXACT)


def test_by_hand(pair: Any, make_view: MakeView) -> None:
    """p = (.5, .3, .2), times .5 for the second token; q = (.6, .4) times .25: |.25-.15| + |.15-.1| + .1 = .25."""
    z = torch.tensor([[0.3, 0.5, 0.2], [0.5, 0.25, 0.25]], dtype=torch.float64).log()
    columns = {"uld_count": [2], "uld_logprob": np.log([0.6, 0.4]), "factor_logprob": np.log([0.25])}
    view = make_view(z, [0], [2], columns, label=[2, 0])
    assert float(ULD(pair.setup()).terms(view)) == pytest.approx(0.25, rel=1e-12)


def test_zero_where_the_student_has_the_same_probabilities_on_other_tokens(pair: Any, make_view: MakeView) -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    columns = {"uld_count": [4], "uld_logprob": p[0].log().numpy(), "factor_logprob": [0.0]}
    value = ULD(pair.setup()).terms(make_view(p.flip(1).log(), [0], [1], columns))
    assert 0 <= float(value) < FLOAT32


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_degenerate_rows_give_numbers(pair: Any, make_view: MakeView, scale: float) -> None:
    """A certain teacher, one of probability 0, an impossible continuation, a certain student, no entries."""
    z = torch.tensor(np.random.default_rng(4).normal(0, 1, (4, 24)) * scale, dtype=torch.float32).requires_grad_()
    columns = {
        "uld_count": [1, 2, 1, 0],
        "uld_logprob": np.array([0.0, -0.1, -np.inf, -0.5], np.float32),
        "factor_logprob": np.array([0.0, -np.inf, -200.0, 0.0], np.float32),
    }
    terms = ULD(pair.setup()).terms(make_view(z, [0, 1, 2, 3], [1, 1, 1, 1], columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert (terms >= 0).all()
    assert torch.isfinite(grad).all()


def test_no_chunks(pair: Any, make_view: MakeView) -> None:
    columns = {name: np.zeros(0, np.float32) for name in ("uld_logprob", "factor_logprob")}
    view = make_view(torch.zeros(3, 24), [], [], columns | {"uld_count": np.zeros(0, np.int32)})
    assert ULD(pair.setup()).terms(view).shape == (0,)


def test_chunks_without_entries_are_not_valid(pair: Any) -> None:
    arrays = {"uld_count": np.array([3, 0, 1], np.int32), "factor_logprob": np.zeros(3, np.float32)}
    assert ULD(pair.setup()).valid(np.arange(3), arrays).tolist() == [True, False, True]


def test_means_over_rows_are_refused(pair: Any) -> None:
    with pytest.raises(XtokenError, match="'mean'"):
        ULD(pair.setup(merge="mean"))
