"""The ablations of W: what each rule does, and what all of them keep."""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.project import Projection, build_w
from xtoken.pipeline.project.pieces import Segmenter
from xtoken.pipeline.project.projection import EXACT, MINED, PIECES, RANDOM, REVERSE, ROLE, TO_REST
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.categories import category
from xtoken.schemas.errors import XtokenError

RULES = ("pieces", "first-piece", "reverse", "random", "mined")
RULES += ("masked:numerals", "masked:latin", "masked:specials")
# Both directions of this pair as they were built before there was any other rule.
FROZEN = {
    ("llama2", "smollm2"): "3f3efafa8853501e216d13be84a3bb6b63d395083c3dd84353c374f579a49975",
    ("smollm2", "llama2"): "2fc116880c96e9ebc6b1b3381677f9aa6462fb6680c447fdab8acee50ad5efca",
}
ROUNDING = 1e-6  # four float32 weights and their sum
SIGMAS = 6.0  # of a binomial count, over ten deciles of two pairs


def rows_of(projection: Projection) -> dict[int, list[tuple[int, float, int]]]:
    """(teacher id, weight, kind) of each row that has any."""
    rows: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    columns = (projection.teacher_id, projection.weight, projection.kind)
    for s, *entry in zip(projection.student_id.tolist(), *(column.tolist() for column in columns), strict=True):
        rows[s].append(tuple(entry))
    return dict(rows)


@cache
def built(student: TokenTable, teacher: TokenTable, rule: str) -> Projection:
    return build_w(student, teacher, rule, seed=5)


@pytest.fixture(params=FROZEN, ids="-".join)
def real(request: pytest.FixtureRequest, table: Callable[[str], TokenTable]) -> tuple[TokenTable, TokenTable]:
    student, teacher = map(table, request.param)
    return student, teacher


def check_invariants(projection: Projection, student: TokenTable, teacher: TokenTable) -> None:
    """What holds under every rule, said the slow way."""
    rows, reached = rows_of(projection), set(projection.teacher_id.tolist())
    assert list(rows) == sorted(rows)
    claims: dict[int, list[tuple[float, bool, bool, int]]] = defaultdict(list)
    for s, entries in rows.items():
        weights = [weight for _, weight, _ in entries]
        assert sum(weights) == pytest.approx(1, abs=ROUNDING)
        assert weights == sorted(weights, reverse=True)
        assert len({t for t, _, _ in entries}) == len(entries)
        check_bytes(s, entries, student, teacher)
        if weights[0] >= 0.6:
            order = (-weights[0], entries[0][2] == MINED, bool(student.byte_fallback[s]))
            claims[entries[0][0]].append((*order, s))
    common = zip(
        projection.teacher_id[projection.common].tolist(),
        projection.student_id[projection.common].tolist(),
        strict=True,
    )
    assert dict(common) == {t: min(found)[3] for t, found in claims.items()}
    assert sorted([*reached, *projection.unreached.tolist()]) == list(range(teacher.size))
    assert set(projection.moved_to.tolist()) - {TO_REST} <= reached


def check_bytes(s: int, entries: list[tuple[int, float, int]], student: TokenTable, teacher: TokenTable) -> None:
    """No entry joins bytes that disagree, except at random."""
    text = student.token(s)
    for t, _, kind in entries:
        other = teacher.token(t)
        if kind == ROLE:
            assert student.role[s] == teacher.role[t] is not None
        else:
            assert student.role[s] is None
            assert teacher.role[t] is None
            assert text
            assert other
        if kind in (EXACT, PIECES, REVERSE):
            assert {EXACT: other == text, PIECES: other in text, REVERSE: text in other}[kind]
        if kind == MINED:
            assert other[:1] == text[:1]
            assert abs(len(other) - len(text)) <= 3
    if entries[0][2] == PIECES:
        assert text.startswith(teacher.token(entries[0][0]))


