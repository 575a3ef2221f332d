"""Views of conversations against slow loops over the files themselves; plain text has the same views."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.query import query
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.reader import iter_capture, iter_targets
from xtoken.schemas.configs.artifacts import QueryConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.spans import row_of_token
from xtoken.schemas.ui.progress import Silent

from .conftest import ask
from .test_views import columns_of


def stored(root: Path) -> list[dict[str, Any]]:
    """Samples as they lie on disk, each with the row of each of its tokens by the schema's own function."""
    found = []
    for batch in iter_capture(str(root)):
        for at in range(batch.num_rows):
            one = batch.slice(at, 1)
            found.append({**one.to_pylist()[0], "row": row_of_token(one).tolist()})
    return found


def vocab(root: Path) -> dict[int, dict[str, Any]]:
    return {row["token_id"]: row for row in pq.read_table(root / "vocab.parquet").to_pylist()}


def targets_of(root: Path) -> list[dict[str, Any]]:
    return [row for batch in iter_targets(str(root)) for row in batch.to_pylist()]


def chunks_of(sample: dict[str, Any]) -> list[tuple[int, int, bool]]:
    """Student tokens from and to, and whether there is a target."""
    ends = sample["chunk_student_end"]
    known = [not math.isnan(value) for value in sample["teacher_logprob"]]
    return list(zip([0, *ends[:-1]], ends, known, strict=True))


def test_every_view_has_the_columns_it_is_said_to_have(chat_capture: Path, chat_targets: Path) -> None:
    for root, capture in ((chat_capture, None), (chat_targets, chat_capture)):
        views = query(QueryConfig(path=str(root), capture=None if capture is None else str(capture)))["views"]
        found = columns_of(root, views, capture)
        assert {view["view"]: view["columns"].split(", ") for view in views} == found
        counts = (f"(SELECT count(*) FROM (SELECT DISTINCT * FROM {view}))" for view in found)
        assert all(count >= 0 for count in ask(root, f"SELECT {', '.join(counts)}", capture)[0].values())


def test_spans_are_those_on_disk(chat_capture: Path) -> None:
    rows, known, at = ask(chat_capture, "FROM spans"), vocab(chat_capture), 0
    kinds = Counter(row["kind"] for row in rows)
    assert {"template", "system", "user", "assistant", "thinking", "marker", "call", "result", "stop"} == set(kinds)
    for sample in stored(chat_capture):
        byte = token = 0
        for number, kind in enumerate(sample["span_kind"]):
            row, data = rows[at], sample["text"].encode()
            byte_end, token_end = sample["span_byte_end"][number], sample["span_token_end"][number]
            ids = sample["teacher_ids"][token:token_end]
            learn = sample["span_learn"][number]
            assert (row["sample_id"], row["span"], row["kind"]) == (sample["sample_id"], number, kind)
            assert (row["start_byte"], row["end_byte"], row["bytes"]) == (byte, byte_end, byte_end - byte)
            assert (row["start_token"], row["end_token"], row["tokens"]) == (token, token_end, len(ids))
            assert (row["part"], row["learn"]) == (sample["span_part"][number], learn)
            assert row["message"] == (None if kind == "template" else sample["span_message"][number])
            assert row["text"] == data[byte:byte_end].decode()
            pieces = [known[one]["bytes"] or f"<{known[one]['role']}>".encode() for one in ids]
            assert row["spelled"] == b"".join(pieces).decode("utf-8", "backslashreplace")
            nats = [sample["realised_logprob"][one] for one in sample["row"][token:token_end] if one >= 0]
            assert bool(nats) == learn or not ids
            assert row["nats"] == (pytest.approx(-sum(nats), rel=1e-5) if nats else None)
            byte, token, at = byte_end, token_end, at + 1
    assert at == len(rows)


def test_the_same_messages_are_taught_as_the_conversation_says(chat_capture: Path) -> None:
    rows = ask(
        chat_capture, "SELECT kind, message, spans.text, messages FROM spans JOIN samples USING (sample_id) WHERE learn"
    )
    for row in rows:
        message = json.loads(row["messages"])["messages"][row["message"]]
        assert message["role"] == "assistant"
        if row["kind"] == "assistant":
            assert row["text"].strip() in message["content"]
    assert len(rows) > 20


