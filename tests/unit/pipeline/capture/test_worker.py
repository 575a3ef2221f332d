"""A worker's rows against the teacher's own, sample by sample."""

import json
from dataclasses import replace

import numpy as np
import pytest

from xtoken.pipeline.capture.conversations import chunk_counts
from xtoken.pipeline.capture.plan import settle_plan
from xtoken.pipeline.capture.precompute import write_vocab
from xtoken.pipeline.capture.run_identity import sees_bos
from xtoken.pipeline.capture.token_codes import corpus_codes
from xtoken.pipeline.capture.worker import CaptureJob, length_batches
from xtoken.pipeline.executors.protocol import Lease
from xtoken.pipeline.store.codecs.topk import decode
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import committed
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.writer import rounded
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

TEXTS = ["One sentence, then 42 more; naïve. " * 20, "x", "日本語 and English\n" * 15, "tail 👩‍👩‍👧"]


@pytest.fixture
def config(tmp_path, tokenizer_file):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"),
        teacher=str(tokenizer_file("smollm2")),
        out=str(tmp_path / "out"),
        backend="fake",
        k=16,
        min_p=0.01,
        max_tokens=48,
        shard_bytes=1 << 20,
        batch_tokens=100,
    )


def run(config):
    folder = Folder(config.out)
    folder.make("")
    plan = settle_plan(folder, config.corpus, config.run.shard_bytes, Silent())
    tokenizer = load_tokenizer(config.teacher.teacher)
    write_vocab(folder, tokenizer.table, corpus_codes(config.corpus, plan, tokenizer))
    part = serve(config, Lease(0))
    return part, [row for batch in iter_capture(config.out) for row in batch.to_pylist()]


def serve(config, lease):
    """The part that a worker makes of one lease."""
    messages = []
    CaptureJob(config).open().serve(iter([lease]), messages.append)
    assert [one.kind for one in messages if one.kind != "progress"] == ["begun", "part"]
    return messages[-1].part


@pytest.mark.parametrize("bos", ["auto", "always"])
def test_rows_are_the_teachers(config, bos):
    config = config.changed(bos=bos)
    tokenizer = load_tokenizer(config.teacher.teacher)
    teacher = open_teacher(config.teacher, config.codec, tokenizer.table)
    part, samples = run(config)
    assert part.samples == len(samples) == len({row["sample_id"] for row in samples})
    context = [tokenizer.table.info.bos_id] if bos == "always" else []
    for row in samples:
        prompt = np.array(context + row["teacher_ids"], np.int32)
        assert row["first_row"] == 1 - len(context)
        assert len(row["kept"]) == len(prompt) - 1
        if len(prompt) < 2:
            continue
        full = teacher.rows([prompt])[0]
        np.testing.assert_array_equal(np.array(row["realised_logprob"], np.float32), rounded(full.target_logprob))
        np.testing.assert_array_equal(np.array(row["space_logprob"], np.float32), rounded(full.space_logprob))
        flat = (np.array(row[name]) for name in ("kept", "topk_ids", "topk_gap", "rest_gap"))
        found = decode(*flat)
        for r, count in enumerate(row["kept"]):
            span = slice(found.offsets[r], found.offsets[r + 1])
            np.testing.assert_array_equal(found.ids[span], full.ids[r, :count])
            np.testing.assert_allclose(found.logprob[span], full.logprob[r, :count], atol=1 / 64 + 1e-6)
            rest = 1 - np.exp(full.logprob[r, :count].astype(float)).sum()
            assert found.tail_logprob[r] == pytest.approx(np.log(rest), abs=1 / 64 + 1e-6)
            assert count == min(16, max(1, (full.logprob[r] >= np.log(0.01)).sum()))


