"""P-KL against its dense float64 reference, in value and gradient, and where numbers get hard.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary, N entries of W.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses import open_loss, reference
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, VocabArrays
from xtoken.trainer.losses.pkl import PKL

EXACT = 1e-10  # float64 sums of some hundred terms; W's weights pass through float32 on both sides
ROUNDED_W = 1e-6  # float32 rows of W sum to 1 within 1e-7, and a row inside the kept set counts as wholly inside
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
SLOPE = 1e-7  # central differences with step 1e-5 in float64
# Chunks of 1, 2, 3, 1 and 2 positions; positions 3, 7, 9 and 10 lie in none.
FIRST, LENGTH, POSITIONS = [0, 1, 4, 8, 11], [1, 2, 3, 1, 2], 13
CHUNKS = len(FIRST)


def logits(rng: np.random.Generator, rows: int, width: int, scale: float = 2.0) -> Tensor:
    return torch.tensor(rng.normal(0, scale, (rows, width)), dtype=torch.float64, requires_grad=True)


def pkl_columns(chunks: list[tuple[np.ndarray, np.ndarray, float]], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {
        "pkl_count": np.array([len(ids) for ids, _, _ in chunks], np.int32),
        "pkl_ids": np.concatenate([np.zeros(0, np.int32), *(ids for ids, _, _ in chunks)]),
        "pkl_logprob": np.concatenate([np.zeros(0), *(logp for _, logp, _ in chunks)]).astype(dtype),
        "pkl_rest_logprob": np.array([rest for _, _, rest in chunks], dtype),
    }


def stored_w(pair: Any) -> Tensor:
    return torch.tensor(pair.stored)


def as_dict(ids: np.ndarray, logp: np.ndarray) -> dict[int, float]:
    return dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True))


def reference_terms(
    z: Tensor, W: Tensor, chunks: list[Any], merge: str = "first", tau: float = 1.0, **options: Any
) -> Tensor:
    """[C] by the dense formula."""
    p_PV, found = (z / tau).softmax(-1), []
    for (ids, logp, rest), first, length in zip(chunks, FIRST, LENGTH, strict=True):
        p_S = p_PV[first : first + length].mean(0) if merge == "mean" else p_PV[first]
        found.append(reference.p_kl(p_S, W, as_dict(ids, logp), float(np.exp(rest)), **options))
    return torch.stack(found)


def one_chunk(make_view: Any, z: Tensor, chunk: Any, dtype: Any = np.float32) -> Any:
    return make_view(z, [0], columns=pkl_columns([chunk], dtype))


def weighted(terms: Tensor) -> Tensor:
    """A sum in which no chunk counts like another, so that a mix-up shows."""
    return (terms * torch.linspace(0.5, 2.0, len(terms), dtype=terms.dtype)).sum()


def compare(fast: Tensor, slow: Tensor, leaf: Tensor, bound: float) -> None:
    torch.testing.assert_close(fast, slow, rtol=bound, atol=bound)
    (ours,) = torch.autograd.grad(weighted(fast), leaf)
    (theirs,) = torch.autograd.grad(weighted(slow), leaf)
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("kept", [None, 12, 6, 1])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize(("merge", "rest"), [("first", "bucket"), ("first", "drop"), ("mean", "bucket")])
def test_it_equals_its_reference(pair: Any, make_view: Any, kept: int | None, kl: str, merge: str, rest: str) -> None:
    rng, drop = np.random.default_rng(1), merge == "mean" or rest == "drop"
    z = logits(rng, POSITIONS, len(pair.weight_VU))
    chunks = [pair.pkl_chunk(rng, kept) for _ in range(CHUNKS)]
    columns = pkl_columns(chunks)
    if drop:
        columns["pkl_rest_logprob"][:] = np.nan  # must never be read
    loss = open_loss("p-kl", pair.setup(kl=kl, rest=rest, merge=merge, tau=2.0))
    assert loss.temperature == 2.0
    fast = loss.terms(make_view(z, FIRST, LENGTH, columns, loss.temperature))
    slow = reference_terms(z, stored_w(pair), chunks, merge, 2.0, kl=kl, drop=drop)
    compare(fast, slow, z, EXACT if drop else ROUNDED_W)


def test_by_hand(make_view: Any) -> None:
    """Student (.5, .3, .2); token 1 is 3/4 teacher token 1 and 1/4 token 2; token 2 has no row.

    q = (.5, .225, .075 | .2). The teacher keeps 0 and 1: p = (.6, .3 | .1), so q_rest = .275.
    """
    rows, columns, none = np.array([0, 1, 1], np.int32), np.array([0, 1, 2], np.int32), np.zeros(3, np.bool_)
    w = ProjectionArrays(rows, columns, np.array([1, 0.75, 0.25], np.float32), none, none)
    vocab = VocabArrays(np.zeros(3, np.bool_), np.zeros(0, np.int32), np.zeros(3, np.int32))
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    chunk = (np.array([0, 1], np.int32), np.log([0.6, 0.3]), np.log(0.1))
    loss = open_loss("p-kl", LossSetup(w, vocab, 3, 3, torch.device("cpu")))
    expected = 0.6 * np.log(0.6 / 0.5) + 0.3 * np.log(0.3 / 0.225) + 0.1 * np.log(0.1 / 0.275)
    assert float(loss.terms(one_chunk(make_view, z, chunk, np.float64))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize(("merge", "rest"), [("first", "bucket"), ("first", "drop"), ("mean", "drop")])
def test_gradients_equal_finite_differences(
    pair: Any, make_view: Any, slopes: Any, kl: str, merge: str, rest: str
) -> None:
    """Of the logits, and of W's parameters."""
    rng = np.random.default_rng(4)
    z = logits(rng, POSITIONS, len(pair.weight_VU), scale=1.0)
    columns = pkl_columns([pair.pkl_chunk(rng, 5) for _ in range(CHUNKS)])
    loss = open_loss("p-kl", pair.setup(kl=kl, rest=rest, merge=merge, learn_w=True))
    (theta,) = loss.parameters()
    theta.data = theta.double() + torch.tensor(rng.normal(0, 1, len(theta)))

    def at_z(x: Tensor) -> Tensor:
        return weighted(loss.terms(make_view(x, FIRST, LENGTH, columns)))

    def at_theta(x: Tensor) -> Tensor:
        theta.data = x
        return at_z(z)

    grad_z, grad_theta = torch.autograd.grad(at_z(z), (z, theta))
    torch.testing.assert_close(grad_z, slopes(at_z, z), rtol=SLOPE, atol=SLOPE)
    torch.testing.assert_close(grad_theta, slopes(at_theta, theta), rtol=SLOPE, atol=SLOPE)
    assert grad_theta.abs().max() > 0.01, "nothing was learnt here"


