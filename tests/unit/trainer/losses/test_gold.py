"""GOLD against its dense reference for every beta, and its parts at the ends of their ranges."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.base import View
from xtoken.trainer.losses.gold import GOLD

EXACT = 1e-10  # float64 sums of some dozen terms
FLOAT32 = 2e-6  # float32 masses that sum to 1, absolute
STEP = 1e-6  # of central differences: their own error is about its square
LENGTHS = [1, 3, 1, 2]
FIRST = [0, 1, 4, 6]  # position 5 belongs to no chunk
POSITIONS = 8
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]

MakeView = Callable[..., View]


def matched_ids(pair: Any) -> list[int]:
    ids: list[int] = pair.arrays.student_id[pair.arrays.exact].tolist()
    return ids


def random_case(pair: Any, rng: np.random.Generator, kept: int | None) -> tuple[Tensor, list[int], dict[str, Any]]:
    """Logits, labels and targets; ``kept=None`` keeps the whole distribution of each chunk."""
    width, size = pair.weight_VU.shape
    partner = dict(
        zip(pair.arrays.teacher_id[pair.arrays.exact], pair.arrays.student_id[pair.arrays.exact], strict=True)
    )
    chunks = []
    for _ in FIRST:
        p = rng.dirichlet(np.full(size, 0.4))
        order = np.argsort(-p)[:kept]
        chunks.append(([(partner[t], p[t]) for t in order if t in partner], [p[t] for t in order if t not in partner]))
    columns = {
        "gold_count": [len(matched) for matched, _ in chunks],
        "gold_ids": np.array([s for matched, _ in chunks for s, _ in matched], np.int32),
        "gold_logprob": np.log([p for matched, _ in chunks for _, p in matched]),
        "gold_other_count": [len(other) for _, other in chunks],
        "gold_other_logprob": np.log([p for _, other in chunks for p in other]),
        "factor_logprob": -rng.exponential(1.0, len(FIRST)),
    }
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, width)), requires_grad=True)
    return z, rng.integers(0, width, POSITIONS).tolist(), columns


def dense(pair: Any, z: Tensor, label: list[int], columns: dict[str, Any], merge: str, beta: float) -> Tensor:
    p_PV, terms = z.softmax(-1), []
    at = np.cumsum([0, *columns["gold_count"]]), np.cumsum([0, *columns["gold_other_count"]])
    for c, (first, length) in enumerate(zip(FIRST, LENGTHS, strict=True)):
        chunk, kept, rest = slice(first, first + length), slice(*at[0][c : c + 2]), slice(*at[1][c : c + 2])
        row = reference.chain_rule(p_PV[chunk], label[chunk], merge)
        factor = np.exp(columns["factor_logprob"][c])
        p_T = dict(zip(columns["gold_ids"][kept], np.exp(columns["gold_logprob"][kept]) * factor, strict=True))
        other = np.exp(columns["gold_other_logprob"][rest]) * factor
        terms.append(reference.gold(row, p_T, other.tolist(), matched_ids(pair), beta, pair.weight_VU.shape[1]))
    return torch.stack(terms)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kept", [None, 8, 1])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_equals_its_reference(pair: Any, make_view: MakeView, beta: float, kept: int | None, merge: str) -> None:
    z, label, columns = random_case(pair, np.random.default_rng(1), kept)
    fast = GOLD(pair.setup(merge=merge, beta=beta)).terms(make_view(z, FIRST, LENGTHS, columns, label=label))
    slow = dense(pair, z, label, columns, merge, beta)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    weight = torch.arange(1.0, 5.0, dtype=torch.float64)
    (fast_grad,) = torch.autograd.grad((fast * weight).sum(), z)
    (slow_grad,) = torch.autograd.grad((slow * weight).sum(), z)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_equals_finite_differences(pair: Any, make_view: MakeView, beta: float) -> None:
    rng = np.random.default_rng(2)
    z, label, columns = random_case(pair, rng, 8)
    loss = GOLD(pair.setup(beta=beta))
    total = loss.terms(make_view(z, FIRST, LENGTHS, columns, label=label)).sum()
    (grad,) = torch.autograd.grad(total, z)
    for _ in range(5):
        way = torch.tensor(rng.normal(0, 1, z.shape))
        ends = [
            float(loss.terms(make_view(z.detach() + s * way, FIRST, LENGTHS, columns, label=label)).sum())
            for s in (STEP, -STEP)
        ]
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(float((grad * way).sum()), abs=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_float32_equals_the_reference_in_float64(pair: Any, make_view: MakeView, beta: float) -> None:
    z, label, columns = random_case(pair, np.random.default_rng(3), 8)
    z32 = z.detach().float().requires_grad_()
    fast = GOLD(pair.setup(beta=beta)).terms(make_view(z32, FIRST, LENGTHS, columns, label=label))
    slow = dense(pair, z, label, columns, "first", beta)
    bound = FLOAT32 * (20 if beta == 1 else 1)  # -ln 1e-8 multiplies a difference of masses
    torch.testing.assert_close(fast.double(), slow, rtol=bound, atol=bound)


def test_temperature_reaches_the_caller_and_the_factor(pair: Any, make_view: MakeView) -> None:
    z, label, columns = random_case(pair, np.random.default_rng(4), 8)
    loss = GOLD(pair.setup(tau=2.0))
    assert loss.temperature == 2
    fast = loss.terms(make_view(z, FIRST, LENGTHS, columns, 2.0, label=label))
    torch.testing.assert_close(fast, dense(pair, z / 2, label, columns, "first", 0.5), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_zero_where_the_student_is_the_teacher(pair: Any, make_view: MakeView, beta: float) -> None:
    """Every matched token kept with the student's probability, the others with equal sorted values."""
    matched = matched_ids(pair)
    p = np.random.default_rng(5).dirichlet(np.full(24, 0.7))
    outside = np.sort(np.delete(p, matched))[::-1]
    columns = {
        "gold_count": [len(matched)],
        "gold_ids": np.array(matched),
        "gold_logprob": np.log(p[matched]),
        "gold_other_count": [len(outside)],
        "gold_other_logprob": np.log(outside),
        "factor_logprob": [0.0],
    }
    z = torch.tensor(np.log(p)[None], requires_grad=True)
    loss = GOLD(pair.setup(beta=beta))
    assert float(loss.terms(make_view(z, [0], [1], columns)).detach()) == pytest.approx(0, abs=1e-12)
    if 0 < beta < 1:
        loss.matched = loss.matched._replace(other_weight=0.0)  # an absolute value has no gradient at 0
        (grad,) = torch.autograd.grad(loss.terms(make_view(z, [0], [1], columns)).sum(), z)
        assert grad.abs().max() < 1e-9


