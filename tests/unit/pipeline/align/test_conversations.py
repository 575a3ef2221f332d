"""Conversations of real families through align: chunks against their definition, and what holds of every pair."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from chat_batches import CODEC, LEARN, chat_batch
from hypothesis import given, settings
from talks import TALKS

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Chunks, Joined
from xtoken.pipeline.align.conversations import ChatStudent, Reading, conversation_counts, join_conversations
from xtoken.pipeline.align.encoding import Refusal
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.prefix import longest_tokens
from xtoken.pipeline.align.rows import Recipe, RowBatch
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.chats import ChatModel, Conversation, Refused, read_row
from xtoken.pipeline.project import build_w
from xtoken.pipeline.store.verify import TargetCheck
from xtoken.pipeline.store.writer import write_parquet
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import CHAT_TARGETS
from xtoken.schemas.target_form import TargetForm

from ..chats.conftest import ALL, QUICK, Model
from ..chats.conftest import model as model  # the fixture
from ..chats.test_random import talks
from ..chats.test_spans import small

LOSSES = ["p-kl", "h-kl", "gold", "uld", "strict", "alm"]
RECIPE = Recipe(LOSSES, "first", 1.0, CODEC)


def talk(kind: str) -> Conversation:
    return read_row({"messages": TALKS[kind]}, "messages")


def written(teacher: ChatModel) -> dict[str, Conversation]:
    """The conversations that a family can write."""
    found = {}
    for kind in TALKS:
        try:
            teacher.encode(talk(kind), LEARN)
        except Refused:
            continue
        found[kind] = talk(kind)
    return found


def student_of(chat: ChatModel) -> ChatStudent:
    return ChatStudent(chat, ChatInfo(template="0" * 64, date="2026-07-04", learn=[*LEARN]))


def spans(sample: Joined) -> list[tuple[tuple[int, int], tuple[int, int], bool]]:
    student, teacher = (
        [*pairwise([0, *end.tolist()])] for end in (sample.chunks.student_end, sample.chunks.teacher_end)
    )
    return list(zip(student, teacher, sample.chunks.gap.tolist(), strict=True))


def reference(reading: Reading, teacher_end: list[int]) -> list[tuple[tuple[int, int], tuple[int, int], bool]]:
    """Chunks as they are defined: every pair of a student's and a teacher's token that ends at the same byte of the
    same taught span is a boundary; a span without bytes has one, behind its last tokens; the rest are gaps."""
    student_end = reading.tokens.ends.tolist()
    ends = set()
    for match in reading.pairing.matches:
        mine, theirs = match.student, match.teacher
        if not match.taught:
            continue
        if mine.byte_start == mine.byte_end:
            if mine.token_end > mine.token_start and theirs.token_end > theirs.token_start:
                ends.add((mine.token_start, mine.token_end, theirs.token_start, theirs.token_end))
            continue
        before: list[int] = []
        for byte in range(match.size + 1):
            after = [
                max((at + 1 for at in range(one.token_start, one.token_end) if end[at] == start + byte), default=None)
                or (one.token_start if start + byte == one.byte_start else None)
                for one, start, end in (
                    (mine, match.student_start, student_end),
                    (theirs, match.teacher_start, teacher_end),
                )
            ]
            if None not in after:
                if before:
                    ends.add((before[0], after[0], before[1], after[1]))
                before = after
    found, student, teacher = [], 0, 0
    for s_start, s_end, t_start, t_end in sorted(ends):
        if (s_start, t_start) != (student, teacher):
            found.append(((student, s_start), (teacher, t_start), True))
        found.append(((s_start, s_end), (t_start, t_end), False))
        student, teacher = s_end, t_end
    if (student, teacher) != (len(student_end), len(teacher_end)):
        found.append(((student, len(student_end)), (teacher, len(teacher_end)), True))
    return found


def aligned(
    batch: pa.RecordBatch, teacher: ChatModel, student: ChatModel, recipe: Recipe = RECIPE
) -> tuple[list[Any], list[Joined], pa.RecordBatch, Rules]:
    readings = student_of(student).read(batch)
    samples = join_conversations(batch, readings)
    tables = student.tokenizer.table, teacher.tokenizer.table
    maps = Maps.of(build_w(*tables), "prefix", *tables)
    targets, _ = target_batch(batch, samples, maps, recipe)
    return readings, samples, targets, Rules(maps, recipe)


PAIRS = [
    pytest.param(*two, marks=[] if {*two} <= {*QUICK} else [pytest.mark.thorough], id="-".join(two))
    for two in permutations(ALL, 2)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair(model: Model, first: str, second: str) -> None:
    """Chunks are those of the definition, partition both sides, and spell the messages; the stored rules hold."""
    teacher, student = model(first), model(second)
    batch = chat_batch(teacher, written(teacher))
    readings, samples, targets, rules = aligned(batch, teacher, student)
    assert list(rules.broken(summary_batch(batch, samples, targets, LOSSES))) == []
    rows = RowBatch.of(batch, RECIPE)
    start_C, end_C = rows.spans(samples)
    assert len(start_C) == sum(len(sample.chunks.gap) for sample in samples)
    chunk = 0
    for sample in samples:
        reading = readings[sample.at]
        teacher_end = batch["teacher_end"][sample.at].as_py()
        theirs = teacher.encode(talk(batch["sample_id"][sample.at].as_py()), LEARN)
        assert spans(sample) == reference(reading, teacher_end)
        assert sample.learn is not None
        data = sample.encoded.text.encode()
        for (s_start, s_end), (t_start, t_end), gap in spans(sample):
            taught = theirs.learn[t_start:t_end]
            row = slice(int(start_C[chunk]), int(end_C[chunk]))
            chunk += 1
            if gap:
                assert row.start == -1
                continue
            assert sample.learn[s_start:s_end].all()
            assert taught.all()
            # each taught token has the row of its own place among the taught
            before = int(rows.offset_N[sample.at] + theirs.learn[:t_start].sum())
            assert (row.start, row.stop) == (before, before + t_end - t_start)
            begin = teacher_end[t_start - 1] if t_start else 0
            mine = reading.tokens.text.encode()
            shift = int(reading.tokens.ends[s_end - 1]) - int(sample.encoded.ends[s_end - 1])
            assert sample.encoded.ends[s_end - 1] == teacher_end[t_end - 1]
            assert mine[begin + shift : teacher_end[t_end - 1] + shift] == data[begin : teacher_end[t_end - 1]]
    met = {kind: stops(readings[at]) for at, kind in enumerate(batch["sample_id"].to_pylist())}
    for kind in ("plain", "system", "hostile"):
        if met.get(kind) is not None and "chatglm3" not in (first, second):
            answers = sum(message["role"] == "assistant" for message in TALKS[kind])
            assert met[kind] == answers
    counts = conversation_counts(readings, samples)
    assert counts["chat_chunk_bytes"] <= counts["chat_taught_bytes"]


def stops(reading: Any) -> int | None:
    if not isinstance(reading, Reading):
        return None
    return sum(match.taught and match.teacher.kind == "stop" for match in reading.pairing.matches)


def test_a_small_one_by_hand() -> None:
    """Bytes on both sides; the first chunk of the answer begins behind all that the templates wrote."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ab"}]
    conversation = read_row({"messages": messages}, "messages")
    teacher = small("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}$")
    student = small("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    batch = chat_batch(teacher, {"a": conversation})
    readings, (sample,), targets, rules = aligned(batch, teacher, student)
    # <u>Hi<a> a b $ against [Hi][ a b ]
    assert spans(sample) == [
        ((0, 5), (0, 8), True),
        ((5, 6), (8, 9), False),
        ((6, 7), (9, 10), False),
        ((7, 8), (10, 11), True),
    ]
    (row,) = targets.to_pylist()
    assert bytes(row["student_ids"]) == b"[Hi][ab]"
    assert row["student_end"] == [0, 1, 2, 2, 2, 3, 4, 4]
    assert row["learn"] == [False] * 5 + [True] * 2 + [False]
    assert [math.isnan(value) for value in row["teacher_logprob"]] == [True, False, False, True]
    assert [count > 0 for count in row["pkl_count"]] == [False, True, True, False]
    # the first row is the teacher's for "a", whose probability is one of its entries
    first = dict(zip(row["pkl_ids"][: row["pkl_count"][1]], row["pkl_logprob"], strict=False))
    assert first[ord("a")] == pytest.approx(row["teacher_logprob"][1], abs=0.03)
    assert list(rules.broken(summary_batch(batch, [sample], targets, LOSSES))) == []
    assert dict(conversation_counts(readings, [sample])) == {
        "chat_ce_only_tokens": 0,
        "chat_chunk_bytes": 2,
        "chat_learn_tokens": 2,
        "chat_taught_bytes": 2,
        "chat_tokens_differ": 0,
    }


def test_what_the_student_cannot_have_is_lost_and_its_own_text_is_learned_from_alone(model: Model) -> None:
    """SmolLM2's template leaves Qwen3's calls out; it keeps line ends that Qwen3 strips."""
    teacher, student = model("qwen3"), model("smollm2")
    batch = chat_batch(teacher, {"calls": talk("calls")})
    readings, samples, _, _ = aligned(batch, teacher, student)
    counts = conversation_counts(readings, samples)
    assert (counts["chat_lost_call_absent"], counts["chat_lost_stop_not_taught"]) == (2, 1)
    assert counts["chat_chunk_bytes"] == len("It rains.")
    assert counts["chat_ce_only_tokens"] == 0
    back = chat_batch(student, {"blanks": talk("blanks")})
    readings, samples, _, _ = aligned(back, student, teacher)
    counts = conversation_counts(readings, samples)
    # SmolLM2's token of two line ends and a blank has more than Qwen3's first blank
    assert (counts["chat_chunk_bytes"], counts["chat_lost_assistant_other_bytes"]) == (len(" Hello \n"), 0)
    assert (counts["chat_learn_tokens"], counts["chat_ce_only_tokens"]) == (4, 1)


def test_who_refuses_is_named_by_reason(model: Model) -> None:
    refusing = small("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ raise_exception('no') }}")
    batch = chat_batch(model("smollm2"), {"plain": talk("plain")})
    (found,) = student_of(refusing).read(batch)
    assert isinstance(found, Refusal)
    assert found.reason == "the chat template refuses it"
    assert join_conversations(batch, [found]) == []


def test_what_is_no_conversation_is_damage(model: Model) -> None:
    batch = chat_batch(model("smollm2"), {"plain": talk("plain")})
    at = batch.schema.get_field_index("messages")
    damaged = batch.set_column(at, batch.schema.field(at), pa.array(["[]"]))
    with pytest.raises(VerificationError, match="'plain': its messages and spans are no conversation"):
        student_of(model("smollm2")).read(damaged)


def test_a_span_that_ends_within_a_character_is_named(model: Model) -> None:
    """Rules of a capture let it pass where a token does so, too; the student's rendering trims the answer."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Hello 𝔘 \n"}]
    batch = chat_batch(model("smollm2"), {"cut": read_row({"messages": said}, "messages")})
    at, size = batch.schema.get_field_index("span_byte_end"), len(b"?Hello")
    ends = [[size + 2 if end > size else end for end in batch["span_byte_end"][0].as_py()]]
    damaged = batch.set_column(at, batch.schema.field(at), pa.array(ends, batch.schema.field(at).type))
    with pytest.raises(VerificationError, match=r"'cut': its messages and spans are no conversation \('utf-8' codec"):
        student_of(model("llama3")).read(damaged)


@pytest.fixture(scope="module")
def checked(model: Model) -> tuple[pa.RecordBatch, list[Joined], pa.RecordBatch, Rules]:
    teacher, student = model("qwen3"), model("smollm2")
    batch = chat_batch(teacher, written(teacher))
    _, samples, targets, rules = aligned(batch, teacher, student)
    return batch, samples, targets, rules


def flipped(values: list[bool]) -> list[bool]:
    return [not value for value in values]


BREACHES: dict[str, tuple[str, Callable[[list[Any]], list[Any]], str]] = {
    "untaught": ("learn", flipped, "a chunk with a target has a token that is not taught"),
    "length": ("learn", lambda learn: learn[:-1], "learn has another length than its tokens"),
    "target": ("teacher_logprob", lambda _: [-1.0] * len(_), "a chunk with a target has a token that is not taught"),
    "no target": (
        "teacher_logprob",
        lambda _: [math.nan] * len(_),
        "taught bytes that both sides have are in no chunk",
    ),
    "entries": ("pkl_count", lambda counts: [1] * len(counts), "a gap has entries of a target"),
    "student's rest": ("chunk_student_end", lambda ends: [*ends[:-1], ends[-1] - 1], "chunks do not cover all tokens"),
    "teacher's rest": ("chunk_teacher_end", lambda ends: [*ends[:-1], ends[-1] - 1], "chunks do not cover all tokens"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_every_rule_of_conversations_is_checked(checked: Any, breach: str) -> None:
    batch, samples, targets, rules = checked
    name, change, rule = BREACHES[breach]
    values = targets[name].to_pylist()
    values[0] = change(values[0])
    at = targets.schema.get_field_index(name)
    field = targets.schema.field(at)
    broken = targets.set_column(at, field, pa.array(values, field.type))
    alone = Rules(rules.maps, replace(RECIPE, losses=["p-kl"]))
    found = alone.broken(summary_batch(batch, samples, broken, ["p-kl"]))
    sample_id = targets["sample_id"][0].as_py()
    assert any(rule in said for name, said in found if name == sample_id)


def test_an_empty_gap_is_found(checked: Any) -> None:
    batch, samples, targets, rules = checked
    chunks = samples[0].chunks
    columns = [chunks.student_end, chunks.teacher_end, chunks.gap]
    more = replace(samples[0], chunks=Chunks(*(np.append(column, column[-1]) for column in columns)))
    assert more.chunks.gap[-1]
    found, _ = target_batch(batch, [more, *samples[1:]], rules.maps, rules.recipe)
    broken = list(rules.broken(summary_batch(batch, [more, *samples[1:]], found, LOSSES)))
    assert broken == [(targets["sample_id"][0].as_py(), "a gap has no tokens")]


@pytest.mark.parametrize(
    ("first", "second"),
    [("smollm2", "qwen3"), ("qwen3", "phi3-medium"), ("phi3-medium", "smollm2")]
    + [pytest.param(*two, marks=pytest.mark.thorough) for two in (("deepseek_v3", "gemma3"), ("llama3_1", "qwen3"))],
)
def test_any_conversation(model: Model, first: str, second: str) -> None:
    teacher, student = model(first), model(second)
    tables = student.tokenizer.table, teacher.tokenizer.table
    maps = Maps.of(build_w(*tables), "prefix", *tables)
    rules = Rules(maps, RECIPE)
    seen = 0

    @settings(max_examples=25)
    @given(talks)
    def run(messages: list[dict[str, Any]]) -> None:
        nonlocal seen
        try:
            batch = chat_batch(teacher, {"a": read_row({"messages": messages}, "messages")})
        except Refused:
            return
        readings = student_of(student).read(batch)
        samples = join_conversations(batch, readings)
        targets, _ = target_batch(batch, samples, maps, RECIPE)
        assert list(rules.broken(summary_batch(batch, samples, targets, LOSSES))) == []
        for sample in samples:
            seen += 1
            reading = readings[sample.at]
            assert isinstance(reading, Reading)
            assert spans(sample) == reference(reading, batch["teacher_end"][sample.at].as_py())

    run()
    assert seen > 5


def test_byte_prefix_has_no_target_in_gaps(model: Model) -> None:
    """A group of teacher tokens that an answer's last token begins to spell would stand at the template's next one."""
    teacher, student = model("phi3-medium"), model("smollm2")
    tables = student.tokenizer.table, teacher.tokenizer.table
    maps = Maps.of(build_w(*tables), "prefix", *tables, phi_B=longest_tokens(tables[1], tables[0]))
    recipe = Recipe(["byte-prefix"], "first", 1.0, CODEC)
    batch = chat_batch(teacher, written(teacher))
    samples = join_conversations(batch, student_of(student).read(batch))
    targets, _ = target_batch(batch, samples, maps, recipe)
    assert list(Rules(maps, recipe).broken(summary_batch(batch, samples, targets, ["byte-prefix"]))) == []
    counts = targets["prefix_count"].flatten().to_numpy()
    learn = targets["learn"].flatten().to_numpy(zero_copy_only=False)
    assert (counts > 0).sum() > 20
    assert not (counts[~learn] > 0).any()


@pytest.mark.parametrize(
    ("first", "second", "label"), [("phi3-medium", "smollm2", b"Hello"), ("smollm2", "phi3-medium", b" Hello")]
)
def test_a_blank_in_front_of_an_answer_shifts_its_first_row(
    model: Model, first: str, second: str, label: bytes
) -> None:
    """Llama-2's tokenizer puts one behind each marker. Targets of p-kl are tokens of the teacher's, shifted."""
    teacher, student = model(first), model(second)
    batch = chat_batch(teacher, {"system": talk("system")})
    _, samples, targets, rules = aligned(batch, teacher, student)
    _, counts = target_batch(batch, samples, rules.maps, RECIPE)
    assert counts["chunks_shifted"] == 1
    (row,) = targets.to_pylist()
    size = next(count for count in row["pkl_count"] if count)
    assert teacher.tokenizer.table.by_bytes()[label] in row["pkl_ids"][:size]


def test_verify_reads_chunks_of_conversations(checked: Any, tmp_path: Path) -> None:
    """Parts as they are written, and parts that say otherwise."""
    _, _, targets, rules = checked
    form = TargetForm(["ce"], CHAT_TARGETS, rules.recipe.step)
    found = targets.select(form.schema.names).cast(form.schema)
    path = str(tmp_path / "part.parquet")
    write_parquet(path, form.schema, [form.stored_batch(found)])
    figures = TargetCheck(form)(path)
    assert figures.rows == (~np.isnan(targets["teacher_logprob"].flatten().to_numpy())).sum()
    assert figures.tokens == len(targets["student_ids"].flatten())
    for name, change, rule in (
        ("learn", flipped, "a chunk with a target has a token that is not taught"),
        ("chunk_student_end", lambda ends: [*ends[:-1], ends[-1] - 1], "chunks do not cover all tokens"),
        ("chunk_student_end", lambda ends: [ends[1], ends[0], *ends[2:]], "chunk_student_end decreases"),
    ):
        values = found[name].to_pylist()
        values[0] = change(values[0])
        at = found.schema.get_field_index(name)
        column = pa.array(values, found.schema.field(at).type)
        write_parquet(path, form.schema, [found.set_column(at, found.schema.field(at), column)])
        with pytest.raises(VerificationError, match=rule):
            TargetCheck(form)(path)


@pytest.mark.parametrize(
    ("merge", "losses", "second"),
    [
        ("last", ["gold", "uld"], "phi3-medium"),
        ("mean", ["p-kl", "h-kl"], "phi3-medium"),
        ("first", ["sparse-kl", "mined", "ce"], "smollm2"),
    ],
)
def test_any_recipe(model: Model, merge: str, losses: list[str], second: str) -> None:
    """A chunk's one row may be its last, or a mean of all: never one of another chunk's."""
    teacher, student = model("smollm2"), model(second)
    recipe = Recipe(losses, merge, 1.0, CODEC)
    batch = chat_batch(teacher, written(teacher))
    _, samples, targets, rules = aligned(batch, teacher, student, recipe)
    assert list(rules.broken(summary_batch(batch, samples, targets, losses))) == []
    gap_C = np.concatenate([sample.chunks.gap for sample in samples])
    assert np.array_equal(np.isnan(targets["teacher_logprob"].flatten().to_numpy()), gap_C)
