"""Every loss against its dense float64 reference, in value and gradient, and where numbers get hard."""

from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import VerificationError
from trainer.losses import MODULES, open_loss, reference
from trainer.losses.base import LossSetup, ProjectionArrays
from trainer.losses.pkl import PKL
from trainer.losses.sparse_kl import sparse_kl_total

EXACT = 1e-10  # float64 sums of some hundred terms; W's weights pass through float32 on both sides
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
CHUNKS = 7


def logits(rng: np.random.Generator, rows: int, width: int, scale: float = 2.0) -> torch.Tensor:
    return torch.tensor(rng.normal(0, scale, (rows, width)), dtype=torch.float64, requires_grad=True)


def pkl_targets(chunks: list[tuple[np.ndarray, np.ndarray, float]], dtype: Any = np.float64) -> dict[str, torch.Tensor]:
    return {
        "pkl_count": torch.tensor([len(ids) for ids, _, _ in chunks]),
        "pkl_ids": torch.from_numpy(np.concatenate([ids for ids, _, _ in chunks])),
        "pkl_logprob": torch.from_numpy(np.concatenate([logp for _, logp, _ in chunks]).astype(dtype)),
        "pkl_rest_logprob": torch.from_numpy(np.array([rest for _, _, rest in chunks], dtype)),
    }


def hkl_targets(chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {
        "hkl_common_count": torch.tensor([len(ids) for ids, _, _ in chunks]),
        "hkl_common_ids": torch.from_numpy(np.concatenate([ids for ids, _, _ in chunks])),
        "hkl_common_logprob": torch.from_numpy(np.concatenate([logp for _, logp, _ in chunks])),
        "hkl_other_count": torch.tensor([len(other) for _, _, other in chunks]),
        "hkl_other_logprob": torch.from_numpy(np.concatenate([other for _, _, other in chunks])),
    }


def value_and_grad(total: torch.Tensor, leaf: torch.Tensor) -> tuple[float, torch.Tensor]:
    (grad,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), grad


def stored_w(pair: Any) -> torch.Tensor:
    """W as the float32 file holds it: the reference must read the same numbers."""
    return torch.tensor(pair.weight_VU.astype(np.float32).astype(np.float64))


def reference_pkl(pair: Any, z: torch.Tensor, chunks: list[Any]) -> torch.Tensor:
    p_S = z.softmax(-1)
    return sum(
        reference.p_kl(
            p_S[c], stored_w(pair), dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True)), float(np.exp(rest))
        )
        for c, (ids, logp, rest) in enumerate(chunks)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("kept", [None, 12, 6, 1])
def test_pkl_equals_its_reference(pair: Any, kept: int | None) -> None:
    rng = np.random.default_rng(1)
    z = logits(rng, CHUNKS, len(pair.weight_VU))
    chunks = [pair.pkl_chunk(rng, kept) for _ in range(CHUNKS)]
    fast = value_and_grad(PKL(pair.setup()).total(z.log_softmax(-1), pkl_targets(chunks)), z)
    slow = value_and_grad(reference_pkl(pair, z, chunks), z)
    # 1 - W's row sum is exact in neither: float32 rows sum to 1 within 1e-7
    bound = EXACT if kept is None else 1e-6
    assert fast[0] == pytest.approx(slow[0], rel=bound)
    torch.testing.assert_close(fast[1], slow[1], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("kept", "topk", "uld"), [(30, 8192, 1.0), (8, 8192, 0.5), (30, 5, 1.0), (8, 1, 2.0), (8, 5, 0.0)]
)
def test_hkl_equals_its_reference(pair: Any, kept: int, topk: int, uld: float) -> None:
    rng = np.random.default_rng(2)
    z = logits(rng, CHUNKS, len(pair.weight_VU))
    chunks = [pair.hkl_chunk(rng, kept) for _ in range(CHUNKS)]
    loss = open_loss("h-kl", pair.setup(uld_weight=uld, uncommon_topk=topk))
    fast = value_and_grad(loss.total(z.log_softmax(-1), hkl_targets(chunks)), z)
    w = pair.arrays
    p_S, common_set = z.softmax(-1), w.student_id[w.common].tolist()
    total = torch.zeros((), dtype=torch.float64)
    for c, (ids, logp, other) in enumerate(chunks):
        common = dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True))
        total = total + reference.h_kl(p_S[c], common_set, common, np.exp(other).tolist(), uld, topk)
    slow = value_and_grad(total, z)
    assert fast[0] == pytest.approx(slow[0], rel=EXACT)
    torch.testing.assert_close(fast[1], slow[1], rtol=EXACT, atol=EXACT)