VOCABULARY = st.lists(st.binary(min_size=1, max_size=5).map(lambda b: bytes(b"a1b 2"[x % 5] for x in b)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(VOCABULARY, VOCABULARY, st.sampled_from(RULES), st.booleans())
def test_every_rule_keeps_the_invariants(
    toy: Callable[..., TokenTable], mine: list[bytes], theirs: list[bytes], rule: str, special: bool
) -> None:
    student = toy(list(dict.fromkeys(mine)), specials=["eos"])
    teacher = toy(theirs, specials=["bos", "eos"] if special else [])  # duplicates of bytes, as Gemma has them
    check_invariants(build_w(student, teacher, rule), student, teacher)


@pytest.mark.thorough
@pytest.mark.parametrize("rule", RULES)
def test_invariants_on_real_tokenizers(table: Callable[[str], TokenTable], rule: str) -> None:
    student, teacher = table("llama2"), table("smollm2")
    check_invariants(built(student, teacher, rule), student, teacher)


@pytest.mark.parametrize("pair", FROZEN, ids="-".join)
def test_the_default_rule_gives_what_it_always_gave(table: Callable[[str], TokenTable], pair: tuple[str, str]) -> None:
    assert built(*map(table, pair), "pieces").hash == FROZEN[pair]


def test_an_unknown_rule_is_refused(toy: Callable[..., TokenTable]) -> None:
    for rule in ("peaces", "masked", "masked:nouns", "pieces:2"):
        with pytest.raises(XtokenError, match="choose from pieces, first-piece"):
            build_w(toy([b"a"]), toy([b"a"]), rule)


def test_first_piece_keeps_the_rows_and_their_first_targets(real: tuple[TokenTable, TokenTable]) -> None:
    pieces, first = (rows_of(built(*real, rule)) for rule in ("pieces", "first-piece"))
    assert first == {s: [(entries[0][0], 1.0, entries[0][2])] for s, entries in pieces.items()}


def test_random_keeps_counts_and_weights(real: tuple[TokenTable, TokenTable]) -> None:
    pieces, drawn = rows_of(built(*real, "pieces")), rows_of(built(*real, "random"))
    assert pieces.keys() == drawn.keys()
    for s, entries in pieces.items():
        assert [weight for _, weight, _ in drawn[s]] == [weight for _, weight, _ in entries]
        if entries[0][2] == ROLE:
            assert drawn[s] == entries
        else:
            assert {kind for _, _, kind in drawn[s]} == {RANDOM}
    assert (built(*real, "random").matched_student() == -1).all(), "no pair of equal bytes is claimed"


def test_random_targets_are_uniform_over_text(real: tuple[TokenTable, TokenTable]) -> None:
    student, teacher = real
    text = np.flatnonzero([role is None and bool(t) for role, t in zip(teacher.role, teacher.pieces(), strict=True)])
    projection = built(student, teacher, "random")
    targets = projection.teacher_id[projection.kind == RANDOM]
    decile = np.searchsorted(text, targets) * 10 // len(text)
    counts = np.bincount(decile, minlength=10)
    assert abs(counts - len(targets) / 10).max() < SIGMAS * np.sqrt(len(targets) * 0.09)


def test_random_follows_its_seed(real: tuple[TokenTable, TokenTable]) -> None:
    again, other = build_w(*real, "random", seed=5), build_w(*real, "random", seed=6)
    assert again.hash == built(*real, "random").hash != other.hash


def test_random_draws_every_order_of_a_small_row_equally_often(toy: Callable[..., TokenTable]) -> None:
    # Rows of two entries out of three tokens: six ordered pairs.
    student = toy([bytes(pair) for pair in [b"ab"] * 600])
    drawn = rows_of(build_w(student, toy([b"a", b"b", b"c"]), "random", seed=1))
    counts = Counter(tuple(t for t, _, _ in entries) for entries in drawn.values())
    assert set(counts) == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    assert max(abs(n - 100) for n in counts.values()) < SIGMAS * (600 * 5 / 36) ** 0.5


@pytest.mark.parametrize("name", ["numerals", "latin", "numerals_1"])
def test_masked_rows_are_empty_and_nothing_moves_to_them(real: tuple[TokenTable, TokenTable], name: str) -> None:
    student, teacher = real
    wanted = {"numerals_1", "numerals_2", "numerals_3"} if name == "numerals" else {name}
    kinds = [category(text, role) for text, role in zip(student.pieces(), student.role, strict=True)]
    whole, masked = rows_of(built(*real, "pieces")), built(*real, f"masked:{name}")
    assert rows_of(masked) == {s: entries for s, entries in whole.items() if kinds[s] not in wanted}
    assert len(rows_of(masked)) < len(whole)
    left_out = {text for text, kind in zip(student.pieces(), kinds, strict=True) if kind in wanted}
    assert not left_out & {teacher.token(t) for t in masked.moved_to.tolist() if t != TO_REST}


def reverse_rows(student: TokenTable, teacher: TokenTable) -> dict[int, dict[int, float]]:
    """The rule's docstring, said with dictionaries."""
    rows = {s: {t: weight for t, weight, _ in entries} for s, entries in rows_of(build_w(student, teacher)).items()}
    reached = {t for row in rows.values() for t in row}
    segmenter = Segmenter(student)
    proposed: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for t, text in enumerate(teacher.pieces()):
        if t not in reached and text:
            for i, s in enumerate((segmenter.split(text) or [])[:4]):
                proposed[s][t] += 0.9 * 0.1**i
    result: dict[int, dict[int, float]] = dict(rows)
    for s, raw in proposed.items():
        best = sorted(raw.items(), key=lambda item: (-item[1], item[0]))[:4]
        total = sum(weight for _, weight in best)
        row = rows.get(s, {}) | {t: 0.1 * weight / total for t, weight in best}
        result[s] = {t: weight / sum(row.values()) for t, weight in row.items()}
    return result


def same_rows(projection: Projection, expected: dict[int, dict[int, float]]) -> None:
    found = {s: {t: weight for t, weight, _ in entries} for s, entries in rows_of(projection).items()}
    assert found.keys() == expected.keys()
    for s, row in expected.items():
        assert found[s] == pytest.approx(row, abs=ROUNDING)


@pytest.mark.thorough
def test_reverse_against_a_slow_reference(real: tuple[TokenTable, TokenTable]) -> None:
    projection = built(*real, "reverse")
    same_rows(projection, reverse_rows(*real))
    assert (projection.kind == REVERSE).any()
    assert len(projection.unreached) < len(built(*real, "pieces").unreached)


@settings(max_examples=60, deadline=None)
@given(VOCABULARY, VOCABULARY)
def test_reverse_against_a_slow_reference_on_toys(
    toy: Callable[..., TokenTable], mine: list[bytes], theirs: list[bytes]
) -> None:
    student, teacher = toy(list(dict.fromkeys(mine))), toy(theirs)
    same_rows(build_w(student, teacher, "reverse"), reverse_rows(student, teacher))


def test_reverse_in_numbers(toy: Callable[..., TokenTable]) -> None:
    # "ab" .. "ag" are reached by no row; each is spelt "a" and a letter by the student.
    letters, joined = [bytes([c]) for c in b"abcdefg"], [b"a" + bytes([c]) for c in b"bcdefg"]
    student, teacher = toy(letters), toy(letters + joined)
    rows = rows_of(build_w(student, teacher, "reverse"))
    assert [(t, kind) for t, _, kind in rows[0]] == [(0, EXACT), *((t, REVERSE) for t in (7, 8, 9, 10))]
    assert [weight for _, weight, _ in rows[0]] == pytest.approx([1 / 1.1, *[0.025 / 1.1] * 4])
    assert {t: weight for t, weight, _ in rows[1]} == pytest.approx({1: 1 / 1.1, 7: 0.1 / 1.1})
    projection = build_w(student, teacher, "reverse")
    assert projection.unreached.tolist() == []


def levenshtein(a: bytes, b: bytes) -> int:
    """By its definition, a row of the table at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def mined_token(text: bytes, teacher: TokenTable) -> int | None:
    """The rule's docstring, said with a search through all tokens; of equal bytes the one that exact rows take."""
    near = [
        (levenshtein(text, other), t)
        for other, t in teacher.by_bytes().items()
        if other[0] == text[0] and abs(len(other) - len(text)) <= 3
    ]
    return min(near)[1] if near else None


def check_mined(projection: Projection, student: TokenTable, teacher: TokenTable, chosen: list[int]) -> None:
    rows, twin = rows_of(projection), teacher.by_bytes()
    for s in chosen:
        text = student.token(s)
        if text in twin:
            assert rows[s] == [(twin[text], 1.0, EXACT)]
        elif student.role[s] is None:
            found = mined_token(text, teacher)
            assert rows.get(s) == (None if found is None else [(found, 1.0, MINED)]), text


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [(b"", b"abc", 3), (b"kitten", b"sitting", 3), (b"flaw", b"lawn", 2), (b"same", b"same", 0), (b"ab", b"ba", 2)],
)
def test_the_distance_itself(a: bytes, b: bytes, distance: int) -> None:
    """Known examples, for the search by hand that the rule is compared with."""
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_mined_by_hand(toy: Callable[..., TokenTable]) -> None:
    """casting: of cast (3 away), casing (1) and castings (1) the lower id of the two near ones. dogs: dig is 2 away,
    dog 1. sat: no token begins with s. abcdefgh: abcd is 4 bytes shorter, abcde 3. it and eos are as ever.
    """
    teacher = toy([b"cast", b"castings", b"casing", b"dig", b"dog", b"it", b"abcd", b"abcde"], specials=["eos"])
    student = toy([b"casting", b"dogs", b"sat", b"abcdefgh", b"it"], specials=["eos"])
    assert rows_of(build_w(student, teacher, "mined")) == {
        0: [(1, 1.0, MINED)],
        1: [(4, 1.0, MINED)],
        3: [(7, 1.0, MINED)],
        4: [(5, 1.0, EXACT)],
        5: [(8, 1.0, ROLE)],
    }


def test_a_mined_row_does_not_take_the_place_of_the_exact_one(toy: Callable[..., TokenTable]) -> None:
    """The teacher's dog is nearest to dogs, which has the lower id, too: its pair stays the student's dog."""
    projection = build_w(toy([b"dogs", b"dog"]), toy([b"dog"]), "mined")
    assert rows_of(projection) == {0: [(0, 1.0, MINED)], 1: [(0, 1.0, EXACT)]}
    assert projection.common.tolist() == [False, True]
    assert projection.matched_student().tolist() == [1]


def test_mined_of_equal_bytes_takes_the_ordinary_token(toy: Callable[..., TokenTable]) -> None:
    """The lower of two ids with the bytes of a comma is <0x2C>, which the tokenizer never produces for a text."""
    plain = toy([b",", b",", b";"])
    teacher = TokenTable.build(
        plain.pieces(), plain.role, [True, False, False], plain.merges, name="toy", kind="metaspace"
    )
    assert rows_of(build_w(toy([b",x"]), teacher, "mined")) == {0: [(1, 1.0, MINED)]}


@settings(max_examples=100, deadline=None)
@given(VOCABULARY, VOCABULARY)
def test_mined_against_a_search_of_all_tokens_on_toys(
    toy: Callable[..., TokenTable], mine: list[bytes], theirs: list[bytes]
) -> None:
    student, teacher = toy(list(dict.fromkeys(mine))), toy(theirs)
    check_mined(build_w(student, teacher, "mined"), student, teacher, list(range(student.size)))


@pytest.mark.thorough
def test_mined_against_a_search_of_all_tokens(real: tuple[TokenTable, TokenTable]) -> None:
    """Forty random tokens of a real pair, half of them without a twin, and the longest."""
    student, teacher = real
    projection = built(*real, "mined")
    generator, text = np.random.default_rng(3), np.flatnonzero(student.lengths > 0)
    alone = projection.student_id[projection.kind == MINED]
    longest = int(student.lengths.argmax())
    chosen = [*generator.choice(text, 20).tolist(), *generator.choice(alone, 20).tolist(), longest]
    check_mined(projection, student, teacher, chosen)
    assert len(alone) > 1000


def test_mined_keeps_exact_and_role_rows(real: tuple[TokenTable, TokenTable]) -> None:
    pieces, found = rows_of(built(*real, "pieces")), rows_of(built(*real, "mined"))
    same = {s: entries for s, entries in pieces.items() if entries[0][2] in (EXACT, ROLE)}
    assert same == {s: entries for s, entries in found.items() if entries[0][2] != MINED}
    whole, mine = (built(*real, rule).matched_student() for rule in ("pieces", "mined"))
    assert (mine[whole >= 0] == whole[whole >= 0]).all(), "a pair of equal bytes is lost"
    assert build_w(*real, "mined").hash == built(*real, "mined").hash


def test_w_of_every_rule_is_another_w(real: tuple[TokenTable, TokenTable]) -> None:
    hashes = [built(*real, rule).hash for rule in RULES]
    assert len(set(hashes)) == len(RULES)
