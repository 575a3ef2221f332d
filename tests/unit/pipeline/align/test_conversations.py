"""Conversations of real families through align: chunks against their definition, and what holds of every pair."""

from itertools import pairwise, permutations
from typing import Any

import pyarrow as pa
import pytest
from chat_batches import CODEC, LEARN, chat_batch
from talks import TALKS

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Joined
from xtoken.pipeline.align.conversations import ChatStudent, Reading, conversation_counts, join_conversations
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.rows import Recipe, RowBatch
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.chats import ChatModel, Conversation, Refused, read_row
from xtoken.pipeline.project import build_w
from xtoken.schemas.chat import ChatInfo

from ..chats.conftest import ALL, QUICK, Model
from ..chats.conftest import model as model  # the fixture

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
        before = mine.token_start, theirs.token_start
        for byte in range(mine.byte_end - mine.byte_start + 1):
            last = [
                [at for at in range(one.token_start, one.token_end) if end[at] - one.byte_start == byte]
                for one, end in ((mine, student_end), (theirs, teacher_end))
            ]
            if all(last):
                after = last[0][-1] + 1, last[1][-1] + 1
                if byte:
                    ends.add((before[0], after[0], before[1], after[1]))
                before = after
            elif byte == 0:
                before = tuple(found[-1] + 1 if found else start for found, start in zip(last, before, strict=True))
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
