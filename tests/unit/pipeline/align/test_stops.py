"""What ends an answer: the student's token stands for the teacher's, in W and in every loss, worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_batches import CODEC, LEARN, chat_batch

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.conversations import ChatStudent, join_conversations
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.prefix import longest_tokens
from xtoken.pipeline.align.rows import Recipe, Rows, joined_tokens
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.chats import ChatModel, read_row
from xtoken.pipeline.project import build_w
from xtoken.pipeline.project.projection import ROLE, TO_REST
from xtoken.pipeline.project.stops import StopPair, with_stops
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.chat import ChatInfo

from ..chats.conftest import Model
from ..chats.conftest import model as model  # the fixture

LOSSES = ["p-kl", "h-kl", "gold", "uld", "strict", "byte-prefix", "alm"]
TALK = read_row({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}, "messages")
# Steps of 1/32 nat below certainty: the stop, eos, and the token "b"; what they leave is the tail mass, rounded to 75.
STOP, EOS, OTHER, REST = 20, 40, 80, 75


def p(steps: int) -> float:
    return math.exp(-steps / 32)


TOTAL = p(STOP) + p(EOS) + p(OTHER) + p(REST)
# 0.5353 + 0.2865 of 0.9999: 0.8219
BOTH = (p(STOP) + p(EOS)) / TOTAL


def test_the_worked_figure() -> None:
    assert pytest.approx(0.8219, abs=1e-4) == BOTH
    assert round(-32 * math.log(1 - p(STOP) - p(EOS) - p(OTHER))) == REST


def pair_of(student: ChatModel, teacher: ChatModel) -> StopPair:
    found = StopPair.of(student.tokenizer.table, student.stop_token, teacher.tokenizer.table.info, teacher.stop_token)
    assert found is not None
    return found


@pytest.fixture
def built(model: Model) -> dict[str, Any]:
    """The targets of the stop's chunk. Phi-3's form ends an answer with <|end|>, its eos is <|endoftext|>; SmolLM2 ends
    one with its eos."""
    teacher, student = model("phi3-medium"), model("smollm2")
    pair, tables = pair_of(student, teacher), (student.tokenizer.table, teacher.tokenizer.table)
    other, said = (tables[1].by_bytes()[data] for data in (b"b", b"a"))
    assert pair.teacher_eos is not None
    ids = [[said, other, pair.teacher], [pair.teacher, pair.teacher_eos, other]]
    logprob = np.array([[0.6, 0.2, 0.1], [p(STOP), p(EOS), p(OTHER)]], np.float64)
    label = np.log([0.6, p(STOP)]).astype(np.float32)
    rows = TeacherRows(np.array(ids, np.int32), np.log(logprob).astype(np.float32), label, np.ones(2, np.int32))
    tokens = teacher.encode(TALK, LEARN)
    assert tokens.learn.sum() == 2
    batch = chat_batch(teacher, {"a": TALK}, rows=[rows])
    samples = join_conversations(
        batch, ChatStudent(student, ChatInfo(template="0" * 64, date="2026-07-04", learn=[*LEARN])).read(batch)
    )
    projection = with_stops(build_w(*tables), pair)
    maps = Maps.of(projection, "prefix", *tables, phi_B=longest_tokens(tables[1], tables[0]), stops=pair)
    recipe = Recipe(LOSSES, "first", 1.0, CODEC)
    targets, _ = target_batch(batch, samples, maps, recipe)
    Rules(maps, recipe).check(summary_batch(batch, samples, targets, LOSSES))
    (row,) = targets.to_pylist()
    return row | {"pair": pair, "b": tables[0].by_bytes()[b"b"], "their_b": other}


def last(row: dict[str, Any], count: str, *names: str) -> list[tuple[Any, ...]]:
    """Entries of the last target, that of the stop."""
    size = [number for number in row[count] if number][-1]
    return list(zip(*(row[name][-size:] for name in names), strict=True))


def test_p_kl_has_the_mass_of_both_on_the_teachers_stop(built: dict[str, Any]) -> None:
    found = dict(last(built, "pkl_count", "pkl_ids", "pkl_logprob"))
    assert found == pytest.approx({built["pair"].teacher: math.log(BOTH), built["their_b"]: math.log(p(OTHER) / TOTAL)})


@pytest.mark.parametrize(
    ("count", "ids", "logprob"),
    [
        ("hkl_common_count", "hkl_common_ids", "hkl_common_logprob"),
        ("gold_count", "gold_ids", "gold_logprob"),
        ("strict_count", "strict_ids", "strict_logprob"),
        ("prefix_count", "prefix_ids", "prefix_logprob"),
    ],
)
def test_losses_in_the_students_tokens_have_it_on_the_students_stop(
    built: dict[str, Any], count: str, ids: str, logprob: str
) -> None:
    found = dict(last(built, count, ids, logprob))
    assert found == pytest.approx({built["pair"].student: math.log(BOTH), built["b"]: math.log(p(OTHER) / TOTAL)})


def test_a_sorted_list_has_one_entry_for_both(built: dict[str, Any]) -> None:
    found = [value for (value,) in last(built, "uld_count", "uld_logprob")]
    assert found == pytest.approx([math.log(BOTH), math.log(p(OTHER) / TOTAL)])


def test_the_likelihood_of_the_chunk_is_that_of_the_stop_alone(built: dict[str, Any]) -> None:
    known = [value for value in built["teacher_logprob"] if not math.isnan(value)]
    assert known == pytest.approx([math.log(0.6), -STOP / 32], abs=1e-5)


@pytest.mark.parametrize(("first", "second"), [("phi3-medium", "qwen3"), ("qwen3", "phi3-medium")])
def test_w_points_both_tokens_of_the_student_at_the_teachers_stop(model: Model, first: str, second: str) -> None:
    """Qwen3 ends an answer with its eos, Phi-3 with another token."""
    teacher, student = model(first), model(second)
    pair, tables = pair_of(student, teacher), (student.tokenizer.table, teacher.tokenizer.table)
    before = build_w(*tables)
    after = with_stops(before, pair)
    rows = {token: after.student_id == token for token in (pair.student, student.tokenizer.table.info.eos_id)}
    for token, row in rows.items():
        assert after.teacher_id[row].tolist() == [pair.teacher]
        assert after.weight[row].tolist() == [1.0]
        assert after.kind[row].tolist() == [ROLE]
        assert after.common[row].tolist() == [token == pair.student]
    changed = [*rows]
    kept = ~np.isin(before.student_id, changed)
    still = ~np.isin(after.student_id, changed)
    for name in ("student_id", "teacher_id", "weight", "kind", "common"):
        assert np.array_equal(getattr(before, name)[kept], getattr(after, name)[still])
    assert (np.diff(after.student_id) >= 0).all()
    assert set(after.unreached.tolist()) == set(range(teacher.tokenizer.table.size)) - set(after.teacher_id.tolist())
    assert (pair.teacher_eos is None) == (first == "qwen3")
    if pair.teacher_eos is not None:
        moved = dict(zip(after.unreached.tolist(), after.moved_to.tolist(), strict=True))
        assert moved[pair.teacher_eos] == pair.teacher
    assert after.hash != before.hash
    assert with_stops(after, pair).hash == after.hash


def test_a_second_special_token_loses_its_teacher_token(model: Model) -> None:
    """If the teacher's stop takes over from a token that only the student's eos reached, that one's mass is tail."""
    teacher, student = model("phi3-medium"), model("smollm2")
    tables = student.tokenizer.table, teacher.tokenizer.table
    pair = replace(pair_of(student, teacher), teacher_eos=None)
    after = with_stops(build_w(*tables), pair)
    eos = tables[1].info.eos_id
    assert dict(zip(after.unreached.tolist(), after.moved_to.tolist(), strict=True))[eos] == TO_REST


