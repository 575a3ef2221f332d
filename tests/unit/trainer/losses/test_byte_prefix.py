"""Byte-prefix against its dense reference, the worked numbers of docs/losses.md, and the ends of its ranges."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.base import LossSetup, View, VocabArrays
from xtoken.trainer.losses.byte_prefix import BytePrefix

EXACT = 1e-10  # float64 sums of some dozen terms
FLOAT32 = 2e-5  # float32 log-probabilities of size 10, relative
WORKED = 5e-5  # the worked numbers are printed with four decimals
STEP = 1e-6  # of central differences: their own error is about its square
LENGTHS = [1, 3, 1, 2]
FIRST = [0, 1, 4, 6]  # position 5 belongs to no chunk
POSITIONS = 9
TERMS = ("root", "interior", "child")

MakeView = Callable[..., View]
Target = tuple[dict[int, float], float]  # mass by student id, REST


def setup_of(tokens: Sequence[bytes], pair: Any, **options: Any) -> LossSetup:
    setup = pair.setup(**options)
    vocab = VocabArrays.of(tokens, [None if data else "special" for data in tokens])
    return LossSetup(setup.w, vocab, len(tokens), setup.teacher_size, setup.device, setup.options, setup.tau)


def as_range(setup: LossSetup, tokens: Sequence[bytes], r: bytes) -> tuple[int, int]:
    """Ranks of the student's text tokens that start with ``r``, found one by one."""
    ranks = [rank for rank, u in enumerate(setup.vocab.order) if tokens[u].startswith(r)]
    assert ranks == list(range(ranks[0], ranks[-1] + 1)), "they stand together"
    return ranks[0], ranks[-1] + 1


def columns_of(
    setup: LossSetup, tokens: Sequence[bytes], targets: Sequence[Target], groups: Sequence[Mapping[bytes, float]]
) -> dict[str, Any]:
    """The token columns of positions with these targets (none: count 0) and child groups (mass by next bytes)."""
    ranges = [as_range(setup, tokens, r) for group in groups for r in group]
    with np.errstate(divide="ignore"):
        return {
            "prefix_count": [len(q) for q, _ in targets],
            "prefix_ids": np.array([u for q, _ in targets for u in q], np.int32),
            "prefix_logprob": np.log(np.array([p for q, _ in targets for p in q.values()])),
            "prefix_rest_logprob": np.log(np.array([rest for _, rest in targets])),
            "child_count": [len(group) for group in groups],
            "child_low": np.array([low for low, _ in ranges], np.int32),
            "child_high": np.array([high for _, high in ranges], np.int32),
            "child_logprob": np.log(np.array([mass for group in groups for mass in group.values()])),
        }


def random_case(
    rng: np.random.Generator, tokens: Sequence[bytes], kept: int | None
) -> tuple[Tensor, list[Target], list[dict[bytes, float]]]:
    """Logits, targets (the fourth position has none) and groups of prefix-free next bytes."""
    z = torch.tensor(rng.normal(0, 2, (POSITIONS, len(tokens))), requires_grad=True)
    targets: list[Target] = []
    for position in range(POSITIONS):
        p = rng.dirichlet(np.full(len(tokens), 0.4))
        order = np.argsort(-p)[:kept].tolist()
        rest = 0.0 if kept is None else float(1 - p[order].sum())
        targets.append(({}, np.nan) if position == 3 else ({u: float(p[u]) for u in order}, rest))
    groups: list[dict[bytes, float]] = [{} for _ in range(POSITIONS)]
    groups[1], groups[2] = {b" a": 0.3, b"e": 0.2}, {b" ": 0.25}
    groups[5], groups[8] = {b"bb": 0.6, b"c": 0.1, b" a": 0.05}, {b"f": 1.0}
    return z, targets, groups


def dense(
    z: Tensor, tokens: Sequence[bytes], targets: list[Target], groups: list[dict[bytes, float]], wanted: Sequence[str]
) -> Tensor:
    inside = [first + i for first, length in zip(FIRST, LENGTHS, strict=True) for i in range(length)]
    terms = []
    for position, p_S in enumerate(z.softmax(-1)):
        term = p_S.new_zeros(())
        name = "root" if position in FIRST else "interior"
        if position in inside and targets[position][0] and name in wanted:
            term = term + reference.byte_prefix_kl(p_S, *targets[position])
        if "child" in wanted:
            term = term + reference.byte_prefix_child(p_S, tokens, groups[position])
        terms.append(term)
    return torch.stack(terms)


@pytest.fixture
def tokens(pair: Any) -> list[bytes]:
    """The toy student's bytes; the conftest's vocabulary is built from the same."""
    first = ["a", "b", "c", "d", "e", "f"]
    return [b"", b"", *(f"{' ' * (i % 3 == 0)}{first[i % 6] * (1 + i // 6)}".encode() for i in range(22))]


