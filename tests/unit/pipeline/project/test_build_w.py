"""W on real tokenizers: the three rules, the common set, and where unreached tokens go."""

import random
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from xtoken.pipeline.project import Projection, build_w
from xtoken.pipeline.project.pieces import Segmenter
from xtoken.pipeline.project.projection import EXACT, PIECES, ROLE, TO_REST
from xtoken.pipeline.tokens import TokenTable

PAIRS = [
    ("llama3", "qwen3"),
    ("qwen3", "llama3"),
    ("llama2", "gpt4o"),
    ("qwen3", "llama2"),
    ("smollm2", "gemma3"),
    ("gemma3", "smollm2"),
    ("bytes", "llama3"),
]
SAMPLE = 400


@cache
def _built(student: TokenTable, teacher: TokenTable) -> Projection:
    return build_w(student, teacher)


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(pair))
def pair(
    request: pytest.FixtureRequest, table: Callable[[str], TokenTable]
) -> tuple[TokenTable, TokenTable, Projection]:
    student, teacher = map(table, request.param)
    return student, teacher, _built(student, teacher)


def _rows(projection: Projection) -> dict[int, list[tuple[int, float, int]]]:
    rows: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    for s, t, weight, kind in zip(
        projection.student_id.tolist(),
        projection.teacher_id.tolist(),
        projection.weight.tolist(),
        projection.kind.tolist(),
        strict=True,
    ):
        rows[s].append((t, weight, kind))
    return rows


def test_every_text_row_spells_its_token(pair: tuple[TokenTable, TokenTable, Projection]) -> None:
    student, teacher, projection = pair
    rows, segmenter = _rows(projection), Segmenter(teacher)
    spelt = teacher.pieces()
    single = {text for text in spelt if len(text) == 1}  # SmolLM2 has no token for some control characters
    for s, text in enumerate(student.pieces()):
        if student.role[s] is not None or not text:
            assert all(kind == ROLE for _, _, kind in rows[s])
            continue
        kinds = {kind for _, _, kind in rows[s]}
        if not kinds:
            assert any(bytes([byte]) not in single for byte in text), f"student token {s} {text!r} has no row"
            continue
        if kinds == {EXACT}:
            assert [(spelt[t], weight) for t, weight, _ in rows[s]] == [(text, 1.0)]
        else:
            assert kinds == {PIECES}
            pieces = segmenter.split(text)
            assert pieces is not None
            assert b"".join(spelt[t] for t in pieces) == text
            assert {t for t, _, _ in rows[s]} == set(pieces[:4])


def test_rows_sum_to_one_or_are_absent(pair: tuple[TokenTable, TokenTable, Projection]) -> None:
    student, _, projection = pair
    total = np.bincount(projection.student_id, weights=projection.weight, minlength=student.size)
    present = np.bincount(projection.student_id, minlength=student.size) > 0
    assert np.allclose(total[present], 1, atol=1e-6)
    assert (total[~present] == 0).all()
    assert (np.diff(projection.student_id) >= 0).all()


def test_pieces_are_those_of_the_teachers_own_model(
    tokenizer_file: Callable[[str], Path],
    pair: tuple[TokenTable, TokenTable, Projection],
    request: pytest.FixtureRequest,
) -> None:
    student, teacher, projection = pair
    backend = Tokenizer.from_file(str(tokenizer_file(request.node.callspec.params["pair"][1])))
    pieced = np.unique(projection.student_id[projection.kind == PIECES]).tolist()
    segmenter = Segmenter(teacher)
    compared = 0
    for s in random.Random(0).sample(pieced, min(SAMPLE, len(pieced))):
        written = _as_written(student.token(s), teacher.info.kind)
        if written is not None:
            expected = [token.id for token in backend.model.tokenize(written)]
            assert segmenter.split(student.token(s)) == expected, student.token(s)
            compared += 1
    assert compared or not pieced


def _as_written(text: bytes, kind: str) -> str | None:
    """Bytes in the alphabet of a tokenizer.json; None where it has no way to write them."""
    if kind == "byte-level":
        from tokenizers.pre_tokenizers import ByteLevel

        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        shifted = [byte for byte in range(256) if byte not in printable]
        alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(shifted)}
        assert set(alphabet.values()) == set(ByteLevel.alphabet())
        return "".join(alphabet[byte] for byte in text)
    try:
        return text.decode().replace(" ", "\u2581")
    except UnicodeDecodeError:
        return None


@pytest.mark.thorough
def test_pieces_against_a_slow_reference(pair: tuple[TokenTable, TokenTable, Projection]) -> None:
    student, teacher, projection = pair
    if not len(teacher.merges) or teacher.info.kind != "byte-level":
        pytest.skip("the slow reference starts from bytes, this teacher from characters")
    rank = {(teacher.token(a), teacher.token(b)): n for n, (a, b) in reversed(list(enumerate(teacher.merges.tolist())))}
    segmenter = Segmenter(teacher)
    pieced = np.unique(projection.student_id[projection.kind == PIECES]).tolist()
    for s in random.Random(1).sample(pieced, min(SAMPLE, len(pieced))):
        text = student.token(s)
        split = segmenter.split(text)
        assert split is not None
        assert [teacher.token(t) for t in split] == _slow_bpe(text, rank)


