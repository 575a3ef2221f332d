"""ALM against its reference, at certainty, in its limit, and its debiasing chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.alm import ALM, EPS, alm, log1mexp
from xtoken.trainer.losses.base import View

EXACT = 1e-9  # the reference takes 1 - e^-1e-6 as a difference: ten digits are left
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
STEP = 1e-5  # of central differences: their own error is about its square
MODES = ["binary-kl", "limit", "abs", "reverse", "tv"]
LENGTHS = [1, 3, 1, 2]
FIRST = [0, 1, 4, 6]  # position 5 belongs to no chunk
NEXT = [1, 4, -1, 8]
POSITIONS = 9

MakeView = Callable[..., View]


def random_case(rng: np.random.Generator, width: int = 24) -> tuple[Tensor, list[int], dict[str, Any]]:
    """Logits, labels and targets; the third chunk has no position behind it, the second no stored space probability."""
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, width)), requires_grad=True)
    columns = {"teacher_logprob": -rng.exponential(3.0, 4), "alm_space_logprob": -rng.exponential(1.0, 4)}
    columns["alm_space_logprob"][1] = np.nan
    return z, rng.integers(0, width, POSITIONS).tolist(), columns


def dense(pair: Any, z: Tensor, label: list[int], columns: dict[str, Any], mode: str, outcome: bool) -> Tensor:
    p_PV, terms = z.softmax(-1), []
    for c, (first, length) in enumerate(zip(FIRST, LENGTHS, strict=True)):
        student = torch.stack([p_PV[i, label[i]].log() for i in range(first, first + length)]).sum()
        teacher = float(columns["teacher_logprob"][c])
        if outcome and NEXT[c] >= 0 and not np.isnan(columns["alm_space_logprob"][c]):
            student = student + p_PV[NEXT[c], pair.vocab.space_V].sum().log()
            teacher += float(columns["alm_space_logprob"][c])
        terms.append(reference.alm(teacher, student, mode, 10.0))
    return torch.stack(terms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("debias", [[], ["outcome"]])
def test_equals_its_reference(pair: Any, make_view: MakeView, mode: str, debias: list[str]) -> None:
    z, label, columns = random_case(np.random.default_rng(1))
    loss = ALM(pair.setup(alm=mode, alm_tau=10.0, debias=debias))
    assert loss.temperature == 1
    fast = loss.terms(make_view(z, FIRST, LENGTHS, columns, label=label, following=NEXT))
    slow = dense(pair, z, label, columns, mode, bool(debias))
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    weight = torch.arange(1.0, 5.0, dtype=torch.float64)
    (fast_grad,) = torch.autograd.grad((fast * weight).sum(), z)
    (slow_grad,) = torch.autograd.grad((slow * weight).sum(), z)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_equals_finite_differences(pair: Any, make_view: MakeView, mode: str) -> None:
    rng = np.random.default_rng(2)
    z, label, columns = random_case(rng)
    loss = ALM(pair.setup(alm=mode, debias=["outcome"], alm_tau=2.0))
    total = loss.terms(make_view(z, FIRST, LENGTHS, columns, label=label, following=NEXT)).sum()
    (grad,) = torch.autograd.grad(total, z)
    for _ in range(5):
        way = torch.tensor(rng.normal(0, 1, z.shape))
        high, low = (
            make_view(z.detach() + s * way, FIRST, LENGTHS, columns, label=label, following=NEXT) for s in (STEP, -STEP)
        )
        slope = float(loss.terms(high).sum() - loss.terms(low).sum()) / (2 * STEP)
        assert slope == pytest.approx(float((grad * way).sum()), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_float32_equals_the_reference_in_float64(pair: Any, make_view: MakeView, mode: str) -> None:
    z, label, columns = random_case(np.random.default_rng(3))
    stored = {name: values.astype(np.float32) for name, values in columns.items()}
    loss = ALM(pair.setup(alm=mode, alm_tau=10.0, debias=["outcome"]))
    fast = loss.terms(make_view(z.detach().float(), FIRST, LENGTHS, stored, label=label, following=NEXT))
    slow = dense(pair, z, label, columns, mode, True)
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)


def test_blocks_of_features_give_the_whole(pair: Any, make_view: MakeView) -> None:
    """The features of single positions, put together, serve a view without log-probabilities."""
    z, label, columns = random_case(np.random.default_rng(4))
    loss = ALM(pair.setup(debias=["outcome"]))
    view = make_view(z, FIRST, LENGTHS, columns, label=label, following=NEXT)
    blocks = [loss.features(view.logp_PV[i : i + 1], view.label_P[i : i + 1]) for i in range(POSITIONS)]
    bare = replace(view, logp_PV=torch.zeros(0, 0))
    torch.testing.assert_close(loss.terms_of(torch.cat(blocks), bare), loss.terms(view), rtol=1e-14, atol=0)


def test_by_hand(pair: Any) -> None:
    """Coins of e^-1 = .3679 and e^-2 = .1353 at tau_b = 1, without the 1e-6."""
    one = torch.tensor([-1.0 + EPS, -2.0 + EPS], dtype=torch.float64)
    forward = np.exp(-1) * 1 + (1 - np.exp(-1)) * np.log((1 - np.exp(-1)) / (1 - np.exp(-2)))
    reverse = np.exp(-2) * -1 + (1 - np.exp(-2)) * np.log((1 - np.exp(-2)) / (1 - np.exp(-1)))
    limit = (-1 + 2) + -1 * np.log(2)
    expected = {"binary-kl": forward, "reverse": reverse, "limit": limit, "abs": 1.0, "tv": 0.2325441579}
    for mode, value in expected.items():
        got = alm(one[:1], one[1:], mode, 1.0)
        assert float(got) == pytest.approx(value, rel=1e-9), mode


def test_limit_is_tau_times_binary_kl_at_large_tau(pair: Any) -> None:
    """With a = x / tau and b = y / tau, 1 - e^a is -a and e^a is 1 to first order, so the binary KL is
    ((x - y) + x log(-y) - x log(-x)) / tau, off by a share of about max(|x|, |y|) / tau. The limit subtracts its
    1e-6 from x, the binary KL from x / tau: the likelihoods are shifted so that both see the same numbers."""
    rng, tau = np.random.default_rng(5), 1e5
    x, y = (torch.tensor(-rng.uniform(0.5, 8.0, 200)) for _ in range(2))
    limit = alm(x, y, "limit")
    shift = tau * EPS - EPS
    large = alm(x + shift, y + shift, "binary-kl", tau) * tau
    torch.testing.assert_close(large, limit, rtol=2 * 8 / tau, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_certain_chunks_give_numbers(pair: Any, make_view: MakeView, mode: str) -> None:
    """Probability 1 on either side, on both, and a student that rules the text out."""
    z = torch.full((4, 24), -1e4, dtype=torch.float32)
    z[[0, 1, 2, 3], [5, 5, 5, 5]] = 0.0
    z.requires_grad_()
    columns = {"teacher_logprob": np.array([0.0, -3.0, 0.0, -500.0], np.float32)}
    view = make_view(z, [0, 1, 2, 3], [1, 1, 1, 1], columns, label=[5, 5, 6, 6])
    terms = ALM(pair.setup(alm=mode)).terms(view)
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert (terms >= 0).all()
    assert float(terms.detach()[0]) == 0
    assert torch.isfinite(grad).all()


def test_likelihoods_above_one_count_as_one(pair: Any, make_view: MakeView) -> None:
    """Rounding brings stored sums to 1e-7; 1 - e^a must not become negative."""
    columns = {"teacher_logprob": np.array([1e-5], np.float32)}
    view = make_view(torch.tensor([[0.0, -1e4]]), [0], [1], columns)
    assert float(ALM(pair.setup()).terms(view)) == 0
    assert float(ALM(pair.setup()).terms_of(torch.tensor([[1e-5]]), view)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_never_negative(pair: Any, mode: str) -> None:
    rng = np.random.default_rng(6)
    x = torch.tensor(-rng.exponential(5.0, 3000))
    close = (x * (1 + 1e-7 * torch.tensor(rng.normal(0, 1, 3000)))).clamp(max=0)
    terms = alm(x, close, mode)
    # KL terms of size 1e-2 cancel to about 1e-15 here: float64 can end a rounding below zero
    assert terms.min() > -1e-14


def test_space_mass_that_underflows_has_no_gradient_and_no_nan(pair: Any, make_view: MakeView) -> None:
    z = torch.where(torch.as_tensor(pair.vocab.space_V), -200.0, 0.0)[None].repeat(2, 1).requires_grad_()
    columns = {"teacher_logprob": np.array([-1.0], np.float32), "alm_space_logprob": np.array([-1.0], np.float32)}
    loss = ALM(pair.setup(debias=["outcome"]))
    terms = loss.terms(make_view(z, [0], [1], columns, label=[3, 3], following=[1]))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert grad[1].abs().max() == 0


def test_log1mexp() -> None:
    x = -torch.logspace(-9, 1.9, 200, dtype=torch.float64)
    exact = [np.log(-np.expm1(v)) if v > -1 else np.log1p(-np.exp(v)) for v in x.tolist()]
    torch.testing.assert_close(log1mexp(x), torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0)
    x32 = x.float().requires_grad_()
    out = log1mexp(x32)
    (grad,) = torch.autograd.grad(out.sum(), x32)
    torch.testing.assert_close(out.double(), log1mexp(x32.detach().double()), rtol=1e-6, atol=0)
    slope = -torch.exp(x32.detach().double()) / -torch.expm1(x32.detach().double())
    torch.testing.assert_close(grad.double(), slope, rtol=1e-6, atol=0)


def groups(pair: Any, space: Sequence[float], teacher: Sequence[float], **options: Any) -> Any:
    loss = ALM(pair.setup(debias=["merge"], **options))
    logspace = np.log(np.array(space, np.float32))
    arrays = {"teacher_logprob": np.array(teacher, np.float32), "alm_space_logprob": logspace}
    return loss.regroup(np.array([2, 3, 6, 7, 9][: len(space)], np.int64), arrays)


def test_merge_joins_until_a_space_is_likely(pair: Any) -> None:
    """P(space) = .05, .5, .02, .03, .9 at threshold .1: chunks 0-1 and 2-4."""
    end, joined = groups(pair, [0.05, 0.5, 0.02, 0.03, 0.9], [-1, -2, -3, -4, -5])
    assert end.tolist() == [3, 9]
    assert joined["teacher_logprob"].tolist() == [-3, -12]
    np.testing.assert_allclose(np.exp(joined["alm_space_logprob"]), [0.5, 0.9], rtol=1e-6)


def test_merge_goes_on_over_unknown_spaces_to_the_end_of_the_sample(pair: Any) -> None:
    end, joined = groups(pair, [0.5, np.nan, 0.05, 0.6, 0.01], [np.nan, -2, -3, -4, -5])
    assert end.tolist() == [2, 7, 9]
    np.testing.assert_array_equal(joined["teacher_logprob"], [np.nan, -9, -5])
    assert ALM(pair.setup()).valid(np.array([0, 2, 7]), joined).tolist() == [False, True, True]


def test_a_group_with_a_chunk_without_row_has_none(pair: Any) -> None:
    end, joined = groups(pair, [0.01, 0.5, np.nan], [np.nan, -2, -3])
    assert end.tolist() == [3, 6]
    np.testing.assert_array_equal(joined["teacher_logprob"], [np.nan, -3])


def test_merge_threshold_is_an_option(pair: Any) -> None:
    space = [0.05, 0.5, 0.02, 0.03, 0.9]
    assert groups(pair, space, [-1] * 5, alm_threshold=0.04)[0].tolist() == [2, 3, 9]
    assert groups(pair, space, [-1] * 5, alm_threshold=0.95)[0].tolist() == [9]


def test_without_merge_chunks_stay(pair: Any) -> None:
    end, arrays = np.array([1, 4]), {"teacher_logprob": np.array([-1.0, -2.0])}
    assert ALM(pair.setup()).regroup(end, arrays) == (end, arrays)
    empty = {name: np.zeros(0, np.float32) for name in ("teacher_logprob", "alm_space_logprob")}
    assert ALM(pair.setup(debias=["merge"])).regroup(np.zeros(0, np.int64), empty)[0].tolist() == []


def test_no_chunks(pair: Any, make_view: MakeView) -> None:
    columns = {name: np.zeros(0, np.float32) for name in ("teacher_logprob", "alm_space_logprob")}
    view = make_view(torch.zeros(3, 24), [], [], columns, label=[1, 2, 3])
    assert ALM(pair.setup(debias=["outcome"])).terms(view).shape == (0,)


def test_outcome_needs_a_student_token_with_a_space(pair: Any) -> None:
    setup = pair.setup(debias=["outcome"])
    setup.vocab.space_V[:] = False
    with pytest.raises(XtokenError, match="starts with a space"):
        ALM(setup)