@pytest.mark.parametrize("kept", [None, 9, 1])
@pytest.mark.parametrize("prefix", [list(TERMS), ["root"], ["interior"], ["child"], ["root", "child"]])
def test_equals_its_reference(
    pair: Any, make_view: MakeView, tokens: list[bytes], kept: int | None, prefix: list[str]
) -> None:
    z, targets, groups = random_case(np.random.default_rng(1), tokens, kept)
    setup = setup_of(tokens, pair, prefix=prefix)
    loss, columns = BytePrefix(setup), columns_of(setup, tokens, targets, groups)
    fast = loss.terms(make_view(z, FIRST, LENGTHS, columns))
    slow = dense(z, tokens, targets, groups, prefix)
    torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)
    weight = torch.arange(1.0, POSITIONS + 1, dtype=torch.float64)
    (fast_grad,) = torch.autograd.grad((fast * weight).sum(), z)
    (slow_grad,) = torch.autograd.grad((slow * weight).sum(), z)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=EXACT, atol=EXACT)


def test_gradient_equals_finite_differences(pair: Any, make_view: MakeView, tokens: list[bytes]) -> None:
    rng = np.random.default_rng(2)
    z, targets, groups = random_case(rng, tokens, 6)
    setup = setup_of(tokens, pair)
    loss, columns = BytePrefix(setup), columns_of(setup, tokens, targets, groups)
    (grad,) = torch.autograd.grad(loss.terms(make_view(z, FIRST, LENGTHS, columns)).sum(), z)
    for _ in range(5):
        way = torch.tensor(rng.normal(0, 1, z.shape))
        high, low = (make_view(z.detach() + s * way, FIRST, LENGTHS, columns) for s in (STEP, -STEP))
        slope = float(loss.terms(high).sum() - loss.terms(low).sum()) / (2 * STEP)
        assert slope == pytest.approx(float((grad * way).sum()), abs=1e-7)


def test_float32_equals_the_reference_in_float64(pair: Any, make_view: MakeView, tokens: list[bytes]) -> None:
    z, targets, groups = random_case(np.random.default_rng(3), tokens, 6)
    setup = setup_of(tokens, pair)
    columns = {
        name: np.asarray(values, np.float32 if name.endswith("logprob") else np.int32)
        for name, values in columns_of(setup, tokens, targets, groups).items()
    }
    fast = BytePrefix(setup).terms(make_view(z.detach().float(), FIRST, LENGTHS, columns))
    slow = dense(z, tokens, targets, groups, TERMS)
    torch.testing.assert_close(fast.double(), slow, rtol=FLOAT32, atol=FLOAT32)


WORKED_TOKENS = [b"Br", b"Cat", b"ead", b"eads", b"eak", b"x"]
# Teacher: Bread .4, Breads .2, Break .3, Cat .1. No student token equals one of the first three; Bread is a prefix of
# Breads, so they are one group. After Br the groups go on with ead and eak.
WORKED_TARGETS: list[Target] = [({0: 0.9, 1: 0.1}, 0.0), ({2: 0.4 / 0.9, 4: 0.3 / 0.9, 3: 0.2 / 0.9}, 0.0)]
WORKED_GROUPS: list[dict[bytes, float]] = [{}, {b"ead": 0.6, b"eak": 0.3}]


