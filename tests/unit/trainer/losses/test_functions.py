"""The losses as plain functions, called as in a notebook: the values and gradients of reference.py, chunk by chunk.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary, K kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.losses import LOSSES
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.alm import alm
from xtoken.trainer.losses.base import Entries
from xtoken.trainer.losses.byte_prefix import Groups, byte_prefix
from xtoken.trainer.losses.gold import Matched, gold
from xtoken.trainer.losses.hkl import h_kl
from xtoken.trainer.losses.mined import mined
from xtoken.trainer.losses.pkl import WByColumn, p_kl
from xtoken.trainer.losses.sparse_kl import sparse_kl
from xtoken.trainer.losses.strict import strict
from xtoken.trainer.losses.uld import uld

EXACT = 1e-10  # float64 sums of some hundred terms
POSITIONS, V, U, KEPT = 6, 24, 30, 5
FIRST, LENGTH = [0, 1, 4], [1, 3, 2]
Fixed = tuple[Tensor, Tensor]  # log-probabilities [positions, U] of a teacher, and the student's logits [P, V]


@pytest.fixture
def both() -> Fixed:
    rng = np.random.default_rng(11)
    teacher = torch.tensor(rng.normal(0, 2, (POSITIONS, U))).log_softmax(-1)
    return teacher, torch.tensor(rng.normal(0, 2, (POSITIONS, V)), requires_grad=True)


def agree(z_PV: Tensor, fast_C: Tensor, slow: Sequence[Tensor]) -> None:
    """Values, and gradients of a weighted sum by the student's logits."""
    slow_C = torch.stack(list(slow))
    torch.testing.assert_close(fast_C, slow_C, rtol=EXACT, atol=EXACT)
    weight_C = torch.arange(1.0, len(slow_C) + 1, dtype=torch.float64)
    (ours,), (theirs,) = (
        torch.autograd.grad((terms * weight_C).sum(), z_PV, retain_graph=True) for terms in (fast_C, slow_C)
    )
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    assert ours.abs().max() > 1e-3, "nothing was pulled"


def kept_of(kept: Entries, chunk: int) -> dict[int, float]:
    """Probability by id of a chunk's entries."""
    stop = int(kept.count_C[: chunk + 1].sum())
    here = slice(stop - int(kept.count_C[chunk]), stop)
    return dict(zip(kept.id_K[here].tolist(), kept.logp_K[here].exp().tolist(), strict=True))


def test_top_keeps_the_most_probable_and_the_mass_of_the_others(both: Fixed) -> None:
    kept, tail_C = Entries.top(both[0], KEPT)
    for chunk, p_U in enumerate(both[0].exp()):
        assert list(kept_of(kept, chunk)) == p_U.argsort(descending=True)[:KEPT].tolist()
        assert sum(kept_of(kept, chunk).values()) + float(tail_C[chunk].exp()) == pytest.approx(1, rel=EXACT)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_sparse_kl(both: Fixed, kl: str, drop: bool) -> None:
    teacher, z = both[0][:, :V].log_softmax(-1), both[1]
    kept, tail_C = Entries.top(teacher, KEPT)
    p_S, tails = z.softmax(-1), tail_C.exp().tolist()
    slow = [reference.sparse_kl(p_S[c], kept_of(kept, c), tails[c], kl=kl, drop=drop) for c in range(POSITIONS)]
    agree(z, sparse_kl(z.log_softmax(-1), kept, tail_C, kl=kl, drop=drop), slow)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_p_kl(both: Fixed, pair: Any, kl: str, drop: bool) -> None:
    teacher, z = both[0][:, pair.reached].log_softmax(-1), both[1]
    kept, tail_C = Entries.top(teacher, KEPT)
    kept = kept._replace(id_K=torch.as_tensor(pair.reached)[kept.id_K])
    s, t = np.nonzero(pair.weight_VU)
    w = WByColumn(torch.tensor(s), torch.tensor(t), torch.tensor(pair.weight_VU[s, t]), V, U)
    W, p_S, tails = torch.tensor(pair.weight_VU), z.softmax(-1), tail_C.exp().tolist()
    slow = [reference.p_kl(p_S[c], W, kept_of(kept, c), tails[c], kl=kl, drop=drop) for c in range(POSITIONS)]
    agree(z, p_kl(z.log_softmax(-1), w, kept, tail_C, kl=kl, drop=drop), slow)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_strict(both: Fixed, kl: str) -> None:
    """The even ids are of equal bytes; the teacher's mass on the others is left out on both sides."""
    teacher, z = both
    kept, _ = Entries.top(teacher[:, :V:2], KEPT)
    kept = kept._replace(id_K=2 * kept.id_K)
    slow = [reference.strict(z.softmax(-1)[c], kept_of(kept, c), kl=kl) for c in range(POSITIONS)]
    agree(z, strict(z.log_softmax(-1), kept, kl=kl), slow)


