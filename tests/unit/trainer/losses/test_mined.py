"""MinED against its reference, by hand, and against the two losses that it is made of.

Shapes: P positions, C chunks, V student vocabulary, K entries summed over chunks.
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
ROUNDED_W = 1e-7  # weights of W are float32 on one side
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
SLOPE = 1e-7  # central differences with step 1e-5 in float64
FIRST, LENGTH, POSITIONS = [0, 1, 3, 4, 7], [1, 2, 1, 3, 1], 8
LABEL = [3, 9, 2, 2, 20, 7, 5, 11]
# The first and the third chunk are one token on either side; the last is, too, but the teacher has nothing to say.
WITH_ENTRIES = [True, False, True, False, False]


def some_columns(pair: Any, rng: np.random.Generator, kept: int = 6) -> dict[str, np.ndarray]:
    chunks = [pair.pkl_chunk(rng, kept) if filled else None for filled in WITH_ENTRIES]
    return {
        "mined_count": np.array([0 if one is None else len(one[0]) for one in chunks], np.int32),
        "mined_ids": np.concatenate([one[0] for one in chunks if one is not None]),
        "mined_logprob": np.concatenate([one[1] for one in chunks if one is not None]),
        "mined_rest_logprob": np.array([0.0 if one is None else one[2] for one in chunks]),
    }


def logits(rng: np.random.Generator, width: int, scale: float = 2.0) -> Tensor:
    return torch.tensor(rng.normal(0, scale, (POSITIONS, width)), requires_grad=True)


def slow_terms(pair: Any, z: Tensor, columns: dict[str, np.ndarray], tau: float = 1.0) -> Tensor:
    stops = np.cumsum(columns["mined_count"])[:-1]
    entries = zip(np.split(columns["mined_ids"], stops), np.split(columns["mined_logprob"], stops), strict=True)
    found, W = [], torch.tensor(pair.stored)
    for first, length, (ids, logp), tail in zip(FIRST, LENGTH, entries, columns["mined_rest_logprob"], strict=True):
        p_T = dict(zip(ids.tolist(), np.exp(logp).tolist(), strict=True))
        rows = (z / tau).softmax(-1)[first : first + length]
        found.append(reference.mined(rows, LABEL[first : first + length], W, p_T, float(np.exp(tail))))
    return torch.stack(found)


def weighted(terms: Tensor) -> Tensor:
    """A sum in which no chunk counts like another, so that a mix-up shows."""
    return (terms * torch.linspace(0.5, 2.0, len(terms), dtype=terms.dtype)).sum()


def test_by_hand(make_view: Any) -> None:
    """W: tokens 0 and 1 are exact, 2 was mined to teacher token 1, 3 has no row.

    First chunk, student (.4, .3, .2, .1): q = (.4, .5 | .1). The teacher has (.6, .3 | .1). Second chunk, labels 3 and
    0, where the student gives them .1 and .5.
    """
    rows, columns, none = np.array([0, 1, 2], np.int32), np.array([0, 1, 1], np.int32), np.zeros(3, np.bool_)
    w = ProjectionArrays(rows, columns, np.ones(3, np.float32), none, none)
    vocab = VocabArrays(np.zeros(4, np.bool_), np.zeros(0, np.int32), np.zeros(4, np.int32))
    loss = open_loss("mined", LossSetup(w, vocab, 4, 2, torch.device("cpu")))
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1]], dtype=torch.float64)
    stored = {
        "mined_count": [2, 0],
        "mined_ids": [0, 1],
        "mined_logprob": np.log([0.6, 0.3]),
        "mined_rest_logprob": [np.log(0.1), 0.0],
    }
    view = make_view(p.log(), [0, 1], [1, 2], stored, label=[2, 3, 0])
    first = 0.6 * np.log(0.6 / 0.4) + 0.3 * np.log(0.3 / 0.5) + 0.1 * np.log(0.1 / 0.1)
    assert loss.terms(view).tolist() == pytest.approx([first, -np.log(0.1) - np.log(0.5)], rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("kept", [6, 1])
def test_it_equals_its_reference(pair: Any, make_view: Any, kept: int, tau: float) -> None:
    rng = np.random.default_rng(1)
    z, columns = logits(rng, len(pair.weight_VU)), some_columns(pair, rng, kept)
    loss = open_loss("mined", pair.setup(tau=tau))
    assert loss.temperature == tau
    fast = loss.terms(make_view(z, FIRST, LENGTH, columns, tau, label=LABEL))
    slow = slow_terms(pair, z, columns, tau)
    torch.testing.assert_close(fast, slow, rtol=ROUNDED_W, atol=ROUNDED_W)
    (ours,), (theirs,) = torch.autograd.grad(weighted(fast), z), torch.autograd.grad(weighted(slow), z)
    torch.testing.assert_close(ours, theirs, rtol=ROUNDED_W, atol=ROUNDED_W)
    assert (ours.abs().amax(1) > 1e-2).all(), "every position of these chunks is pulled"


def test_gradients_equal_finite_differences(pair: Any, make_view: Any, slopes: Any) -> None:
    rng = np.random.default_rng(2)
    z, columns = logits(rng, len(pair.weight_VU), 1.0), some_columns(pair, rng)
    loss = open_loss("mined", pair.setup())

    def at(x: Tensor) -> Tensor:
        return weighted(loss.terms(make_view(x, FIRST, LENGTH, columns, label=LABEL)))

    torch.testing.assert_close(torch.autograd.grad(at(z), z)[0], slopes(at, z), rtol=SLOPE, atol=SLOPE)


def test_with_entries_everywhere_it_is_p_kl(pair: Any, make_view: Any) -> None:
    rng = np.random.default_rng(3)
    z, chunks = logits(rng, len(pair.weight_VU)), [pair.pkl_chunk(rng, 5) for _ in range(POSITIONS)]
    parts = [np.full(POSITIONS, 5), *(np.concatenate([one[i] for one in chunks]) for i in (0, 1))]
    values = [*parts, np.array([one[2] for one in chunks])]
    found = []
    for name, stem in (("mined", "mined"), ("p-kl", "pkl")):
        columns = dict(
            zip((f"{stem}_{end}" for end in ("count", "ids", "logprob", "rest_logprob")), values, strict=True)
        )
        view = make_view(z, range(POSITIONS), columns=columns, label=LABEL)
        loss = open_loss(name, pair.setup())
        found.append((loss.terms(view), torch.autograd.grad(weighted(loss.terms(view)), z)[0], loss.agrees(view)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_without_entries_it_is_the_cross_entropy_of_every_label(pair: Any, make_view: Any) -> None:
    z = logits(np.random.default_rng(4), len(pair.weight_VU))
    columns = {"mined_count": np.zeros(5, np.int32), "mined_ids": np.zeros(0, np.int32), "mined_logprob": np.zeros(0)}
    columns["mined_rest_logprob"] = np.zeros(5)
    loss = open_loss("mined", pair.setup())
    view = make_view(z, FIRST, LENGTH, columns, label=LABEL)
    label_logp = z.log_softmax(-1)[range(POSITIONS), LABEL]
    expected = torch.stack([-label_logp[f : f + n].sum() for f, n in zip(FIRST, LENGTH, strict=True)])
    torch.testing.assert_close(loss.terms(view), expected, rtol=EXACT, atol=EXACT)
    assert loss.agrees(view).shape == (0,)


def test_every_chunk_has_a_target(pair: Any) -> None:
    """A chunk without entries is learnt from its labels, so none is left out of the mean."""
    columns = some_columns(pair, np.random.default_rng(5))
    assert open_loss("mined", pair.setup()).valid(np.array(FIRST), columns).tolist() == [True] * 5


def test_float32_equals_the_reference_in_float64(pair: Any, make_view: Any) -> None:
    rng = np.random.default_rng(6)
    z, columns = logits(rng, len(pair.weight_VU), 5.0), some_columns(pair, rng)
    z32 = z.detach().float().requires_grad_()
    stored = {name: value if value.dtype.kind == "i" else value.astype(np.float32) for name, value in columns.items()}
    fast = open_loss("mined", pair.setup()).terms(make_view(z32, FIRST, LENGTH, stored, label=LABEL))
    slow = slow_terms(pair, z, columns)
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)
    (ours,), (theirs,) = torch.autograd.grad(fast.sum(), z32), torch.autograd.grad(slow.sum(), z)
    torch.testing.assert_close(ours.double(), theirs, rtol=FLOAT32, atol=FLOAT32)


def test_a_view_cut_in_two_has_the_same_terms(pair: Any, make_view: Any) -> None:
    rng, loss = np.random.default_rng(7), open_loss("mined", pair.setup())
    z, columns = logits(rng, len(pair.weight_VU)), some_columns(pair, rng)
    whole = loss.terms(make_view(z, FIRST, LENGTH, columns, label=LABEL))
    at = int(columns["mined_count"][:2].sum())
    halves = []
    for chunks, entries, positions in ((slice(2), slice(at), slice(3)), (slice(2, 5), slice(at, None), slice(3, 8))):
        mine = {
            name: value[chunks if name in ("mined_count", "mined_rest_logprob") else entries]
            for name, value in columns.items()
        }
        first = [one - positions.start if positions.start else one for one in FIRST[chunks]]
        halves.append(loss.terms(make_view(z[positions], first, LENGTH[chunks], mine, label=LABEL[positions])))
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=0)


def test_no_chunks_give_no_terms(pair: Any, make_view: Any) -> None:
    z = logits(np.random.default_rng(8), len(pair.weight_VU))
    none = np.zeros(0, np.int32)
    columns = {"mined_count": none, "mined_ids": none, "mined_logprob": np.zeros(0), "mined_rest_logprob": np.zeros(0)}
    terms = open_loss("mined", pair.setup()).terms(make_view(z, [], [], columns, label=LABEL))
    assert terms.shape == (0,)
    assert not torch.autograd.grad(terms.sum(), z)[0].any()


def test_ids_that_w_does_not_reach_are_refused(pair: Any) -> None:
    loss = open_loss("mined", pair.setup())
    loss.check({"mined_ids": pair.reached.astype(np.int32)})
    for bad in (29, 99, -1):
        with pytest.raises(VerificationError, match=f"teacher id {bad} in mined_ids"):
            loss.check({"mined_ids": np.array([3, bad], np.int32)})