def test_ce_equals_its_reference() -> None:
    from trainer.losses.ce import cross_entropy_total

    z, labels = logits(np.random.default_rng(3), 5, 11), torch.tensor([0, 10, 3, 3, 7])
    fast = value_and_grad(cross_entropy_total(z.log_softmax(-1), labels), z)
    p_S = z.softmax(-1)
    slow = value_and_grad(
        torch.stack([reference.cross_entropy(p, int(t)) for p, t in zip(p_S, labels, strict=True)]).sum(), z
    )
    assert fast[0] == pytest.approx(slow[0], rel=EXACT)
    torch.testing.assert_close(fast[1], slow[1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["p-kl", "h-kl"])
def test_gradient_equals_finite_differences(pair: Any, name: str) -> None:
    rng = np.random.default_rng(4)
    z = logits(rng, 3, len(pair.weight_VU), scale=1.0)
    if name == "p-kl":
        targets = pkl_targets([pair.pkl_chunk(rng, 5) for _ in range(3)])
    else:
        targets = hkl_targets([pair.hkl_chunk(rng, 8) for _ in range(3)])
    loss = open_loss(name, pair.setup())
    assert torch.autograd.gradcheck(lambda x: loss.total(x.log_softmax(-1), targets), (z,), eps=1e-6, atol=1e-6)


def test_pkl_in_float32_equals_the_reference_in_float64(pair: Any) -> None:
    rng = np.random.default_rng(6)
    z = logits(rng, CHUNKS, len(pair.weight_VU), scale=5.0)
    chunks = [pair.pkl_chunk(rng, 6) for _ in range(CHUNKS)]
    z32 = z.detach().float().requires_grad_()
    fast = value_and_grad(PKL(pair.setup()).total(z32.log_softmax(-1), pkl_targets(chunks, np.float32)), z32)
    slow = value_and_grad(reference_pkl(pair, z, chunks), z)
    assert fast[0] == pytest.approx(slow[0], rel=FLOAT32)
    torch.testing.assert_close(fast[1].double(), slow[1], rtol=FLOAT32, atol=FLOAT32)


def test_pkl_pulls_on_rest_when_the_student_puts_all_mass_inside(pair: Any) -> None:
    """Where sum_A q is 1 to float32, log1mexp would give garbage; the gradient here is known to every digit."""
    ids = np.array([2, 3], np.int32)
    half = np.log(np.array([0.25, 0.25]))
    z = torch.full((1, len(pair.weight_VU)), -30.0)
    z[0, 2], z[0, 3] = 0.0, 0.0
    z.requires_grad_()
    total = PKL(pair.setup()).total(z.log_softmax(-1), pkl_targets([(ids, half, float(np.log(0.5)))], np.float32))
    _, grad = value_and_grad(total, z)
    z64 = z.detach().double().requires_grad_()
    p = z64.softmax(-1)[0]
    inside = stored_w(pair)[:, ids]
    q_rest = (p * (1 - inside.sum(1))).sum()  # a sum of non-negative parts in float64
    exact = -0.25 * (p @ inside).log().sum() - 0.5 * q_rest.log()
    _, expected = value_and_grad(exact, z64)
    assert expected[0, 2] > 0.2, "REST must push mass out of the kept tokens"
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_pkl_is_zero_where_the_student_matches(pair: Any) -> None:
    z = logits(np.random.default_rng(7), 4, len(pair.weight_VU))
    q = z.detach().softmax(-1) @ stored_w(pair)
    chunks = []
    for row in q.numpy():
        order = np.argsort(-row)[:6]
        chunks.append((order.astype(np.int32), np.log(row[order]), float(np.log1p(-row[order].sum()))))
    value, grad = value_and_grad(PKL(pair.setup()).total(z.log_softmax(-1), pkl_targets(chunks)), z)
    assert 0 <= value < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pkl_is_never_negative(pair: Any, dtype: torch.dtype) -> None:
    rng, loss = np.random.default_rng(8), PKL(pair.setup())
    w = stored_w(pair)
    for trial in range(300):
        z = torch.tensor(rng.normal(0, rng.choice([0.1, 1.0, 8.0]), (1, len(w)))).to(dtype).float()
        if trial % 2:
            chunk = pair.pkl_chunk(rng, int(rng.integers(1, 20)))
        else:  # the student's own row, rounded: the KL is nothing but rounding
            row = (z.double().softmax(-1)[0] @ w).numpy()
            order = np.argsort(-row)[:6]
            chunk = (order.astype(np.int32), np.log(row[order]), float(np.log1p(-row[order].sum())))
        value = float(loss.total(z.log_softmax(-1), pkl_targets([chunk], np.float32)))
        assert value >= 0, (trial, value)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_degenerate_rows_give_numbers(pair: Any, scale: float) -> None:
    """Probability 1, a kept token of probability 0, no REST, REST alone beyond reach, logits far apart."""
    one = (np.array([4], np.int32), np.array([0.0]), -np.inf)
    zero = (np.array([4, 5], np.int32), np.array([0.0, -np.inf]), -np.inf)
    everything = (
        pair.reached.astype(np.int32),
        np.log(np.full(len(pair.reached), 0.9 / len(pair.reached))),
        np.log(0.1),
    )
    z = (
        torch.tensor(np.random.default_rng(9).normal(0, 1, (3, len(pair.weight_VU))), dtype=torch.float32) * scale
    ).requires_grad_()
    value, grad = value_and_grad(
        PKL(pair.setup()).total(z.log_softmax(-1), pkl_targets([one, zero, everything], np.float32)), z
    )
    assert np.isfinite(value)
    assert value >= 0
    assert torch.isfinite(grad).all()


def test_full_cover_without_student_rest_stays_finite() -> None:
    """W has no empty row and the target keeps every column, yet the teacher has REST: q_rest is 0."""
    n = 4
    eye = ProjectionArrays(
        np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32), np.ones(n, np.float32), np.ones(n, bool)
    )
    loss = PKL(LossSetup(eye, n, n, torch.device("cpu")))
    z = torch.zeros(1, n, requires_grad=True)
    chunk = (np.arange(n, dtype=np.int32), np.log(np.full(n, 0.2)), float(np.log(0.2)))
    value, grad = value_and_grad(loss.total(z.log_softmax(-1), pkl_targets([chunk], np.float32)), z)
    assert np.isfinite(value)
    assert torch.isfinite(grad).all()