def test_which_tokens_are_a_pair(model: Model) -> None:
    phi, small = model("phi3-medium"), model("smollm2")
    mine, theirs = small.tokenizer.table, phi.tokenizer.table
    assert StopPair.of(mine, small.stop_token, theirs.info, None) is None
    assert StopPair.of(mine, None, theirs.info, phi.stop_token) is None
    assert StopPair.of(mine, small.stop_token, mine.info, small.stop_token) is None
    # a token of a text ends no answer
    assert StopPair.of(mine, mine.by_bytes()[b"a"], theirs.info, phi.stop_token) is None
    # the teacher's eos ends its answers: there is no mass to add
    found = StopPair.of(theirs, phi.stop_token, mine.info, small.stop_token)
    assert found is not None
    assert found.teacher_eos is None


def test_a_tokens_mass_is_anothers() -> None:
    """Against dictionaries: rows with both, with one, with the other, and without."""
    listed = [{1: 0.5, 2: 0.25}, {2: 0.5, 3: 0.25}, {1: 0.9}, {3: 0.5}, {}, {4: 0.1, 2: 0.2, 1: 0.3}]
    ids = np.array([token for row in listed for token in row], np.int32)
    mass = np.array([value for row in listed for value in row.values()])
    offsets = np.cumsum([0, *map(len, listed)])
    rows = Rows.of(offsets, ids, np.log(mass), np.full(len(listed), math.log(0.01)))
    found = joined_tokens(rows, 2, 1)
    for at, row in enumerate(listed):
        part = slice(found.offsets[at], found.offsets[at + 1])
        wanted = {token: value for token, value in row.items() if token != 2}
        if 2 in row:
            wanted[1] = wanted.get(1, 0.0) + row[2]
        assert dict(zip(found.ids[part].tolist(), found.p[part].tolist(), strict=True)) == pytest.approx(wanted)
        assert np.exp(found.logprob[part]).tolist() == pytest.approx(found.p[part].tolist())
    assert joined_tokens(rows, 9, 1) is rows
