"""The exact first token of byte-prefix, against every continuation of a small teacher."""

import importlib.util
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from toy_bpe import write_bpe

from xtoken import cli
from xtoken.pipeline.tokens import TextTokenizer
from xtoken.pipeline.tokens.canonical import Canonical

EXACT = 1e-10
LENGTH = 4  # tokens after which the small teacher ends a text


@pytest.fixture(scope="module")
def exact() -> ModuleType:
    """benchmarks/prefix_exact.py, by path: other packages also install a top-level ``benchmarks``."""
    path = Path(cli.__file__).resolve().parent / "benchmarks" / "prefix_exact.py"
    spec = importlib.util.spec_from_file_location("xtoken_prefix_exact", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


Pair = tuple[TextTokenizer, TextTokenizer]


def write_pair(folder: Path, teacher: list[str], student: list[str]) -> Pair:
    for name in ("teacher", "student"):
        (folder / name).mkdir()
    return write_bpe(folder / "teacher", teacher), write_bpe(folder / "student", student)


class Small:
    """A teacher with a few tokens, a distribution by hash for every context, and an end after ``LENGTH`` tokens."""

    def __init__(self, tokenizer: TextTokenizer, pieces: list[bytes]) -> None:
        by_bytes = tokenizer.table.by_bytes()
        self.size, self.tokens = tokenizer.table.size, [0, *(by_bytes[piece] for piece in pieces)]

    def p(self, ids: tuple[int, ...]) -> np.ndarray:
        p = np.zeros(self.size)
        if len(ids) == LENGTH:
            p[0] = 1.0
        else:
            p[self.tokens] = np.random.default_rng([7, *ids]).dirichlet(np.ones(len(self.tokens)))
        return p

    def expand(self, rows: list[tuple[int, ...]]) -> list[np.ndarray]:
        return [self.p(row) for row in rows]


def slow(teacher: Small, pair: Pair) -> dict[tuple[int, int], float]:
    """By the teacher's first token and the first token of the student's encoding: every text to its end."""
    pieces, found = pair[0].table.pieces(), defaultdict(float)
    for length in range(LENGTH + 1):
        for ids in itertools.product(teacher.tokens[1:], repeat=length):
            p = math.prod(float(teacher.p(ids[:at])[token]) for at, token in enumerate(ids)) * float(teacher.p(ids)[0])
            if p:
                encoded = pair[1].token_ids([b"".join(pieces[token] for token in ids).decode()])[0]
                found[ids[0] if ids else 0, encoded[0] if encoded else -2] += p
    return found


@pytest.mark.parametrize(
    ("student", "pieces"),
    [
        (["1 2", "12 2", "2 2"], [b"1", b"2", b"a"]),
        (["a b", "ab a", "Ġ a", "Ġa b"], [b"a", b"b", b" ", b"ab"]),
        (["Ċ Ċ", "ĊĊ Ċ", "a Ċ"], [b"\n", b"\n\n", b"a"]),
        (["a b", "b a", "ba b"], [b"a", b"b", b"ab"]),
    ],
)
def test_the_enumeration_is_every_continuation(
    exact: ModuleType, tmp_path: Path, student: list[str], pieces: list[bytes]
) -> None:
    pair = write_pair(tmp_path, ["a b", "Ċ Ċ"], student)
    teacher = Small(pair[0], pieces)
    first = exact.FirstToken(Canonical(pair[1]))
    found = exact.enumerate_first(
        teacher.expand, pair[0].table, first, least=0, enough=0, most=10**6, longest=LENGTH + 1
    )
    wanted = slow(teacher, pair)
    assert found.unsettled == pytest.approx(0, abs=EXACT)
    assert sum(found.joint.values()) == pytest.approx(1, abs=EXACT)
    assert {at: p for at, p in found.joint.items() if p > 0} == pytest.approx(wanted, abs=EXACT)


def test_what_is_cut_off_is_unsettled_and_nothing_else_changes(exact: ModuleType, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, ["a b"], ["1 2", "12 2", "2 2"])
    teacher, wanted = Small(pair[0], [b"1", b"2", b"a"]), None
    wanted = slow(teacher, pair)
    first = exact.FirstToken(Canonical(pair[1]))
    for limits in (
        {"least": 0.02, "enough": 0.1, "most": 100, "longest": 5},
        {"least": 0, "enough": 0, "most": 2, "longest": 2},
    ):
        found = exact.enumerate_first(teacher.expand, pair[0].table, first, **limits)
        assert 0.001 < found.unsettled < 0.9
        assert sum(found.joint.values()) + found.unsettled == pytest.approx(1, abs=EXACT)
        assert all(p <= wanted[at] + EXACT for at, p in found.joint.items())


def test_packed_numerals_by_hand(exact: ModuleType, tmp_path: Path) -> None:
    """1 ends with .4 or goes on with 2 at .6, 12 ends with .5 or goes on to 122: the root puts all of .5 on 1."""
    pair = write_pair(tmp_path, ["a b"], ["1 2", "12 2"])
    one, two = (pair[0].table.by_bytes()[digit] for digit in (b"1", b"2"))
    chains = {
        (): {one: 0.5, 0: 0.5},
        (one,): {two: 0.6, 0: 0.4},
        (one, two): {two: 0.5, 0: 0.5},
        (one, two, two): {0: 1},
    }

    def expand(rows: list[tuple[int, ...]]) -> list[np.ndarray]:
        return [np.array([chains[row].get(token, 0.0) for token in range(pair[0].table.size)]) for row in rows]

    student = pair[1].table
    known = student.by_bytes()
    found = exact.enumerate_first(
        expand, pair[0].table, exact.FirstToken(Canonical(pair[1])), least=0, enough=0, most=100, longest=5
    )
    assert found.exact() == pytest.approx({known[b"1"]: 0.2, known[b"12"]: 0.15, known[b"122"]: 0.15, -2: 0.5})
    longest: Callable[[int], int] = exact.longest_prefix(pair[0].table, student)
    assert exact.compare(found, longest) == pytest.approx({"moved": 0.3, "nowhere": 0.0, "variation": 0.3})
    own = exact.own_first(pair[0].table, Canonical(pair[1]), longest)
    assert exact.compare(found, own) == exact.compare(found, longest), "1 alone is 1 to both"