def test_sparse_kl_by_hand() -> None:
    """p = (.5, .3 | .2), q = (.25, .25 | .5): .5 ln 2 + .3 ln 1.2 + .2 ln .4."""
    log = lambda *x: torch.tensor(x, dtype=torch.float64).log()  # noqa: E731
    total = sparse_kl_total(log(0.5, 0.3), log(0.25, 0.25), torch.tensor([0, 0]), log(0.2), log(0.5))
    assert float(total) == pytest.approx(0.5 * np.log(2) + 0.3 * np.log(1.2) + 0.2 * np.log(0.4), rel=1e-12)


def test_ids_that_w_does_not_serve_are_refused(pair: Any) -> None:
    with pytest.raises(VerificationError, match="teacher id 29"):
        PKL(pair.setup()).check({"pkl_ids": np.array([3, 29], np.int32)})
    with pytest.raises(VerificationError, match="teacher id 99"):
        PKL(pair.setup()).check({"pkl_ids": np.array([99], np.int32)})
    with pytest.raises(VerificationError, match="student id 4 "):
        open_loss("h-kl", pair.setup()).check({"hkl_common_ids": np.array([5, 4], np.int32)})


def test_registry_has_every_stored_loss() -> None:
    from schemas.tables import LOSSES, targets

    assert tuple(MODULES) == LOSSES
    setup = LossSetup(
        ProjectionArrays(*(np.zeros(0, t) for t in (np.int32, np.int32, np.float32, bool))), 2, 2, torch.device("cpu")
    )
    for name in LOSSES:
        assert set(open_loss(name, setup).columns.names) <= set(targets([name]).names)