@pytest.mark.parametrize(
    ("ead", "eads", "eak", "interior", "child"),
    [(0.2, 0.3, 0.1, 0.6895, 1.1067), (0.1, 0.5, 0.1, 0.8841, 0.9973), (0.1, 0.15, 0.05, None, 1.7305)],
)
def test_worked_numbers(
    pair: Any, make_view: MakeView, ead: float, eads: float, eak: float, interior: float | None, child: float
) -> None:
    p = torch.full((2, 6), 1e-300, dtype=torch.float64)
    p[0, [0, 1, 5]] = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    p[1, [2, 3, 4, 5]] = torch.tensor([ead, eads, eak, 1 - ead - eads - eak], dtype=torch.float64)
    found = {}
    for name in TERMS:
        setup = setup_of(WORKED_TOKENS, pair, prefix=[name])
        columns = columns_of(setup, WORKED_TOKENS, WORKED_TARGETS, WORKED_GROUPS)
        found[name] = BytePrefix(setup).terms(make_view(p.log(), [0], [2], columns)).tolist()
    assert found["root"] == pytest.approx([0.4597, 0], abs=WORKED)
    assert found["child"] == pytest.approx([0, child], abs=WORKED)
    if interior is not None:
        assert found["interior"] == pytest.approx([0, interior], abs=WORKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_root_and_interior_are_never_negative(
    pair: Any, make_view: MakeView, tokens: list[bytes], dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(4)
    setup = setup_of(tokens, pair, prefix=["root", "interior"])
    loss = BytePrefix(setup)
    nothing: list[dict[bytes, float]] = [{}] * POSITIONS
    for trial in range(60):
        z = torch.tensor(rng.normal(0, rng.choice([0.1, 1.0, 8.0]), (POSITIONS, len(tokens)))).to(dtype).float()
        _, targets, _ = random_case(rng, tokens, int(rng.integers(1, 20)))
        if trial % 2:  # the student's own row, rounded: the KL is nothing but rounding
            rows = z.double().softmax(-1).numpy()
            order = np.argsort(-rows, 1)[:, :6]
            targets = [
                ({int(u): float(row[u]) for u in top}, float(1 - row[top].sum()))
                for row, top in zip(rows, order, strict=True)
            ]
        columns = columns_of(setup, tokens, targets, nothing)
        for name in ("prefix_logprob", "prefix_rest_logprob"):
            columns[name] = columns[name].astype(np.float32)
        terms = loss.terms(make_view(z, FIRST, LENGTHS, columns))
        assert (terms >= 0).all(), (trial, terms)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_degenerate_rows_give_numbers(pair: Any, make_view: MakeView, tokens: list[bytes], scale: float) -> None:
    """A certain teacher, kept tokens of probability 0, everything kept without or with REST, no REST, a certain
    student."""
    rng = np.random.default_rng(5)
    z = torch.tensor(rng.normal(0, 1, (5, len(tokens))) * scale, dtype=torch.float32).requires_grad_()
    whole = {u: 0.9 / len(tokens) for u in range(len(tokens))}
    targets: list[Target] = [({4: 1.0}, 0.0), ({4: 1.0, 5: 0.0}, 0.0), (whole, 0.1), ({}, 1.0), ({7: 0.5}, 0.5)]
    setup = setup_of(tokens, pair)
    columns = columns_of(setup, tokens, targets, [{}, {b"b": 0.4}, {}, {b"c": 0.0}, {}])
    for name in ("prefix_logprob", "prefix_rest_logprob", "child_logprob"):
        columns[name] = columns[name].astype(np.float32)
    terms = BytePrefix(setup).terms(make_view(z, [0, 1, 3], [1, 2, 2], columns))
    (grad,) = torch.autograd.grad(terms.sum(), z)
    assert torch.isfinite(terms).all()
    assert (terms >= 0).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("prefix", [list(TERMS), ["child"]])
def test_no_chunks_and_no_groups(pair: Any, make_view: MakeView, tokens: list[bytes], prefix: list[str]) -> None:
    setup = setup_of(tokens, pair, prefix=prefix)
    columns = columns_of(setup, tokens, [({}, 1.0)] * 3, [{}] * 3)
    terms = BytePrefix(setup).terms(make_view(torch.zeros(3, len(tokens)), [], [], columns))
    assert terms.tolist() == [0, 0, 0]


def test_targets_outside_the_views_chunks_do_not_count(pair: Any, make_view: MakeView, tokens: list[bytes]) -> None:
    """The first tokens of a chunk that was cut off have no chunk in the denominator."""
    setup = setup_of(tokens, pair)
    columns = columns_of(setup, tokens, [({2: 0.7}, 0.3)] * 3, [{}] * 3)
    terms = BytePrefix(setup).terms(make_view(torch.zeros(3, len(tokens)), [0], [1], columns)).tolist()
    assert terms[0] > 0
    assert terms[1:] == [0, 0]


def test_valid_chunks_have_a_root(pair: Any, tokens: list[bytes]) -> None:
    arrays = {"prefix_count": np.array([3, 2, 0, 4, 1], np.int32)}
    loss = BytePrefix(setup_of(tokens, pair))
    assert loss.valid(np.array([0, 2, 3, 5]), arrays).tolist() == [True, False, True, False]
    assert loss.per == "token"
    assert BytePrefix(setup_of(tokens, pair, tau=2.0)).temperature == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_ids": [3, 24]}, "student id 24 "),
        ({"prefix_ids": [-1, 3]}, "student id -1 "),
        ({"child_low": [-1]}, "range -1 to 5 "),
        ({"child_low": [5]}, "range 5 to 5 "),
        ({"child_high": [23]}, "range 2 to 23 .* 22 text tokens"),
    ],
)
def test_what_the_vocabulary_cannot_serve_is_refused(
    pair: Any, tokens: list[bytes], change: dict[str, list[int]], message: str
) -> None:
    loss = BytePrefix(setup_of(tokens, pair))
    good = {"prefix_ids": [2, 23], "child_low": [2], "child_high": [22]}
    loss.check({name: np.array(values, np.int32) for name, values in good.items()})
    with pytest.raises(VerificationError, match=message):
        loss.check({name: np.array(values, np.int32) for name, values in (good | {"child_high": [5]} | change).items()})