def test_mined(both: Fixed, pair: Any) -> None:
    """Chunks of one, two, one and two tokens: the first and the third have entries, the others are one-hot."""
    (teacher, z), labels = both, torch.tensor([3, 9, 2, 2, 20, 7])
    first, length = torch.tensor([0, 1, 3, 4]), torch.tensor([1, 2, 1, 2])
    kept, tail = Entries.top(teacher[[0, 3]][:, pair.reached].log_softmax(-1), KEPT)
    tail_C = torch.zeros(4, dtype=z.dtype).index_copy(0, torch.tensor([0, 2]), tail)
    kept = Entries(torch.tensor([KEPT, 0, KEPT, 0]), torch.as_tensor(pair.reached)[kept.id_K], kept.logp_K)
    s, t = np.nonzero(pair.weight_VU)
    w = WByColumn(torch.tensor(s), torch.tensor(t), torch.tensor(pair.weight_VU[s, t]), V, U)
    slow = []
    for c, (low, count) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
        rows, text = z.softmax(-1)[low : low + count], labels[low : low + count].tolist()
        slow.append(reference.mined(rows, text, torch.tensor(pair.weight_VU), kept_of(kept, c), float(tail_C[c].exp())))
    agree(z, mined(z.log_softmax(-1), labels, w, kept, tail_C, first, length), slow)


def test_p_kl_of_the_mean_over_a_chunk(both: Fixed, pair: Any) -> None:
    teacher, z = both[0][FIRST][:, pair.reached].log_softmax(-1), both[1]
    kept, tail_C = Entries.top(teacher, KEPT)
    kept = kept._replace(id_K=torch.as_tensor(pair.reached)[kept.id_K])
    s, t = np.nonzero(pair.weight_VU)
    w = WByColumn(torch.tensor(s), torch.tensor(t), torch.tensor(pair.weight_VU[s, t]), V, U)
    means = [z.softmax(-1)[first : first + length].mean(0) for first, length in zip(FIRST, LENGTH, strict=True)]
    slow = [
        reference.p_kl(mean, torch.tensor(pair.weight_VU), kept_of(kept, c), 0.0, drop=True)
        for c, mean in enumerate(means)
    ]
    chunks = (torch.tensor(FIRST), torch.tensor(LENGTH))
    agree(z, p_kl(z.log_softmax(-1), w, kept, tail_C, *chunks, drop=True), slow)


@pytest.mark.parametrize("options", [{}, {"kl": "reverse"}, {"uncommon_topk": 3}, {"uld_weight": 0.0}], ids=str)
def test_h_kl(both: Fixed, options: dict[str, Any]) -> None:
    """C are the even ids, the teacher's and the student's alike; two of a chunk's kept entries are others."""
    teacher, z = both
    even, odd = teacher.exp()[:, : V - 1 : 2], teacher.exp()[:, 1::2]
    common, _ = Entries.top(even.log(), 3)
    common = common._replace(id_K=2 * common.id_K)
    other = odd.topk(2).values
    count_C = torch.full((POSITIONS,), 2)
    outside_O = torch.arange(1, V, 2)
    slow_options = {"uld_weight": 1.0, "uncommon_topk": 8192} | options
    slow = [
        reference.h_kl(z.softmax(-1)[c], range(0, V, 2), kept_of(common, c), other[c].tolist(), **slow_options)
        for c in range(POSITIONS)
    ]
    agree(z, h_kl(z.log_softmax(-1), common, count_C, other.log().reshape(-1), outside_O, **options), slow)


