"""H-KL against its dense float64 reference, in value and gradient.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses import open_loss, reference
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, VocabArrays

EXACT = 1e-10  # float64 sums of some hundred terms
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
SLOPE = 1e-7  # central differences with step 1e-5 in float64
# Chunks of 1, 2, 3, 1 and 2 positions; positions 3, 7, 9 and 10 lie in none.
FIRST, LENGTH, POSITIONS = [0, 1, 4, 8, 11], [1, 2, 3, 1, 2], 13
CHUNKS = len(FIRST)


def logits(rng: np.random.Generator, rows: int, width: int, scale: float = 2.0) -> Tensor:
    return torch.tensor(rng.normal(0, scale, (rows, width)), dtype=torch.float64, requires_grad=True)


def hkl_columns(
    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dtype: Any = np.float64
) -> dict[str, np.ndarray]:
    return {
        "hkl_common_count": np.array([len(ids) for ids, _, _ in chunks], np.int32),
        "hkl_common_ids": np.concatenate([np.zeros(0, np.int32), *(ids for ids, _, _ in chunks)]),
        "hkl_common_logprob": np.concatenate([np.zeros(0), *(logp for _, logp, _ in chunks)]).astype(dtype),
        "hkl_other_count": np.array([len(other) for _, _, other in chunks], np.int32),
        "hkl_other_logprob": np.concatenate([np.zeros(0), *(other for _, _, other in chunks)]).astype(dtype),
    }


def reference_terms(
    z: Tensor, w: ProjectionArrays, chunks: list[Any], options: dict[str, Any], merge: str = "first"
) -> Tensor:
    """[C] by the dense formula."""
    common_set, found = w.student_id[w.common].tolist(), []
    uld, topk = options.get("uld_weight", 1.0), options.get("uncommon_topk", 8192)
    more = {name: options[name] for name in ("kl", "common_weight") if name in options}
    for (ids, logp, other), first, length in zip(chunks, FIRST, LENGTH, strict=True):
        logp_PV = z[first : first + (length if merge == "mean" else 1)].log_softmax(-1)
        common = dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True))
        p_S = logp_PV.mean(0).exp()
        found.append(reference.h_kl(p_S, common_set, common, np.exp(other).tolist(), uld, topk, **more))
    return torch.stack(found)


def compare(fast: Tensor, slow: Tensor, leaf: Tensor) -> None:
    weight = torch.linspace(0.5, 2.0, len(fast), dtype=fast.dtype)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    (ours,), (theirs,) = (torch.autograd.grad((terms * weight).sum(), leaf) for terms in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kept", [30, 8, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl": "reverse"},
        {"common_weight": 2.0, "uld_weight": 0.5},
        {"uncommon_topk": 5},
        {"uncommon_topk": 1, "uld_weight": 2.0},
        {"uncommon_topk": 13},  # as many ranks as the student has outside C
        {"uncommon_topk": 15},  # more than it has, fewer than the teacher's 19
        {"uld_weight": 0.0},
        {"common_weight": 0.0, "kl": "reverse"},
    ],
    ids=str,
)
@pytest.mark.parametrize("merge", ["first", "mean"])
def test_it_equals_its_reference(pair: Any, make_view: Any, kept: int, options: dict[str, Any], merge: str) -> None:
    rng = np.random.default_rng(2)
    z = logits(rng, POSITIONS, len(pair.weight_VU))
    chunks = [pair.hkl_chunk(rng, kept) for _ in range(CHUNKS)]
    loss = open_loss("h-kl", pair.setup(merge=merge, tau=2.0, **options))
    assert loss.temperature == 2.0
    fast = loss.terms(make_view(z, FIRST, LENGTH, hkl_columns(chunks), loss.temperature))
    compare(fast, reference_terms(z / 2, pair.arrays, chunks, options, merge), z)


@pytest.mark.parametrize("merge", ["first", "mean"])
def test_chunks_of_one_token_take_the_rows_as_they_are(pair: Any, make_view: Any, merge: str) -> None:
    rng = np.random.default_rng(3)
    z = logits(rng, CHUNKS, len(pair.weight_VU))
    chunks = [pair.hkl_chunk(rng, 8) for _ in range(CHUNKS)]
    loss = open_loss("h-kl", pair.setup(merge=merge))
    fast = loss.terms(make_view(z, range(CHUNKS), columns=hkl_columns(chunks)))
    spread = torch.zeros(POSITIONS, z.shape[1], dtype=z.dtype).index_copy(0, torch.tensor(FIRST), z)
    compare(fast, reference_terms(spread, pair.arrays, chunks, {}), z)


def small_setup(common: list[int], size: int) -> LossSetup:
    ids, yes = np.array(common, np.int32), np.ones(len(common), np.bool_)
    w = ProjectionArrays(ids, ids, np.ones(len(ids), np.float32), yes, yes)
    vocab = VocabArrays(np.zeros(size, np.bool_), np.zeros(0, np.int32), np.zeros(size, np.int32))
    return LossSetup(w, vocab, size, size, torch.device("cpu"))


def test_by_hand(make_view: Any) -> None:
    """C holds token 0: p_S = .5, p_T = .4. Outside, student (.3, .2), teacher (.25, .15, .1)."""
    z = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log()
    columns = hkl_columns([(np.array([0], np.int32), np.log([0.4]), np.log([0.25, 0.15, 0.1]))])
    found = open_loss("h-kl", small_setup([0], 3)).terms(make_view(z, [0], columns=columns))
    expected = 0.4 * np.log(0.4 / 0.5) + 0.05 + 0.05 + 0.1
    assert found.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("common", [[], [0, 1, 2]])
@pytest.mark.parametrize("others", [0, 1, 5])
def test_one_side_may_have_nothing(make_view: Any, common: list[int], others: int) -> None:
    """No pair in C or nothing outside it; lists shorter and longer than the student's vocabulary."""
    p_S = np.array([0.5, 0.2, 0.3])
    z = torch.tensor(p_S[None]).log().requires_grad_()
    other = np.linspace(0.3, 0.1, others)
    columns = hkl_columns([(np.zeros(0, np.int32), np.zeros(0), np.log(other))])
    found = open_loss("h-kl", small_setup(common, 3)).terms(make_view(z, [0], columns=columns))
    lists = np.zeros((2, 5))
    lists[0, :3] = 0 if common else -np.sort(-p_S)
    lists[1, :others] = other
    assert found.tolist() == pytest.approx([np.abs(lists[0] - lists[1]).sum()], rel=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("options", [{}, {"kl": "reverse"}, {"uncommon_topk": 3}], ids=str)
@pytest.mark.parametrize("merge", ["first", "mean"])
def test_gradient_equals_finite_differences(
    pair: Any, make_view: Any, slopes: Any, options: dict[str, Any], merge: str
) -> None:
    rng = np.random.default_rng(4)
    z = logits(rng, POSITIONS, len(pair.weight_VU), scale=1.0)
    columns = hkl_columns([pair.hkl_chunk(rng, 8) for _ in range(CHUNKS)])
    loss = open_loss("h-kl", pair.setup(merge=merge, **options))

    def total(x: Tensor) -> Tensor:
        return loss.terms(make_view(x, FIRST, LENGTH, columns)).sum()

    (grad,) = torch.autograd.grad(total(z), z)
    torch.testing.assert_close(grad, slopes(total, z), rtol=SLOPE, atol=SLOPE)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_float32_equals_the_reference_in_float64(pair: Any, make_view: Any, kl: str) -> None:
    rng = np.random.default_rng(6)
    z = logits(rng, POSITIONS, len(pair.weight_VU), scale=5.0)
    chunks = [pair.hkl_chunk(rng, 8) for _ in range(CHUNKS)]
    z32 = z.detach().float().requires_grad_()
    loss = open_loss("h-kl", pair.setup(kl=kl))
    fast = loss.terms(make_view(z32, FIRST, LENGTH, hkl_columns(chunks, np.float32)))
    slow = reference_terms(z, pair.arrays, chunks, {"kl": kl})
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)
    (ours,), (theirs,) = torch.autograd.grad(fast.sum(), z32), torch.autograd.grad(slow.sum(), z)
    torch.testing.assert_close(ours.double(), theirs, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_degenerate_rows_give_numbers(pair: Any, make_view: Any, scale: float, kl: str) -> None:
    """Probability 1, a pair of probability 0, no pair, nothing outside, logits far apart."""
    none = np.zeros(0)
    chunks = [
        (np.array([5], np.int32), np.array([0.0]), none),
        (np.array([5, 6], np.int32), np.array([0.0, -np.inf]), none),
        (none.astype(np.int32), none, np.array([0.0])),
    ]
    rows = np.random.default_rng(9).normal(0, 1, (3, len(pair.weight_VU)))
    z = (torch.tensor(rows, dtype=torch.float32) * scale).requires_grad_()
    terms = open_loss("h-kl", pair.setup(kl=kl)).terms(make_view(z, range(3), columns=hkl_columns(chunks, np.float32)))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("merge", ["first", "mean"])
def test_no_chunks_give_no_terms(pair: Any, make_view: Any, merge: str) -> None:
    z = logits(np.random.default_rng(10), 3, len(pair.weight_VU))
    terms = open_loss("h-kl", pair.setup(merge=merge)).terms(make_view(z, [], columns=hkl_columns([])))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert terms.shape == (0,)
    assert not grad.any()


def test_ids_outside_the_common_set_are_refused(pair: Any) -> None:
    loss = open_loss("h-kl", pair.setup())
    loss.check({"hkl_common_ids": np.array([5, 6], np.int32)})
    for bad in (4, 99, -1):
        with pytest.raises(VerificationError, match=f"student id {bad} "):
            loss.check({"hkl_common_ids": np.array([5, bad], np.int32)})


def test_the_kl_on_the_common_set_takes_probability_from_every_uncommon_token(pair: Any, make_view: Any) -> None:
    """Proposition 1 of X-Token (arXiv 2605.21699): with M_C the teacher's mass on the common set C, which is not
    renormalised, the gradient of each logit j outside C is p_S(j) M_C: descent lowers it whatever the text says."""
    rng = np.random.default_rng(5)
    z = logits(rng, CHUNKS, len(pair.weight_VU))
    chunks = [pair.hkl_chunk(rng, 30) for _ in range(CHUNKS)]
    loss = open_loss("h-kl", pair.setup(uld_weight=0.0))
    (grad_CV,) = torch.autograd.grad(loss.terms(make_view(z, range(CHUNKS), columns=hkl_columns(chunks))).sum(), z)
    mass_C = torch.tensor([np.exp(logp).sum() for _, logp, _ in chunks])
    outside = np.setdiff1d(np.arange(z.shape[1]), pair.arrays.student_id[pair.arrays.common])
    assert len(outside) > 3
    expected = z.softmax(-1)[:, outside] * mass_C[:, None]
    torch.testing.assert_close(grad_CV[:, outside], expected, rtol=EXACT, atol=EXACT)
    assert (grad_CV[:, outside] > 0).all()
