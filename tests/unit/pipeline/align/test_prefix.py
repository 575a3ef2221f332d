"""Byte-prefix targets: the worked numbers, plain SQL, plain Python, and a real pair of tokenizers.

The rows are made up so that much happens in few: tokens the text could go on with, specials, and some at random.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from toy_bpe import write_bpe

from xtoken.pipeline.align.blanks import Shifted
from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Chunks, Joined, join
from xtoken.pipeline.align.losses.byte_prefix import prefix_columns
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.parts import with_teacher_eos
from xtoken.pipeline.align.prefix import PrefixMaps, first_tokens, longest_tokens
from xtoken.pipeline.align.queries import query
from xtoken.pipeline.align.rows import Recipe, Rows
from xtoken.pipeline.align.stage import encode
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.project import Projection, build_w
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import encode as pack
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.reader import iter_parquet
from xtoken.pipeline.store.writer import Sample, capture_batch, write_parquet
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.tokens import Encoded, TextTokenizer, TokenTable, load_tokenizer
from xtoken.schemas.manifest import CodecInfo
from xtoken.trainer.losses.base import VocabArrays

CAPTURE = open_codec(CodecInfo(k=64)).schema()

# The worked numbers are printed to four digits.
PRINTED = 5e-5
# Float32 logarithms of two ways to add up a row.
ROUNDING = 2e-6
TEXTS = (
    "Breaking news: naïve façades — привет, мир! 東京タワー 12345 🙂\n    return x ** 2  # done",
    "Unbelievable antidisestablishmentarianism, electroencephalographically speaking.",
    "a",
)


def table(*pieces: bytes, eos: bool = False, name: str = "t") -> TokenTable:
    roles = [None] * len(pieces) + ["eos"] * eos
    data = [*pieces, *([b""] * eos)]
    merges = np.zeros((0, 2), np.int32)
    return TokenTable.build(data, roles, [False] * len(data), merges, name=name, kind="byte-level")


def columns_of(
    student: TokenTable,
    teacher: TokenTable,
    rows: list[dict[int, float]],
    mine: tuple[list[int], list[int]],
    theirs: tuple[list[int], list[int]],
    chunks: tuple[list[int], list[int]],
    text: str,
) -> dict[str, list[Any]]:
    """byte-prefix columns of one sample; each row is token -> probability, ``mine`` and ``theirs`` are ids and ends."""
    ids = np.array([token for row in rows for token in row], np.int32)
    p = np.array([value for row in rows for value in row.values()])
    offsets = np.cumsum([0, *map(len, rows)])
    rest = np.array([1 - sum(row.values()) for row in rows])
    # what 1 - sum leaves of rounding is no REST
    made = Rows.of(offsets, ids, np.log(p), np.where(rest > 1e-12, np.log(np.maximum(rest, 1e-300)), -np.inf))
    ends = [np.array(values, np.int32) for values in (*mine, *chunks)]
    sample = Joined(0, Encoded(text, ends[0], ends[1], False), Chunks(ends[2], ends[3], False))
    batch = pa.RecordBatch.from_pydict({"text": [text], "teacher_ids": [theirs[0]], "teacher_end": [theirs[1]]})
    start = np.array([0, *chunks[1][:-1]], np.int64)
    maps = PrefixMaps.of(student, teacher, build_w(student, teacher), longest_tokens(teacher, student))
    found = prefix_columns(batch, [sample], Shifted.none(made, start), start, maps)
    return {name: values.tolist() for name, values in found.items()}


def test_the_worked_numbers() -> None:
    """Root .4597, interior .6895, child 1.1067, and the other student of the specification."""
    teacher, student = table(b"Bread", b"Breads", b"Break", b"Cat"), table(b"Br", b"ead", b"eads", b"eak", b"Cat")
    row = {0: 0.4, 1: 0.2, 2: 0.3, 3: 0.1}
    found = columns_of(student, teacher, [row], ([0, 1], [2, 5]), ([0], [5]), ([2], [1]), "Bread")
    assert found["prefix_count"] == [2, 3]
    assert found["prefix_rest_logprob"] == [-math.inf, -math.inf]
    root = dict(zip(found["prefix_ids"][:2], np.exp(found["prefix_logprob"][:2]), strict=True))
    interior = dict(zip(found["prefix_ids"][2:], np.exp(found["prefix_logprob"][2:]), strict=True))
    assert kl(root, {0: 0.5, 4: 0.2}) == pytest.approx(0.4597, abs=PRINTED)
    assert kl(interior, {1: 0.2, 2: 0.3, 3: 0.1}) == pytest.approx(0.6895, abs=PRINTED)
    assert kl(interior, {1: 0.1, 2: 0.5, 3: 0.1}) == pytest.approx(0.8841, abs=PRINTED)
    assert found["child_count"] == [0, 2]
    assert child(student, found, {1: 0.2, 2: 0.3, 3: 0.1}) == pytest.approx(1.1067, abs=PRINTED)
    assert child(student, found, {1: 0.1, 2: 0.5, 3: 0.1}) == pytest.approx(0.9973, abs=PRINTED)
    assert child(student, found, {1: 0.1, 2: 0.15, 3: 0.05}) == pytest.approx(1.7305, abs=PRINTED)


def kl(target: dict[int, float], student: dict[int, float]) -> float:
    return sum(p * math.log(p / student[token]) for token, p in target.items())


def child(student: TokenTable, found: dict[str, list[Any]], p: dict[int, float]) -> float:
    """The child term, ranges counted as the trainer counts them."""
    order = VocabArrays.of(student.pieces(), student.role).order.tolist()
    total = 0.0
    for low, high, mass in zip(found["child_low"], found["child_high"], found["child_logprob"], strict=True):
        total -= math.exp(mass) * math.log(sum(p.get(token, 0.0) for token in order[low:high]))
    return total


def test_what_cannot_be_spelled_goes_to_rest() -> None:
    """Root: unknown bytes and a special without a role. Interior: what ends with the emitted bytes."""
    teacher = table(b"ab", b"a", b"ac", b"zz", eos=True)
    student = table(b"a", b"b", eos=True)
    row = {0: 0.4, 1: 0.2, 2: 0.1, 3: 0.1, 4: 0.1}
    found = columns_of(student, teacher, [row], ([0, 1], [1, 2]), ([0], [2]), ([2], [1]), "ab")
    assert found["prefix_count"] == [2, 1]
    assert found["prefix_ids"] == [0, 2, 1]
    assert np.exp(found["prefix_logprob"]).tolist() == pytest.approx([0.7, 0.1, 0.4 / 0.7])
    # the row's own REST and zz; then a and ac, of the .7 that start with a
    assert np.exp(found["prefix_rest_logprob"]).tolist() == pytest.approx([0.2, 0.3 / 0.7])
    # no student token starts with c: the group of ac has nothing to learn
    assert found["child_count"] == [0, 1]
    assert found["child_logprob"] == pytest.approx([math.log(0.4)])


def test_the_students_merges_decide_about_the_first_token(tmp_path: Path) -> None:
    """Merges b c, a b: "abc" is a, bc, though ab fits; without its a it is bc; half a character has no encoding."""
    teacher = table(b"abc", b"ab", b"a\xc3", b"\xc3", b"\x80")
    student = write_bpe(tmp_path, ["b c", "a b"])
    known = {piece: student.table.by_bytes()[piece] for piece in (b"a", b"ab", b"bc", b"c", b"b", b"\xc3", b"\x80")}
    phi_B = first_tokens(teacher, student)
    found = PrefixMaps.of(student.table, teacher, build_w(student.table, teacher), phi_B)
    spelled = [b"a", b"bc", b"c", b"ab", b"b", b"a", b"\xc3", b"\xc3", b"\x80"]
    assert found.phi_B.tolist() == [known[piece] for piece in spelled]
    assert found.alone_U.tolist() == [True, False, True, False, False]


def test_a_group_shorter_than_the_students_token_teaches_nothing() -> None:
    """'ab' is shortest in its group; the student said 'abc', of which no group is a continuation."""
    teacher, student = table(b"ab", b"abcd", b"abc"), table(b"a", b"b", b"abc", b"d")
    row = {0: 0.5, 1: 0.3, 2: 0.2}
    found = columns_of(student, teacher, [row, row], ([2, 3], [3, 4]), ([1], [4]), ([2], [1]), "abcd")
    assert found["child_count"] == [0, 0]
    assert found["prefix_count"] == [2, 1]


def test_a_boundary_whose_bytes_are_not_the_teachers_has_no_target() -> None:
    """The teacher's token says 'x' where the text says 'ab': after 'a', its row is about other bytes."""
    teacher, student = table(b"xy", b"ab"), table(b"a", b"b")
    row = {0: 0.5, 1: 0.5}
    changed = columns_of(student, teacher, [row], ([0, 1], [1, 2]), ([0], [2]), ([2], [1]), "ab")
    assert changed["prefix_count"] == [1, 0]
    assert changed["prefix_rest_logprob"][1] == 0
    same = columns_of(student, teacher, [row], ([0, 1], [1, 2]), ([1], [2]), ([2], [1]), "ab")
    assert same["prefix_count"] == [1, 1]