def test_by_hand(pair: Any, make_view: MakeView) -> None:
    """p(2) = .4, p(3) = .2 in M; the teacher kept 2 with .6 and, outside M, .3. Outside M the student has .1 twice
    and .2 once."""
    matched = matched_ids(pair)
    assert {2, 3} <= set(matched)
    outside = [s for s in range(24) if s not in matched]
    p = np.full((1, 24), 1e-300)
    p[0, [2, 3, *outside[:3]]] = [0.4, 0.2, 0.1, 0.2, 0.1]
    columns = {
        "gold_count": [1],
        "gold_ids": np.array([2]),
        "gold_logprob": np.log([0.6]),
        "gold_other_count": [1],
        "gold_other_logprob": np.log([0.3]),
        "factor_logprob": [0.0],
    }
    term = GOLD(pair.setup()).terms(make_view(torch.tensor(np.log(p)), [0], [1], columns))
    jsd = 0.5 * 0.6 * np.log(0.6 / 0.5) + 0.5 * 0.4 * np.log(0.4 / 0.5) + 0.5 * 0.2 * np.log(2)
    l1 = 0.1 + 0.1 + 0.1
    weight = len(matched) / 30
    assert float(term) == pytest.approx(weight * jsd + (1 - weight) * l1, rel=1e-12)