def softmaxed_w(pair: Any, theta_N: Tensor) -> Tensor:
    """[V, U] from row softmaxes, one row at a time."""
    w, rows = pair.arrays, torch.zeros(pair.weight_VU.shape, dtype=theta_N.dtype)
    for s in np.unique(w.student_id):
        entries = np.flatnonzero(w.student_id == s)
        rows[s, w.teacher_id[entries].tolist()] = theta_N[entries].softmax(0)
    return rows


def test_learned_w_equals_the_reference_with_row_softmaxes(pair: Any, make_view: Any) -> None:
    rng = np.random.default_rng(11)
    z = logits(rng, POSITIONS, len(pair.weight_VU))
    chunks = [pair.pkl_chunk(rng, 7) for _ in range(CHUNKS)]
    loss = open_loss("p-kl", pair.setup(learn_w=True))
    (theta,) = loss.parameters()
    theta.data = theta.double() + torch.tensor(rng.normal(0, 1, len(theta)))
    dense = theta.detach().clone().requires_grad_()
    fast = loss.terms(make_view(z, FIRST, LENGTH, pkl_columns(chunks)))
    slow = reference_terms(z, softmaxed_w(pair, dense), chunks)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    for ours, theirs in zip(
        torch.autograd.grad(weighted(fast), (z, theta)), torch.autograd.grad(weighted(slow), (z, dense)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=ROUNDED_W, atol=ROUNDED_W)


def test_learned_weights_start_as_w_and_rows_stay_distributions(pair: Any) -> None:
    w = pair.arrays
    assert open_loss("p-kl", pair.setup()).parameters() == []
    loss = PKL(pair.setup(learn_w=True))
    (theta,) = loss.parameters()
    assert theta.shape == w.weight.shape
    np.testing.assert_allclose(loss.weights(), w.weight, rtol=1e-6)  # float32 exp of a log
    theta.data += torch.tensor(np.random.default_rng(12).normal(0, 3, len(theta)), dtype=torch.float32)
    weights = loss.weights()
    assert weights.dtype == np.float32
    np.testing.assert_allclose(np.bincount(w.student_id, weights)[2:], 1, rtol=1e-6)
    alone = np.bincount(w.student_id)[w.student_id] == 1
    assert (weights[alone] == 1).all()
    assert (weights[~alone] != w.weight[~alone]).all()


@pytest.mark.parametrize("rest", ["bucket", "drop"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_float32_equals_the_reference_in_float64(pair: Any, make_view: Any, kl: str, rest: str) -> None:
    rng = np.random.default_rng(6)
    z = logits(rng, POSITIONS, len(pair.weight_VU), scale=5.0)
    chunks = [pair.pkl_chunk(rng, 6) for _ in range(CHUNKS)]
    z32 = z.detach().float().requires_grad_()
    loss = open_loss("p-kl", pair.setup(kl=kl, rest=rest))
    fast = loss.terms(make_view(z32, FIRST, LENGTH, pkl_columns(chunks, np.float32)))
    slow = reference_terms(z, stored_w(pair), chunks, kl=kl, drop=rest == "drop")
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)
    (ours,), (theirs,) = torch.autograd.grad(fast.sum(), z32), torch.autograd.grad(slow.sum(), z)
    torch.testing.assert_close(ours.double(), theirs, rtol=FLOAT32, atol=FLOAT32)


def test_rest_pulls_when_the_student_puts_all_mass_inside(pair: Any, make_view: Any) -> None:
    """Where sum_A q is 1 to float32, log1mexp would give garbage; the gradient here is known to every digit."""
    ids, half = np.array([2, 3], np.int32), np.log(np.array([0.25, 0.25]))
    z = torch.full((1, len(pair.weight_VU)), -30.0)
    z[0, 2], z[0, 3] = 0.0, 0.0
    z.requires_grad_()
    total = open_loss("p-kl", pair.setup()).terms(one_chunk(make_view, z, (ids, half, float(np.log(0.5))))).sum()
    (grad,) = torch.autograd.grad(total, z)
    z64 = z.detach().double().requires_grad_()
    p, inside = z64.softmax(-1)[0], stored_w(pair)[:, ids]
    q_rest = (p * (1 - inside.sum(1))).sum()  # a sum of non-negative parts in float64
    exact = -0.25 * (p @ inside).log().sum() - 0.5 * q_rest.log()
    (expected,) = torch.autograd.grad(exact, z64)
    assert expected[0, 2] > 0.2, "REST must push mass out of the kept tokens"
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


def students_own_row(row: np.ndarray, kept: int = 6) -> tuple[np.ndarray, np.ndarray, float]:
    order = np.argsort(-row)[:kept]
    return order.astype(np.int32), np.log(row[order]), float(np.log1p(-row[order].sum()))


def test_it_is_zero_where_the_student_matches(pair: Any, make_view: Any) -> None:
    z = logits(np.random.default_rng(7), POSITIONS, len(pair.weight_VU))
    q = z.detach()[FIRST].softmax(-1) @ stored_w(pair)
    columns = pkl_columns([students_own_row(row) for row in q.numpy()])
    terms = open_loss("p-kl", pair.setup()).terms(make_view(z, FIRST, LENGTH, columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert terms.min() >= 0
    assert terms.max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kl", "rest"), [("forward", "bucket"), ("reverse", "bucket"), ("forward", "drop")])
def test_it_is_never_negative(pair: Any, make_view: Any, dtype: torch.dtype, kl: str, rest: str) -> None:
    rng, loss = np.random.default_rng(8), open_loss("p-kl", pair.setup(kl=kl, rest=rest))
    w = stored_w(pair)
    rows = 150
    scale = rng.choice([0.1, 1.0, 8.0], (2 * rows, 1))
    z = torch.tensor(rng.normal(0, 1, (2 * rows, len(w))) * scale).to(dtype).float()
    own = (z[:rows].double().softmax(-1) @ w).numpy()  # rounded: the KL of these is nothing but rounding
    chunks = [students_own_row(row) for row in own]
    chunks += [pair.pkl_chunk(rng, int(rng.integers(1, 20))) for _ in range(rows)]
    terms = loss.terms(make_view(z, range(2 * rows), columns=pkl_columns(chunks, np.float32)))
    assert terms.min() >= 0
    assert terms[:rows].max() < FLOAT32
    assert terms[rows:].median() > 0.1


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_degenerate_rows_give_numbers(pair: Any, make_view: Any, scale: float, kl: str) -> None:
    """Probability 1, a kept token of probability 0, no REST, REST alone beyond reach, logits far apart."""
    one = (np.array([4], np.int32), np.array([0.0]), -np.inf)
    zero = (np.array([4, 5], np.int32), np.array([0.0, -np.inf]), -np.inf)
    share = np.full(len(pair.reached), 0.9 / len(pair.reached))
    everything = (pair.reached.astype(np.int32), np.log(share), np.log(0.1))
    rows = np.random.default_rng(9).normal(0, 1, (3, len(pair.weight_VU)))
    z = (torch.tensor(rows, dtype=torch.float32) * scale).requires_grad_()
    view = make_view(z, range(3), columns=pkl_columns([one, zero, everything], np.float32))
    terms = open_loss("p-kl", pair.setup(kl=kl)).terms(view)
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert terms.min() >= 0
    assert torch.isfinite(grad).all()


def test_full_cover_without_student_rest_stays_finite(make_view: Any) -> None:
    """W has no empty row and the target keeps every column, yet the teacher has REST: q_rest is 0."""
    n = 4
    ids, ones = np.arange(n, dtype=np.int32), np.ones(n, np.bool_)
    eye = ProjectionArrays(ids, ids, np.ones(n, np.float32), ones, ones)
    setup = LossSetup(eye, VocabArrays(np.zeros(n, np.bool_), ids, ids), n, n, torch.device("cpu"))
    z = torch.zeros(1, n, requires_grad=True)
    chunk = (ids, np.log(np.full(n, 0.2)), float(np.log(0.2)))
    terms = open_loss("p-kl", setup).terms(one_chunk(make_view, z, chunk))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("merge", "rest"), [("first", "bucket"), ("first", "drop"), ("mean", "drop")])
def test_no_chunks_give_no_terms(pair: Any, make_view: Any, merge: str, rest: str) -> None:
    z = logits(np.random.default_rng(10), 3, len(pair.weight_VU))
    terms = open_loss("p-kl", pair.setup(merge=merge, rest=rest)).terms(make_view(z, [], columns=pkl_columns([])))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert terms.shape == (0,)
    assert not grad.any()


def test_a_view_cut_in_two_has_the_same_terms(pair: Any, make_view: Any) -> None:
    rng, loss = np.random.default_rng(13), open_loss("p-kl", pair.setup())
    z = logits(rng, POSITIONS, len(pair.weight_VU))
    chunks = [pair.pkl_chunk(rng, 6) for _ in range(CHUNKS)]
    whole = loss.terms(make_view(z, FIRST, LENGTH, pkl_columns(chunks)))
    left = loss.terms(make_view(z[:4], FIRST[:2], LENGTH[:2], pkl_columns(chunks[:2])))
    shifted = [first - 4 for first in FIRST[2:]]
    right = loss.terms(make_view(z[4:], shifted, LENGTH[2:], pkl_columns(chunks[2:])))
    torch.testing.assert_close(torch.cat([left, right]), whole, rtol=0, atol=0)


def test_truncation_only_lowers_it(pair: Any, make_view: Any) -> None:
    """Merging cells cannot raise a KL (log-sum inequality): a kept set never has more than one that contains it."""
    rng = np.random.default_rng(14)
    p = rng.dirichlet(np.full(len(pair.reached), 0.4))
    order = np.argsort(-p)
    loss = open_loss("p-kl", pair.setup())
    z = logits(rng, 1, len(pair.weight_VU), scale=3.0)
    values = []
    for kept in range(1, len(p) + 1):
        logp, tail = np.log(p[order[:kept]]), p[order[kept:]].sum()
        chunk = (pair.reached[order[:kept]].astype(np.int32), logp, float(np.log(tail)) if tail else -np.inf)
        values.append(float(loss.terms(one_chunk(make_view, z, chunk, np.float64)).detach()))
    assert values[0] < values[-1] / 2, "the tail does not matter here"
    assert (np.diff(values) >= -EXACT).all()


def test_a_second_backward_pass_is_refused(pair: Any, make_view: Any) -> None:
    """The buffer of the first has become its gradient."""
    rng = np.random.default_rng(15)
    z = logits(rng, 1, len(pair.weight_VU))
    total = open_loss("p-kl", pair.setup()).terms(one_chunk(make_view, z, pair.pkl_chunk(rng, 6))).sum()
    torch.autograd.grad(total, z, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(total, z)


def test_ids_that_w_does_not_reach_are_refused(pair: Any) -> None:
    loss = open_loss("p-kl", pair.setup())
    loss.check({"pkl_ids": pair.reached.astype(np.int32)})
    with pytest.raises(VerificationError, match="teacher id 29"):
        loss.check({"pkl_ids": np.array([3, 29], np.int32)})
    with pytest.raises(VerificationError, match="teacher id 99"):
        loss.check({"pkl_ids": np.array([99], np.int32)})