def test_a_token_without_width_inside_a_chunk_has_no_target() -> None:
    """A snapped block: its last tokens carry the block's end, their own boundaries are unknown."""
    teacher, student = table(b"abc", b"d"), table(b"a", b"b", b"c", b"d")
    rows = [{0: 0.9, 1: 0.1}, {0: 0.2, 1: 0.8}]
    mine = ([0, 1, 2, 3], [3, 3, 3, 4])
    found = columns_of(student, teacher, rows, mine, ([0, 1], [3, 4]), ([3, 4], [1, 2]), "abcd")
    assert found["prefix_count"] == [2, 0, 0, 2]


def test_equal_bytes_mean_the_token_the_tokenizer_uses() -> None:
    student = TokenTable.build(
        [b",", b",", b"x"], [None] * 3, [True, False, False], np.zeros((0, 2), np.int32), name="s", kind="metaspace"
    )
    teacher = table(b",", b"x")
    found = columns_of(student, teacher, [{0: 0.7, 1: 0.3}], ([1], [1]), ([0], [1]), ([1], [1]), ",")
    assert found["prefix_ids"] == [1, 2]


class Continuations:
    """Rows full of tokens that begin as the text goes on."""

    def __init__(self, teacher: TokenTable, k: int, seed: int) -> None:
        self._pieces = teacher.pieces()
        self._known: dict[bytes, int] = teacher.by_bytes()
        self._text = np.flatnonzero(teacher.lengths > 0)
        self._special = [i for i, role in enumerate(teacher.role) if role in ("eos", "bos", "pad", "special")]
        self._start: dict[bytes, list[int]] = {}
        for token in self._text.tolist():
            self._start.setdefault(self._pieces[token][:2], []).append(token)
        self._k = k
        self._rng = np.random.default_rng(seed)

    def row(self, text: bytes, realised: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Ids and log-probabilities, sorted, and that of the realised token."""
        ids = {realised, *self._rng.choice(self._special, 2).tolist()}
        ids |= {self._known[text[:n]] for n in range(1, 12) if text[:n] in self._known}
        near = self._start.get(text[:2]) or self._text.tolist()
        ids |= set(self._rng.choice(near, 12).tolist()) | set(self._rng.choice(self._text, 6).tolist())
        chosen = np.array(sorted(ids), np.int32)
        p = self._rng.dirichlet(np.full(len(chosen) + 1, 0.5))[:-1]
        order = np.argsort(-p, kind="stable")[: self._k]
        logprob = np.log(np.maximum(p, 1e-9))
        return chosen[order], logprob[order], float(logprob[chosen.tolist().index(realised)])


def capture_of(root: Path, teacher: TextTokenizer, k: int = 24, *, bos: bool = True) -> Path:
    """A capture's data file with made-up rows."""
    source, samples = Continuations(teacher.table, k, 1), []
    for number, text in enumerate(TEXTS):
        encoded = teacher.encode(text, complete=number != 1)
        starts = [0, *encoded.ends[:-1].tolist()]
        rows = [
            source.row(encoded.text.encode()[start:], int(token))
            for start, token in zip(starts, encoded.ids, strict=True)
        ][0 if bos else 1 :]
        width = max((len(ids) for ids, _, _ in rows), default=0)
        ids, logprob = np.zeros((len(rows), width), np.int32), np.full((len(rows), width), -np.inf, np.float32)
        for at, (some, values, _) in enumerate(rows):
            ids[at, : len(some)], logprob[at, : len(some)] = some, values
        realised = np.array([value for _, _, value in rows], np.float32)
        made = TeacherRows(ids, logprob, realised, np.zeros(len(rows), np.int32))
        packed = pack(made, k=k, min_p=0.0, vocab_size=teacher.table.size)
        samples.append(
            Sample(
                sample_id=f"{number}#0",
                text=encoded.text,
                teacher_ids=encoded.ids,
                teacher_end=encoded.ends,
                packed=packed,
                realised_logprob=realised,
                space_logprob=None,
                first_row=0 if bos else 1,
                complete=number != 1,
                snapped=encoded.snapped,
            )
        )
    (root / "data").mkdir(parents=True)
    write_parquet(str(root / "data" / "part-00000.parquet"), CAPTURE, [capture_batch(samples, CAPTURE)])
    return root


def read_one(path: Path, teacher: TokenTable) -> pa.RecordBatch:
    """A part without a capture around it, whose codes are ids, as align reads it."""
    (batch,) = iter_parquet(str(path))
    return with_teacher_eos(restore_ids(batch, np.arange(teacher.size, dtype=np.int32)), teacher.info.eos_id)


# Every ending of 262,000 tokens is encoded.
LARGE = pytest.param(("gemma3", "smollm2"), marks=pytest.mark.thorough)
Pair = tuple[pa.RecordBatch, list[Joined], pa.RecordBatch, TextTokenizer, TokenTable, Projection]


@pytest.fixture(scope="module", params=[LARGE, ("smollm2", "llama2"), ("llama2", "bytes")])
def pair(
    request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """Targets of a real pair, teacher first; the second teacher sees no BOS, the third prepends a space."""
    names = [name if name == "bytes" else str(tokenizer_file(name)) for name in request.param]
    teacher, student = load_tokenizer(names[0]), load_tokenizer(names[1])
    root = capture_of(tmp_path_factory.mktemp("made"), teacher, bos=request.param[0] != "smollm2")
    batch = read_one(root / "data" / "part-00000.parquet", teacher.table)
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    projection = build_w(student.table, teacher.table)
    # test_blanks.py is about shifted rows
    maps = replace(
        Maps.of(projection, "prefix", student.table, teacher.table, phi_B=first_tokens(teacher.table, student)),
        blanks=None,
    )
    recipe = Recipe(["byte-prefix"], "first", 1.0, CodecInfo(k=24, min_p=0.0, step=1 / 32))
    targets, _ = target_batch(batch, samples, maps, recipe)
    Rules(maps, recipe).check(summary_batch(batch, samples, targets, recipe.losses))
    return batch, samples, targets, student, teacher.table, projection


def flat(targets: pa.RecordBatch, name: str) -> list[Any]:
    values: list[Any] = targets[name].flatten().to_pylist()
    return values


def boundaries(pair: Pair) -> dict[int, tuple[int, int, bytes]]:
    """Student token (all samples counted on) -> sample, row, emitted bytes: what has a target, from bytes alone."""
    batch, samples, _, _, teacher, _ = pair
    pieces, found, base = teacher.pieces(), {}, 0
    for sample in samples:
        text, first = batch["text"][sample.at].as_py().encode(), batch["first_row"][sample.at].as_py()
        ids, ends = batch["teacher_ids"][sample.at].as_py(), batch["teacher_end"][sample.at].as_py()
        mine = [0, *sample.encoded.ends.tolist()]
        cuts = list(pairwise(zip([0, *sample.chunks.student_end], [0, *sample.chunks.teacher_end], strict=True)))
        for (s0, t0), (s1, t1) in cuts[int(sample.chunks.gap[:1].sum()) :]:
            if t0 < first:
                continue
            found[base + int(s0)] = (sample.at, int(t0) - first, b"")
            for i in range(int(s0) + 1, int(s1)):
                for t in range(int(t0), int(t1)):
                    begin = ends[t - 1] if t else 0
                    emitted = text[begin : mine[i]]
                    if begin < mine[i] < ends[t] and mine[i + 1] > mine[i] and pieces[ids[t]].startswith(emitted):
                        found[base + i] = (sample.at, t - first, emitted)
        base += len(sample.encoded.ids)
    return found


def tables(pair: Pair, *, roots: bool) -> dict[str, pa.Table]:
    """Inputs of the oracles; ``place`` is the student token, all samples counted on."""
    batch, samples, _, tokenizer, teacher, projection = pair
    student = tokenizer.table
    sides = {
        name: pa.table(
            {
                "token_id": np.arange(side.size),
                "hex": [piece.hex().upper() for piece in side.pieces()],
                "byte_fallback": side.byte_fallback,
            }
        )
        for name, side in (("student", student), ("teacher", teacher))
    }
    entries: list[tuple[int, int, float]] = []
    rest: list[tuple[int, float]] = []
    emitted: list[tuple[int, str]] = []
    begun: list[tuple[int, str]] = []
    left: set[bytes] = set()
    columns, spelled, pieces = batch.to_pylist(), student.pieces(), teacher.pieces()
    ids = np.concatenate([sample.encoded.ids for sample in samples]).tolist()
    for at, (number, row, before) in boundaries(pair).items():
        if roots and before:
            continue
        sample = columns[number]
        start = sum(sample["kept"][:row])
        span = slice(start, start + sample["kept"][row])
        levels = np.cumsum(sample["topk_gap"][span]).tolist()
        left |= {pieces[t].removeprefix(before) for t in sample["topk_ids"][span] if pieces[t].startswith(before)}
        entries += [(at, token, -level / 32) for token, level in zip(sample["topk_ids"][span], levels, strict=True)]
        if not before:
            gap = sample["rest_gap"][row]
            rest.append((at, -math.inf if gap == 65535 else -gap / 32))
        emitted.append((at, before.hex().upper()))
        begun.append((at, spelled[ids[at]].hex().upper()))
    w = projection.tables()[0].to_pylist()
    roles = [(row["teacher_id"], row["student_id"]) for row in w if row["kind"] == "role"]
    return {
        **sides,
        "entries": frame(entries, ("place", "teacher_id", "logprob")),
        "rest": frame(rest, ("place", "logprob")),
        "emitted": frame(emitted, ("place", "hex")),
        "begun": frame(begun, ("place", "hex")),
        "encoded": frame(encoded(tokenizer, left) or [("", -1)], ("hex", "token_id")),
        "roles": frame(roles or [(-1, -1)], ("teacher_id", "student_id")),
    }


def encoded(tokenizer: TextTokenizer, texts: set[bytes]) -> list[tuple[str, int]]:
    """In hex, those that are texts, and the first token of each, one by one; behind a line end, as no text begins."""
    found, pieces = [], tokenizer.table.pieces()
    behind = "\n" if tokenizer.encode("a", complete=False).ids.tolist() != tokenizer.token_ids(["\na"])[0][-1:] else ""
    for data in sorted(texts - {b""}):
        try:
            text = behind + data.decode()
        except UnicodeDecodeError:
            continue
        one = tokenizer.encode(text, complete=False)
        starts = [0, *one.ends.tolist()]
        at = max(place for place, start in enumerate(starts[:-1]) if start == len(behind))
        token = int(one.ids[at])
        if data.startswith(pieces[token]):
            found.append((data.hex().upper(), token))
    return found


def frame(rows: list[Any], names: tuple[str, ...]) -> pa.Table:
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def run_sql(name: str, inputs: dict[str, pa.Table]) -> dict[int, list[Any]]:
    """Rows of an oracle by student token, in its order."""
    with duckdb.connect() as connection:
        for table_name, value in inputs.items():
            connection.register(table_name, value)
        found: dict[int, list[Any]] = {}
        for at, *rest in connection.execute(query(name)).fetchall():
            found.setdefault(at, []).append(tuple(rest))
    return found


@pytest.mark.thorough
def test_root_and_interior_are_those_of_the_sql(pair: Pair) -> None:
    oracle, targets = run_sql("prefix", tables(pair, roots=False)), pair[2]
    ids, logprobs = iter(flat(targets, "prefix_ids")), iter(flat(targets, "prefix_logprob"))
    interior = 0
    wanted = boundaries(pair)
    for at, (count, rest) in enumerate(
        zip(flat(targets, "prefix_count"), flat(targets, "prefix_rest_logprob"), strict=True)
    ):
        mine = {next(ids): next(logprobs) for _ in range(count)}
        expected = dict(oracle.get(at, []))
        left = expected.pop(None, -math.inf)
        if not expected:
            assert (count, rest) == (0, 0)
            continue
        assert mine == pytest.approx(expected, abs=ROUNDING)
        assert list(mine.values()) == sorted(mine.values(), reverse=True)
        assert rest == pytest.approx(left, abs=ROUNDING)
        interior += bool(wanted[at][2])
    assert next(ids, None) is None
    assert interior > 10


def test_child_is_that_of_the_sql(pair: Pair) -> None:
    oracle, targets = run_sql("child", tables(pair, roots=True)), pair[2]
    lows, highs = iter(flat(targets, "child_low")), iter(flat(targets, "child_high"))
    masses = iter(flat(targets, "child_logprob"))
    last = np.cumsum([len(sample.encoded.ids) for sample in pair[1]]).tolist()
    groups = 0
    for at, count in enumerate(flat(targets, "child_count")):
        mine = [(next(lows), next(highs), next(masses)) for _ in range(count)]
        expected = oracle.get(at - 1, []) if at not in last else []
        assert [row[:2] for row in mine] == [row[:2] for row in expected]
        assert [row[2] for row in mine] == pytest.approx([row[2] for row in expected], abs=ROUNDING)
        groups += count
    assert groups > 10


def test_what_must_hold_on_real_tokenizers(pair: Pair) -> None:
    """phi begins the student's own encoding, ranges hold exactly the tokens that go on with r, and masses add up."""
    _, samples, targets, tokenizer, teacher, _ = pair
    student = tokenizer.table
    order = VocabArrays.of(student.pieces(), student.role).order
    pieces = student.pieces()
    words = [pieces[token] for token in order.tolist()]
    mine = [pieces[token] for sample in samples for token in sample.encoded.ids.tolist()]
    lows, highs = iter(flat(targets, "child_low")), iter(flat(targets, "child_high"))
    for at, count in enumerate(flat(targets, "child_count")):
        assert not count or mine[at - 1]
        for _ in range(count):
            low, high = next(lows), next(highs)
            common = shared(words[low], words[high - 1])
            assert any(
                (low == 0 or not words[low - 1].startswith(common[:n]))
                and (high == len(words) or not words[high].startswith(common[:n]))
                for n in range(1, len(common) + 1)
            ), "the range is not all tokens with one prefix"
    longest_B, own_B = longest_tokens(teacher, student), first_tokens(teacher, tokenizer)
    data, known = teacher.data.tobytes(), student.by_bytes()
    other = 0
    for at in np.random.default_rng(0).choice(len(data), 2000).tolist():
        token = int(np.searchsorted(teacher.offsets, at, side="right")) - 1
        left = data[at : teacher.offsets[token + 1]]
        fits = [known[left[:n]] for n in range(len(left), 0, -1) if left[:n] in known]
        assert longest_B[at] == (fits[0] if fits else -1)
        (first,) = [first for _, first in encoded(tokenizer, {left})] or [longest_B[at]]
        assert own_B[at] == first
        other += first != longest_B[at]
    assert other > 100 or student.info.kind == "bytes", "they are not the same"


def shared(a: bytes, b: bytes) -> bytes:
    """The longest common prefix."""
    return a[: next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