def test_plain_text_is_one_span_and_a_stop(capture: Path) -> None:
    rows = ask(capture, "FROM spans")
    samples = stored_text(capture)
    assert [(row["sample_id"], row["kind"]) for row in rows] == [
        (sample["sample_id"], kind)
        for sample in samples
        for kind in (("text", "stop") if sample["complete"] else ("text",))
    ]
    whole = {row["sample_id"]: row for row in rows if row["kind"] == "text"}
    for sample in samples:
        row, eos = whole[sample["sample_id"]], int(sample["complete"])
        assert (row["text"], row["message"], row["learn"]) == (sample["text"], None, True)
        assert (row["start_token"], row["end_token"]) == (0, len(sample["teacher_ids"]) - eos)
        assert row["end_byte"] == len(sample["text"].encode())
    assert any(sample["complete"] for sample in samples)
    assert not all(sample["complete"] for sample in samples)
    assert {row["spelled"] for row in rows if row["kind"] == "stop"} == {"<eos>"}


def stored_text(root: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_tokens_have_the_rows_that_the_schema_says(chat_capture: Path) -> None:
    rows, at = ask(chat_capture, "FROM tokens"), 0
    for sample in stored(chat_capture):
        of_span = np.repeat(np.arange(len(sample["span_kind"])), np.diff(sample["span_token_end"], prepend=0))
        for pos, (token, number) in enumerate(zip(sample["teacher_ids"], sample["row"], strict=True)):
            row, span = rows[at], int(of_span[pos])
            assert (row["sample_id"], row["pos"], row["teacher_id"]) == (sample["sample_id"], pos, token)
            assert (row["span"], row["kind"]) == (span, sample["span_kind"][span])
            assert row["learn"] == sample["span_learn"][span] == (number >= 0)
            if number < 0:
                assert row["logprob"] is row["kept"] is row["rest"] is None
            else:
                assert row["logprob"] == pytest.approx(sample["realised_logprob"][number])
                assert row["kept"] == sample["kept"][number]
            at += 1
    assert at == len(rows)


def test_entries_stand_at_the_token_that_their_row_predicts(chat_capture: Path) -> None:
    found, at = ask(chat_capture, "SELECT sample_id, pos, rank, teacher_id, probability FROM entries"), 0
    for sample in stored(chat_capture):
        start = 0
        for pos in (pos for pos, number in enumerate(sample["row"]) if number >= 0):
            kept, level = sample["kept"][sample["row"][pos]], 0
            for rank in range(kept):
                level += sample["topk_gap"][start + rank]
                row = found[at]
                assert (row["sample_id"], row["pos"], row["rank"]) == (sample["sample_id"], pos, rank)
                assert row["teacher_id"] == sample["topk_ids"][start + rank]
                assert row["probability"] == pytest.approx(math.exp(-level / 32))
                at += 1
            start += kept
    assert at == len(found)


def test_samples_count_what_is_taught(chat_capture: Path) -> None:
    found = {row["sample_id"]: row for row in ask(chat_capture, "FROM samples")}
    for sample in stored(chat_capture):
        row = found[sample["sample_id"]]
        width = np.diff(sample["span_byte_end"], prepend=0)
        taught = int(width[np.array(sample["span_learn"])].sum())
        answers = {m for m, learn in zip(sample["span_message"], sample["span_learn"], strict=True) if learn}
        assert (row["taught_bytes"], row["turns"]) == (taught, len(answers))
        assert (row["tokens"], row["rows"]) == (len(sample["teacher_ids"]), len(sample["realised_logprob"]))
        assert row["messages"] == sample["messages"]
        bits = -sum(sample["realised_logprob"]) / math.log(2)
        assert row["bits_per_byte"] == (pytest.approx(bits / taught, rel=1e-5) if taught else None)
        assert row["bytes"] == len(sample["text"].encode())


def test_chunks_know_gaps_and_stops(chat_targets: Path) -> None:
    rows, at = ask(chat_targets, "FROM chunks"), 0
    for sample in targets_of(chat_targets):
        for number, (first, stop, known) in enumerate(chunks_of(sample)):
            row = rows[at]
            ends = [0, *sample["student_end"]]
            assert (row["sample_id"], row["chunk"]) == (sample["sample_id"], number)
            assert (row["student_start"], row["student_end"]) == (first, stop)
            assert row["kind"] == ("gap" if not known else "text" if ends[stop] > ends[first] else "stop")
            assert (row["teacher_logprob"] is None) == (not known)
            at += 1
    assert at == len(rows)
    assert {row["kind"] for row in rows} == {"gap", "text", "stop"}


def test_figures_of_targets_leave_gaps_out(chat_targets: Path) -> None:
    found = {row["sample_id"]: row for row in ask(chat_targets, "FROM samples")}
    total = Counter[str]()
    for sample in targets_of(chat_targets):
        row, ends = found[sample["sample_id"]], [0, *sample["student_end"]]
        known = [(first, stop) for first, stop, has in chunks_of(sample) if has]
        taught = sum(ends[stop] - ends[first] for first, stop in known)
        assert (row["chunks"], row["taught_bytes"]) == (len(known), taught)
        assert row["taught_tokens"] == sum(sample["learn"]) < row["student_tokens"] == len(sample["student_ids"])
        nats = -sum(value for value in sample["teacher_logprob"] if not math.isnan(value))
        assert row["bits_per_byte"] == (pytest.approx(nats / math.log(2) / taught, rel=1e-5) if taught else None)
        total.update(chunks=len(known), bytes=taught)
    (row,) = ask(
        chat_targets, "SELECT sum(chunks)::BIGINT AS chunks, sum(bytes)::BIGINT AS bytes FROM alignment_by_source"
    )
    assert row == total
    (row,) = ask(chat_targets, "SELECT sum(counts['chunks'])::BIGINT AS chunks FROM parts")
    assert row["chunks"] == total["chunks"]


def test_student_tokens_say_what_is_taught(chat_targets: Path, targets: Path) -> None:
    learned = [one for sample in targets_of(chat_targets) for one in sample["learn"]]
    assert [row["learn"] for row in ask(chat_targets, "SELECT learn FROM student_tokens")] == learned
    assert ask(targets, "SELECT DISTINCT learn FROM student_tokens") == [{"learn": True}]
    seen = ask(chat_targets, "SELECT sum(seen)::BIGINT AS seen FROM never_reached")[0]["seen"]
    assert 0 < seen <= sum(learned)


def test_tokens_of_chunks_have_their_rows(chat_targets: Path, chat_capture: Path) -> None:
    query = """
        SELECT c.sample_id, c.chunk, any_value(c.teacher_logprob) AS chunk_logprob, sum(t.logprob) AS logprob,
            count(t.logprob) AS rows
        FROM chunks AS c JOIN chunk_tokens AS t USING (sample_id, chunk) WHERE t.side = 'teacher' GROUP BY ALL
    """
    rows = ask(chat_targets, query, chat_capture)
    assert len([row for row in rows if row["chunk_logprob"] is not None]) > 20
    for row in rows:
        if row["chunk_logprob"] is not None:
            assert row["chunk_logprob"] == pytest.approx(row["logprob"], rel=1e-5)


def test_a_subset_without_text_has_spans_but_no_words(chat_capture: Path, tmp_path: Path) -> None:
    pull(PullConfig(source=str(chat_capture), destination=str(tmp_path / "bare"), columns=["none"]), Silent())
    whole, bare = ask(chat_capture, "FROM spans"), ask(tmp_path / "bare", "FROM spans")
    assert [{**row, "text": None} for row in whole] == bare
    row = ask(tmp_path / "bare", "FROM samples LIMIT 1")[0]
    assert row["messages"] is row["text"] is None
    assert row["turns"] > 0
