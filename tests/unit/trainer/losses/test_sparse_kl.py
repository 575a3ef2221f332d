"""The divergence with REST, what truncation costs, and the loss of a teacher that shares the tokenizer.

Shapes: P positions, C chunks, V vocabulary, K entries summed over chunks.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses import open_loss, reference
from xtoken.trainer.losses.divergence import NOTHING, group_logsumexp, kept_and_tail, kl_with_tail, ranges

EXACT = 1e-10  # float64 sums of some hundred terms
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
SLOPE = 1e-7  # central differences with step 1e-5 in float64
FIRST, LENGTH, POSITIONS = [0, 2, 3, 6], [1, 1, 2, 1], 7


def log(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("kl", "drop", "expected"),
    [
        ("forward", False, 0.5 * np.log(2) + 0.3 * np.log(1.2) + 0.2 * np.log(0.4)),
        ("reverse", False, 0.25 * np.log(0.5) + 0.25 * np.log(1 / 1.2) + 0.5 * np.log(2.5)),
        ("forward", True, 0.625 * np.log(1.25) + 0.375 * np.log(0.75)),
        ("reverse", True, 0.5 * np.log(0.8) + 0.5 * np.log(4 / 3)),
    ],
)
def test_by_hand(kl: str, drop: bool, expected: float) -> None:
    """p = (.5, .3 | .2), q = (.25, .25 | .5); without REST (.625, .375) and (.5, .5)."""
    rest, rest_q = (log(float("nan")), None) if drop else (log(0.2), log(0.5))
    found = kl_with_tail(log(0.5, 0.3), log(0.25, 0.25), torch.tensor([0, 0]), rest, rest_q, kl)
    assert found.tolist() == pytest.approx([expected], rel=1e-12)


def test_no_rest_is_an_empty_cell_forward_and_the_floor_in_reverse() -> None:
    p, q, chunk, none = log(0.5, 0.5), log(0.4, 0.5), torch.tensor([0, 0]), log(0.0)
    forward = 0.5 * np.log(1.25)
    assert float(kl_with_tail(p, q, chunk, none, log(0.1))) == pytest.approx(forward, rel=1e-12)
    reverse = 0.4 * np.log(0.8) + 0.1 * (np.log(0.1) - np.log(2.0**-24))
    for rest in (none, none.clamp(min=-100), log(2.0**-24)):  # what float32 sums cannot see is none
        assert float(kl_with_tail(p, q, chunk, rest, log(0.1), "reverse")) == pytest.approx(reverse, rel=1e-12)


def test_the_floor_at_zero_keeps_the_gradient() -> None:
    """Log-probabilities that sum to 1 + 1e-6 give a KL of -1e-6: reported as 0, with the gradient as it is."""
    q = torch.tensor([0.5, 0.5], dtype=torch.float64).log().add(1e-6).requires_grad_()
    found = kl_with_tail(log(0.5, 0.5), q, torch.tensor([0, 0]), log(0.0), log(1e-30))
    (grad,) = torch.autograd.grad(found.sum(), q)
    assert found.tolist() == [0.0]
    assert grad.tolist() == pytest.approx([-0.5, -0.5])


def tails(rng: np.random.Generator) -> Any:
    """Two random distributions over 40 cells of which ``kept`` are kept."""
    p, q = rng.dirichlet(np.full(40, rng.choice([0.1, 0.5, 3.0])), 2) + 1e-12
    order = np.argsort(-p)
    return p[order] / p.sum(), q[order] / q.sum(), int(rng.integers(1, 39))


def test_truncation_costs_the_conditional_kl_of_the_tail() -> None:
    """full - bucket = rest * KL(p given tail || q given tail), between 0 and rest * the largest log-ratio there.

    Proof: in sum_tail p log(p/q) write p = rest p', q = q_rest q' with p' and q' summing to 1; the sum is
    rest log(rest/q_rest) + rest sum p' log(p'/q'), and the first part is what the bucket has.
    """
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, q, kept = tails(rng)
        rest, rest_q = p[kept:].sum(), q[kept:].sum()
        inside = torch.zeros(kept, dtype=torch.long)
        bucket = float(kl_with_tail(log(*p[:kept]), log(*q[:kept]), inside, log(rest), log(rest_q)))
        full = float((p * np.log(p / q)).sum())
        tail_p, tail_q = p[kept:] / rest, q[kept:] / rest_q
        assert full - bucket == pytest.approx(rest * (tail_p * np.log(tail_p / tail_q)).sum(), abs=1e-12)
        assert -1e-12 <= full - bucket <= rest * np.log(tail_p / tail_q).max() + 1e-12


def test_truncation_turns_the_gradient_by_at_most_twice_rest() -> None:
    """With respect to log q, full pulls the tail by p, the bucket by rest * q given tail; elsewhere they agree."""
    rng, far = np.random.default_rng(1), 0.0
    for _ in range(100):
        p, q, kept = tails(rng)
        rest, inside = p[kept:].sum(), torch.zeros(kept, dtype=torch.long)
        logq = log(*q).requires_grad_()
        bucket = kl_with_tail(log(*p[:kept]), logq[:kept], inside, log(rest), logq[kept:].logsumexp(0)[None])
        (grad,) = torch.autograd.grad(bucket.sum(), logq)
        distance = np.abs(grad.numpy() + p).sum()  # the full KL's gradient is -p
        assert distance <= 2 * rest + 1e-12
        far = max(far, distance / rest)
    assert far > 1, "the bound was never put to the test"


def test_ranges_and_group_sums() -> None:
    owner, value = ranges(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3]))
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert value.tolist() == [5, 6, 9, 10, 11]
    x = torch.tensor([-1000.0, -1001.0, 1000.0, -torch.inf])
    found = group_logsumexp(x, torch.tensor([1, 1, 0, 0]), 2)
    torch.testing.assert_close(found, torch.stack([x[2:].logsumexp(0), x[:2].logsumexp(0)]))


def test_kept_and_tail_equals_the_dense_sum() -> None:
    """Value, and gradient of both results with respect to the log-probabilities and the shares."""
    rng = np.random.default_rng(2)
    z = torch.tensor(rng.normal(0, 2, (4, 9)), dtype=torch.float64, requires_grad=True)
    place_E, place_M = torch.tensor([3, 3, 12, 30]), torch.tensor([3, 12, 30])
    share_M = torch.tensor([0.25, NOTHING, 0.6], dtype=torch.float64, requires_grad=True)
    pull_E, pull_P = torch.tensor(rng.normal(0, 1, 4)), torch.tensor(rng.normal(0, 1, 4))
    logp = z.log_softmax(-1)
    share = torch.ones(36, dtype=torch.float64).index_put((place_M,), share_M).view(4, 9)
    slow = (logp.flatten()[place_E] @ pull_E) + ((logp.exp() * share).sum(1).log() @ pull_P)
    logp_E, rest_P = kept_and_tail(z.log_softmax(-1), place_E, place_M, share_M)
    fast = logp_E @ pull_E + rest_P @ pull_P
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=EXACT)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (z, share_M)), torch.autograd.grad(slow, (z, share_M)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def rows(rng: np.random.Generator, size: int, kept: int) -> dict[str, np.ndarray]:
    """Target columns of ``len(FIRST)`` random rows."""
    p = rng.dirichlet(np.full(size, 0.3), len(FIRST))
    order = np.argsort(-p, axis=1)[:, :kept]
    kept_p = np.take_along_axis(p, order, 1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.clip(1 - kept_p.sum(1), 0, None)) if kept < size else np.full(len(FIRST), -np.inf)
    return {
        "skl_count": np.full(len(FIRST), kept, np.int32),
        "skl_ids": order.flatten().astype(np.int32),
        "skl_logprob": np.log(kept_p.flatten()),
        "skl_rest_logprob": rest,
    }


def dense(z: Tensor, columns: dict[str, np.ndarray], **options: Any) -> Tensor:
    ids, p = (columns[name].reshape(len(FIRST), -1) for name in ("skl_ids", "skl_logprob"))
    q = z.softmax(-1)
    return torch.stack(
        [
            reference.sparse_kl(
                q[first],
                dict(zip(ids[c].tolist(), np.exp(p[c]).tolist(), strict=True)),
                float(np.exp(columns["skl_rest_logprob"][c])),
                **options,
            )
            for c, first in enumerate(FIRST)
        ]
    )


@pytest.mark.parametrize("kept", [20, 10, 1])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("rest", ["bucket", "drop"])
def test_same_tokenizer_equals_the_reference(pair: Any, make_view: Any, kept: int, kl: str, rest: str) -> None:
    rng, size = np.random.default_rng(3), len(pair.weight_VU)
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, size)), dtype=torch.float64, requires_grad=True)
    columns = rows(rng, size, kept)
    loss = open_loss("sparse-kl", pair.setup(kl=kl, rest=rest, tau=2.0))
    assert loss.temperature == 2.0
    slow = dense(z / 2, columns, kl=kl, drop=rest == "drop")
    if rest == "drop":
        columns["skl_rest_logprob"][:] = np.nan  # must never be read
    fast = loss.terms(make_view(z, FIRST, LENGTH, columns, loss.temperature))
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    (ours,), (theirs,) = (torch.autograd.grad((terms * weight).sum(), z) for terms in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_same_tokenizer_at_full_vocabulary_is_the_plain_kl(pair: Any, make_view: Any, kl: str) -> None:
    """At K = V, where the student has no cell left for REST, bucket and drop alike."""
    rng, size = np.random.default_rng(4), len(pair.weight_VU)
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, size)), dtype=torch.float64, requires_grad=True)
    columns = rows(rng, size, size)
    ids = torch.tensor(columns["skl_ids"]).long().view(len(FIRST), size)
    logp = torch.tensor(columns["skl_logprob"]).view(ids.shape)
    logq = z[FIRST].log_softmax(-1).gather(1, ids)
    plain = ((logp.exp() * (logp - logq)) if kl == "forward" else (logq.exp() * (logq - logp))).sum(1)
    (expected,) = torch.autograd.grad(plain.sum(), z)
    for rest in ("bucket", "drop"):
        fast = open_loss("sparse-kl", pair.setup(kl=kl, rest=rest)).terms(make_view(z, FIRST, LENGTH, columns))
        (grad,) = torch.autograd.grad(fast.sum(), z)
        torch.testing.assert_close(fast, plain, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(grad, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("kl", "rest"), [("forward", "bucket"), ("reverse", "bucket"), ("forward", "drop")])
def test_same_tokenizer_gradient_equals_finite_differences(
    pair: Any, make_view: Any, slopes: Any, kl: str, rest: str
) -> None:
    rng = np.random.default_rng(5)
    size = len(pair.weight_VU)
    z = torch.tensor(rng.normal(0, 1, (POSITIONS, size)), dtype=torch.float64, requires_grad=True)
    loss, columns = open_loss("sparse-kl", pair.setup(kl=kl, rest=rest)), rows(rng, size, 6)

    def total(x: Tensor) -> Tensor:
        return loss.terms(make_view(x, FIRST, LENGTH, columns)).sum()

    (grad,) = torch.autograd.grad(total(z), z)
    torch.testing.assert_close(grad, slopes(total, z), rtol=SLOPE, atol=SLOPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_same_tokenizer_is_zero_at_the_teacher_and_never_negative(
    pair: Any, make_view: Any, dtype: torch.dtype, kl: str
) -> None:
    rng = np.random.default_rng(6)
    size = len(pair.weight_VU)
    z = torch.tensor(rng.normal(0, 3, (200, size))).to(dtype).float()
    logp = z.double().log_softmax(-1)
    top = logp.topk(5)
    rest = torch.log(-torch.expm1(top.values.logsumexp(1)))
    columns = {
        "skl_count": np.full(200, 5),
        "skl_ids": top.indices.flatten().numpy(),
        "skl_logprob": top.values.flatten().float().numpy(),
        "skl_rest_logprob": rest.float().numpy(),
    }
    loss = open_loss("sparse-kl", pair.setup(kl=kl))
    own = loss.terms(make_view(z, range(200), columns=columns))
    other = loss.terms(make_view(z.flip(0), range(200), columns=columns))
    assert own.min() >= 0
    assert own.max() < FLOAT32
    assert other.min() > FLOAT32


def test_no_chunks_give_no_terms(pair: Any, make_view: Any) -> None:
    none = {name: np.zeros(0, kind) for name, kind in [("skl_count", np.int32), ("skl_ids", np.int32)]}
    columns = none | {name: np.zeros(0, np.float32) for name in ("skl_logprob", "skl_rest_logprob")}
    z = torch.zeros(2, len(pair.weight_VU), requires_grad=True)
    terms = open_loss("sparse-kl", pair.setup()).terms(make_view(z, [], columns=columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert terms.shape == (0,)
    assert not grad.any()


def test_ids_beyond_the_vocabulary_are_refused(pair: Any) -> None:
    loss = open_loss("sparse-kl", pair.setup())
    loss.check({"skl_ids": np.array([0, 23], np.int32)})
    for bad in (24, -1):
        with pytest.raises(VerificationError, match=f"id {bad} in skl_ids"):
            loss.check({"skl_ids": np.array([3, bad], np.int32)})