def test_documents_are_whole_and_only_their_last_window_ends_with_eos(config):
    _, samples = run(config)
    eos = load_tokenizer(config.teacher.teacher).table.info.eos_id
    documents = {}
    for row in samples:
        documents.setdefault(row["sample_id"].rsplit("#", 1)[0], []).append(row)
        assert len(row["teacher_ids"]) <= 48
        assert (row["teacher_ids"][-1] == eos) == row["complete"]
    assert ["".join(row["text"] for row in rows) for rows in documents.values()] == TEXTS
    for rows in documents.values():
        assert [row["complete"] for row in rows] == [False] * (len(rows) - 1) + [True]


def test_batches_of_any_size_give_the_same_file(config, tmp_path):
    first, _ = run(config)
    other, _ = run(config.changed(batch_tokens=5000, out=str(tmp_path / "other")))
    assert other == first


def test_no_text(config):
    part, samples = run(config.changed(text=False))
    assert all(row["text"] is None for row in samples)
    assert part.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_second_attempt_returns_the_first_commit(config):
    part, _ = run(config)
    assert serve(config, Lease(0, 2)) == part
    assert committed(config.out) == {0: part}


def test_byte_student_counts(config):
    part, samples = run(config.changed(student="bytes"))
    table = load_tokenizer(config.teacher.teacher).table
    ids = [token for row in samples for token in row["teacher_ids"] if table.lengths[token] > 0]
    # against single bytes each teacher token is a chunk of its own
    assert part.counts["chunks"] == len(ids)
    assert part.counts["chunks_1_1"] == sum(table.lengths[token] == 1 for token in ids)
    assert part.counts["student_tokens"] == part.text_bytes


def test_a_teacher_of_too_short_a_context_is_refused(config, monkeypatch):
    import xtoken.pipeline.teachers.fake_teacher as fake

    monkeypatch.setattr(fake, "_CONTEXT", 48)
    with pytest.raises(XtokenError, match=r"--max-tokens 48 and one more do not fit the 48 tokens.*--max-tokens 47"):
        run(config)


def test_another_teacher_than_the_one_the_run_began_with_is_refused(config, monkeypatch):
    run(config)
    import xtoken.pipeline.teachers.fake_teacher as fake

    monkeypatch.setattr(fake, "_CONTEXT", 4096)
    with pytest.raises(XtokenError, match=r"holds another run .context: 1048576 there, 4096 now"):
        CaptureJob(config).open()


def test_auto_bos_is_what_the_tokenizer_does(config):
    table = load_tokenizer("bytes").table
    adding = replace(table, info=table.info.model_copy(update={"adds_bos": True, "bos_id": 3}))
    having = replace(table, info=table.info.model_copy(update={"bos_id": 3}))
    assert sees_bos(config.teacher, adding)
    assert not sees_bos(config.teacher, having)
    assert not sees_bos(config.changed(bos="never").teacher, adding)
    assert sees_bos(config.changed(bos="always").teacher, having)


def test_always_bos_needs_one(config):
    table = load_tokenizer("bytes").table
    with pytest.raises(XtokenError, match="has no BOS"):
        sees_bos(config.changed(bos="always").teacher, table)
    assert not sees_bos(config.teacher, table)


def test_length_batches_hold_everything_once_within_the_limit():
    lengths = [3, 50, 7, 7, 120, 1, 49]
    batches = list(length_batches(lengths, 100))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[0] == [4], "a sample longer than the limit goes alone"
    for batch in batches[1:]:
        assert len(batch) * max(lengths[index] for index in batch) <= 100
    assert batches[1] == [1, 6]


def test_chunk_counts():
    def count(left, right):
        return chunk_counts(np.array(left, np.int32), np.array(right, np.int32))

    assert count([1, 2, 3], [1, 2, 3]) == (3, 3)
    assert count([1, 3, 5], [3, 4, 5]) == (2, 0)
    assert count([2, 4], [2, 3, 4]) == (2, 1)
    # equal ends are one boundary, behind the last token of the run
    assert count([2, 2, 4], [2, 4]) == (2, 1)