@pytest.mark.parametrize("at", [2, 3])
def test_reverse_counts_no_teacher_probability_below_1e8(pair: Any, make_view: MakeView, at: int) -> None:
    """beta = 1, all of the student's mass on a matched token that the teacher did not keep, or with e^-50."""
    p = np.full((1, 24), 1e-300)
    p[0, at] = 1.0
    columns = {
        "gold_count": [1],
        "gold_ids": np.array([2]),
        "gold_logprob": [-50.0],
        "gold_other_count": [0],
        "gold_other_logprob": np.zeros(0),
        "factor_logprob": [0.0],
    }
    loss = GOLD(pair.setup(beta=1.0))
    term = loss.terms(make_view(torch.tensor(np.log(p)), [0], [1], columns))
    assert float(term) == pytest.approx(loss.matched.weight * 8 * np.log(10), rel=1e-9)


def test_all_student_tokens_matched(make_view: MakeView, pair: Any) -> None:
    """Nothing is outside M on the student's side: the teacher's other values meet zeros."""
    setup = pair.setup()
    w = type(setup.w)(
        np.arange(24, dtype=np.int32), np.arange(24, dtype=np.int32), np.ones(24, np.float32), *[np.ones(24, bool)] * 2
    )
    loss = GOLD(type(setup)(w, setup.vocab, 24, 30, torch.device("cpu")))
    z = torch.tensor(np.random.default_rng(6).normal(0, 1, (1, 24)), requires_grad=True)
    p = z.detach().softmax(-1)[0].numpy()
    columns = {
        "gold_count": [24],
        "gold_ids": np.arange(24),
        "gold_logprob": np.log(p),
        "gold_other_count": [2],
        "gold_other_logprob": np.log([0.2, 0.1]),
        "factor_logprob": [0.0],
    }
    term = loss.terms(make_view(z, [0], [1], columns))
    assert float(term.detach()) == pytest.approx(6 / 30 * 0.3, abs=1e-9)
    (grad,) = torch.autograd.grad(term.sum(), z)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_degenerate_rows_give_numbers(pair: Any, make_view: MakeView, beta: float, scale: float) -> None:
    """A certain teacher, kept entries of probability 0, an impossible continuation, a certain student."""
    z = torch.tensor(np.random.default_rng(7).normal(0, 1, (5, 24)) * scale, dtype=torch.float32).requires_grad_()
    columns = {
        "gold_count": [1, 2, 0, 1],
        "gold_ids": np.array([2, 3, 6, 7], np.int32),
        "gold_logprob": np.array([0.0, -0.1, -np.inf, -0.5], np.float32),
        "gold_other_count": [0, 1, 2, 0],
        "gold_other_logprob": np.array([-np.inf, -0.2, -3.0], np.float32),
        "factor_logprob": np.array([0.0, -200.0, 0.0, -np.inf], np.float32),
    }
    view = make_view(z, [0, 1, 2, 3], [1, 1, 1, 2], columns, label=[0, 1, 2, 3, 4])
    terms = GOLD(pair.setup(beta=beta)).terms(view)
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert torch.isfinite(grad).all()


def test_no_chunks(pair: Any, make_view: MakeView) -> None:
    floats = {name: np.zeros(0, np.float32) for name in ("gold_logprob", "gold_other_logprob", "factor_logprob")}
    ints = {name: np.zeros(0, np.int32) for name in ("gold_count", "gold_ids", "gold_other_count")}
    assert GOLD(pair.setup()).terms(make_view(torch.zeros(3, 24), [], [], floats | ints)).shape == (0,)


def test_valid_chunks_have_entries_of_either_kind(pair: Any) -> None:
    arrays = {"gold_count": np.array([3, 0, 0], np.int32), "gold_other_count": np.array([0, 2, 0], np.int32)}
    assert GOLD(pair.setup()).valid(np.arange(3), arrays).tolist() == [True, True, False]


def test_what_w_does_not_serve_is_refused(pair: Any) -> None:
    loss = GOLD(pair.setup())
    loss.check({"gold_ids": np.array(matched_ids(pair), np.int32)})
    with pytest.raises(VerificationError, match="student id 5 "):
        loss.check({"gold_ids": np.array([2, 5], np.int32)})  # common, of other bytes
    with pytest.raises(VerificationError, match="student id 24 "):
        loss.check({"gold_ids": np.array([24], np.int32)})
    with pytest.raises(XtokenError, match="'mean'"):
        GOLD(pair.setup(merge="mean"))