def chained(p: Tensor, labels: Tensor, merge: str) -> list[Tensor]:
    """The chunks' distributions under the chain rule."""
    spans = [slice(first, first + length) for first, length in zip(FIRST, LENGTH, strict=True)]
    return [reference.chain_rule(p[span], labels[span].tolist(), merge) for span in spans]


def factor(logp: Tensor, labels: Tensor, merge: str) -> Tensor:
    """The log-probability of each chunk's labels but the first one's, or the last one's."""
    label_P = logp.gather(1, labels[:, None])[:, 0]
    cut = [(1, length) if merge == "first" else (0, length - 1) for length in LENGTH]
    return torch.stack([label_P[f + low : f + high].sum() for f, (low, high) in zip(FIRST, cut, strict=True)])


@pytest.mark.parametrize("merge", ["first", "last"])
def test_uld(both: Fixed, merge: str) -> None:
    (teacher, z), labels = both, torch.tensor([3, 9, 2, 2, 20, 7])
    rows = [f if merge == "first" else f + n - 1 for f, n in zip(FIRST, LENGTH, strict=True)]
    kept, _ = Entries.top(teacher[rows], KEPT)
    factor_C = factor(teacher, labels, merge)
    slow = [
        reference.sorted_l1(p_V, [p * float(factor_C[c].exp()) for p in kept_of(kept, c).values()])
        for c, p_V in enumerate(chained(z.softmax(-1), labels, merge))
    ]
    chunks = (torch.tensor(FIRST), torch.tensor(LENGTH), kept.count_C, kept.logp_K, factor_C)
    agree(z, uld(z.log_softmax(-1), labels, *chunks, merge=merge), slow)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_gold(both: Fixed, beta: float, merge: str) -> None:
    """M are the even ids, each with the teacher's of the same number."""
    (teacher, z), labels = both, torch.tensor([3, 9, 2, 2, 20, 7])
    rows = [f if merge == "first" else f + n - 1 for f, n in zip(FIRST, LENGTH, strict=True)]
    p_CU = teacher[rows].exp()
    kept, _ = Entries.top(p_CU[:, :V:2].log(), 3)
    kept = kept._replace(id_K=2 * kept.id_K)
    other, factor_C = p_CU[:, 1::2].topk(2).values, factor(teacher, labels, merge)
    matched_V = torch.arange(V) % 2 == 0
    slow = []
    for c, p_V in enumerate(chained(z.softmax(-1), labels, merge)):
        scale = float(factor_C[c].exp())
        scaled = {s: p * scale for s, p in kept_of(kept, c).items()}
        slow.append(reference.gold(p_V, scaled, (other[c] * scale).tolist(), range(0, V, 2), beta, U))
    chunks = (torch.tensor(FIRST), torch.tensor(LENGTH), kept, torch.full((len(FIRST),), 2), other.log().reshape(-1))
    fast = gold(z.log_softmax(-1), labels, *chunks, factor_C, Matched.of(matched_V, U), beta=beta, merge=merge)
    agree(z, fast, slow)


@pytest.mark.parametrize("mode", ["binary-kl", "reverse", "limit", "abs", "tv"])
def test_alm(both: Fixed, mode: str) -> None:
    (teacher, z), labels = both, torch.tensor([3, 9, 2, 2, 20, 7])
    l_T, l_S = (
        torch.stack([label_P[f : f + n].sum() for f, n in zip(FIRST, LENGTH, strict=True)])
        for label_P in (logp.gather(1, labels[:, None])[:, 0] for logp in (teacher, z.log_softmax(-1)))
    )
    slow = [reference.alm(float(l_T[c]), l_S[c], mode, 2.0) for c in range(len(FIRST))]
    agree(z, alm(l_T, l_S, mode, 2.0), slow)