def _slow_bpe(text: bytes, rank: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in text]
    while True:
        found = [(rank[a, b], at) for at, (a, b) in enumerate(pairwise(parts)) if (a, b) in rank]
        if not found:
            return parts
        _, at = min(found)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


def test_unreached_is_the_complement_and_moves_to_the_longest_prefix(
    pair: tuple[TokenTable, TokenTable, Projection],
) -> None:
    student, teacher, projection = pair
    reached = set(projection.teacher_id.tolist())
    assert sorted([*reached, *projection.unreached.tolist()]) == list(range(teacher.size))
    known = set(student.pieces()) & set(teacher.by_bytes())
    moved = dict(zip(projection.unreached.tolist(), projection.moved_to.tolist(), strict=True))
    for t in random.Random(2).sample(sorted(moved), min(SAMPLE, len(moved))):
        text = teacher.token(t)
        longest = max((text[:n] for n in range(1, len(text) + 1) if text[:n] in known), key=len, default=None)
        if longest is None:
            assert moved[t] == TO_REST
        else:
            assert teacher.token(moved[t]) == longest
            assert moved[t] in reached


def test_common_set_has_one_student_per_teacher(pair: tuple[TokenTable, TokenTable, Projection]) -> None:
    student, _, projection = pair
    best: dict[int, tuple[float, bool, int]] = {}
    for s, entries in _rows(projection).items():
        t, weight, _ = max(entries, key=lambda entry: entry[1]) if entries else (0, 0.0, 0)
        if weight >= 0.6:
            claim = (-weight, bool(student.byte_fallback[s]), s)
            best[t] = min(best.get(t, claim), claim)
    found = zip(
        projection.teacher_id[projection.common].tolist(),
        projection.student_id[projection.common].tolist(),
        strict=True,
    )
    assert dict(found) == {t: s for t, (_, _, s) in best.items()}


def test_weights_of_pieces(toy: Callable[..., TokenTable]) -> None:
    pieces = [b"a", b"b", b"c", b"d", b"e"]
    rows = _rows(build_w(toy([b"ab", b"abc", b"abcde", b"aba"]), toy(pieces)))
    assert [round(weight, 3) for _, weight, _ in rows[0]] == [0.909, 0.091]
    assert [round(weight, 3) for _, weight, _ in rows[1]] == [0.901, 0.090, 0.009]
    assert [pieces[t] for t, _, _ in rows[2]] == [b"a", b"b", b"c", b"d"]
    assert [(pieces[t], round(weight, 3)) for t, weight, _ in rows[3]] == [(b"a", 0.910), (b"b", 0.090)]


def test_an_ordinary_token_wins_over_its_byte_token(table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("gemma3"), table("smollm2")
    projection = _built(student, teacher)
    rows, pair = _rows(projection), projection.common_student()
    comma, comma_byte = (
        int(
            np.flatnonzero(
                [p == b"," and f == fallback for p, f in zip(student.pieces(), student.byte_fallback, strict=True)]
            )[0]
        )
        for fallback in (False, True)
    )
    ((target, weight, _),) = rows[comma]
    assert (teacher.token(target), weight, teacher.byte_fallback[target]) == (b",", 1.0, False)
    assert rows[comma_byte] == rows[comma]
    assert pair[target] == comma, "the token that text produces speaks for the pair, not <0x2C>"


def test_special_tokens_meet_by_role_only(table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("smollm2"), table("gemma3")
    projection = _built(student, teacher)
    specials = [s for s, role in enumerate(student.role) if role is not None]
    rows = _rows(projection)
    for s in specials:
        assert [teacher.role[t] for t, _, _ in rows[s]] in ([], [student.role[s]])
    assert student.id_of("eos") in rows
    text_like = set(projection.moved_to[[teacher.role[t] is not None for t in projection.unreached]].tolist())
    assert text_like == {TO_REST}


def test_a_tokenizer_without_merges_is_matched_greedily(toy: Callable[..., TokenTable]) -> None:
    segmenter = Segmenter(toy([b"a", b"ab", b"abc", b"b", b"d"]))
    assert segmenter.split(b"abdabca") == [1, 4, 2, 0]
    assert segmenter.split(b"abx") is None


def test_a_row_that_cannot_be_spelt_stays_empty(toy: Callable[..., TokenTable]) -> None:
    projection = build_w(toy([b"a", b"ax"]), toy([b"a", b"aa"]))
    assert projection.student_id.tolist() == [0]
    assert (projection.unreached.tolist(), projection.moved_to.tolist()) == ([1], [0])
