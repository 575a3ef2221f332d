"""Captures of conversations: what lies in them is what the teacher gives for the whole rendering, at taught tokens."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess
from talks import TALKS

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.chats import from_json, open_chat_model, spans_of
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.spans import row_of_token
from xtoken.schemas.tables import SPAN_COLUMNS
from xtoken.schemas.ui.progress import Silent

NAMES = ["plain", "system", "blanks", "empty", "thinking", "reasoning", "hostile"]
DAY = "2026-07-04"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path, smollm2_dir: Path) -> PrecomputeConfig:
    rows = [{"id": name, "messages": TALKS[name]} for name in NAMES]
    return PrecomputeConfig.from_flat(
        corpus=write(tmp_path / "chats.jsonl", rows),
        teacher=str(smollm2_dir),
        backend="fake",
        out=str(tmp_path / "out"),
        id_field="id",
        k=16,
        date=DAY,
        shard_bytes=50,
    )


def capture(config: PrecomputeConfig) -> CaptureManifest:
    manifest = precompute(config, Silent(), executor=InProcess())
    assert manifest is not None
    return manifest


def samples(config: PrecomputeConfig) -> list[dict[str, Any]]:
    return [row for batch in iter_capture(config.out) for row in batch.to_pylist()]


def test_rows_are_those_of_a_forward_pass_of_the_whole_rendering(config: PrecomputeConfig, smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config.changed(backend="hf", audit="hf", dtype="float32", device="cpu")
    manifest = capture(config)
    assert manifest.audits[0].same_top1 == 1.0
    assert verify(config.out)["rows"] == sum(part.rows for part in manifest.parts)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    codec, seen = open_codec(manifest.codec), 0
    for batch in iter_capture(config.out):
        rows, row_T = codec.decode(batch), row_of_token(batch)
        start = 0
        for sample in batch.to_pylist():
            ids = sample["teacher_ids"]
            talk = [dict(message) for message in TALKS[sample["sample_id"].removesuffix("#0")]]
            if sample["sample_id"] in ("plain#0", "system#0"):  # the others have tokens across contents' ends
                whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
                assert ids == whole
            with torch.no_grad():
                logprob_TU = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
            for at, row in enumerate(row_T[start : start + len(ids)]):
                if row < 0:
                    continue
                seen += 1
                entries = slice(rows.offsets[row], rows.offsets[row + 1])
                wanted_U = logprob_TU[at - 1]
                assert rows.ids[entries.start] == wanted_U.argmax()
                np.testing.assert_allclose(rows.logprob[entries], wanted_U[rows.ids[entries]], atol=1 / 64 + 1e-3)
                first = row_T[start : start + len(ids)].max() + 1 - len(sample["realised_logprob"])
                assert sample["realised_logprob"][row - first] == pytest.approx(wanted_U[ids[at]], abs=1e-3)
            start += len(ids)
    assert seen == sum(part.rows for part in manifest.parts) > 80


def test_what_is_taught_is_the_answers_and_the_tokens_that_end_them(config: PrecomputeConfig) -> None:
    manifest = capture(config)
    assert manifest.schema_version == 6
    assert manifest.chat is not None
    assert (manifest.chat.form, manifest.chat.date, manifest.chat.stop_token) == ("messages", DAY, 2)
    assert not manifest.bos
    model = open_chat_model(config.teacher.teacher, date=datetime.fromisoformat(DAY))
    for sample in samples(config):
        name = sample["sample_id"].removesuffix("#0")
        spans = spans_of({name: sample[name] for name in SPAN_COLUMNS})
        taught = {
            span.message: sample["text"].encode()[span.byte_start : span.byte_end] for span in spans if span.learn
        }
        del taught
        conversation = from_json(sample["messages"])
        tokens = model.encode(conversation)
        assert sample["teacher_ids"] == tokens.ids.tolist()
        assert sample["teacher_end"] == tokens.ends.tolist()
        assert spans == tokens.spans
        assert len(sample["realised_logprob"]) == tokens.learn.sum()
        answers = [one["content"] for one in TALKS[name] if one["role"] == "assistant"]
        assert [message.content for message in conversation.messages if message.role == "assistant"] == answers


def test_two_runs_write_the_same_bytes_and_a_rerun_does_nothing(config: PrecomputeConfig, tmp_path: Path) -> None:
    first, other = capture(config), capture(config.changed(out=str(tmp_path / "other")))
    assert first.parts == other.parts
    assert (first.run_hash, first.plan_hash, first.files) == (other.run_hash, other.plan_hash, other.files)
    assert len(first.parts) > 2
    assert capture(config) == first


def test_without_text_there_are_no_messages(config: PrecomputeConfig) -> None:
    capture(config.changed(text=False))
    assert verify(config.out)
    assert {(row["text"], row["messages"]) for row in samples(config)} == {(None, None)}


def test_a_teacher_without_a_template_is_refused_before_anything_is_read(
    config: PrecomputeConfig, gemma3_dir: Path
) -> None:
    with pytest.raises(XtokenError, match="has no chat template"):
        capture(config.changed(teacher=str(gemma3_dir)))
    assert not Path(config.out).exists()