@pytest.mark.parametrize("with_groups", [False, True])
def test_byte_prefix(both: Fixed, pair: Any, with_groups: bool) -> None:
    """Positions 2 and 5 have no target; 1 and 4 have groups."""
    teacher, z = both[0][:, :V].log_softmax(-1), both[1]
    some = torch.tensor([0, 1, 3, 4])
    kept, tail = Entries.top(teacher[some], KEPT)
    count_P, tail_P = torch.zeros(POSITIONS, dtype=torch.long), torch.full((POSITIONS,), -torch.inf, dtype=z.dtype)
    count_P[some], tail_P[some] = kept.count_C, tail
    kept = kept._replace(count_C=count_P)
    tokens = [bytes([97 + i // 4]) * (1 + i % 4) if i >= 2 else b"" for i in range(V)]
    order = sorted((i for i in range(V) if tokens[i]), key=lambda i: (tokens[i], i))
    groups_of = {1: {b"b": 0.3, b"cc": 0.1}, 4: {b"aaa": 0.5}}
    ranges = [_range(tokens, order, r) for at in sorted(groups_of) for r in groups_of[at]]
    groups = Groups(
        torch.tensor([0, 2, 0, 0, 1, 0]),
        torch.tensor([low for low, _ in ranges]),
        torch.tensor([high for _, high in ranges]),
        torch.tensor([m for at in sorted(groups_of) for m in groups_of[at].values()], dtype=z.dtype).log(),
    )
    slow = []
    for at, p_V in enumerate(z.softmax(-1)):
        term = reference.byte_prefix_kl(p_V, kept_of(kept, at), float(tail_P[at].exp()))
        slow.append(term + (reference.byte_prefix_child(p_V, tokens, groups_of.get(at, {})) if with_groups else 0))
    asked = (groups, torch.tensor(order)) if with_groups else ()
    agree(z, byte_prefix(z.log_softmax(-1), kept, tail_P, *asked), slow)


def _range(tokens: Sequence[bytes], order: Sequence[int], r: bytes) -> tuple[int, int]:
    ranks = [rank for rank, token in enumerate(order) if tokens[token].startswith(r)]
    assert ranks == list(range(ranks[0], ranks[-1] + 1))
    return ranks[0], ranks[-1] + 1


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sparse-kl": sparse_kl,
    "strict": strict,
    "mined": mined,
    "p-kl": p_kl,
    "h-kl": h_kl,
    "uld": uld,
    "gold": gold,
    "alm": alm,
    "byte-prefix": byte_prefix,
}


def test_every_loss_has_its_function() -> None:
    from xtoken.trainer.losses.ce import cross_entropy

    functions = FUNCTIONS | {"ce": cross_entropy}
    assert functions.keys() == LOSSES.keys()
    for name, function in functions.items():
        assert function.__module__ == f"xtoken.trainer.losses.{LOSSES[name].module}"
        assert function.__doc__


def test_defaults_of_the_functions_are_those_of_the_flags() -> None:
    """An option is one field of LossOptions; the function that it reaches has the same value when it is left out."""
    from inspect import signature

    from xtoken.schemas.configs.train import LossOptions

    flags = LossOptions()
    same = {
        (p_kl, "kl"): flags.kl,
        (sparse_kl, "kl"): flags.kl,
        (strict, "kl"): flags.kl,
        (p_kl, "drop"): flags.rest == "drop",
        (sparse_kl, "drop"): flags.rest == "drop",
        **{(h_kl, name): getattr(flags, name) for name in ("kl", "common_weight", "uld_weight", "uncommon_topk")},
        (gold, "beta"): flags.beta,
        (alm, "mode"): flags.alm,
        (alm, "tau_b"): flags.alm_tau,
    }
    for (function, name), value in same.items():
        assert signature(function).parameters[name].default == value, (function.__name__, name)
