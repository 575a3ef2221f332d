"""Answers that the teacher writes: exactly one for each prompt and number, kept as they were written and scored so."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.chats import Conversation, Message, Refused, from_json, open_chat_model, spans_of, with_answer
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.figures import capture_figures
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.teachers.hf_answers import draw
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.spans import row_of_token
from xtoken.schemas.tables import SPAN_COLUMNS
from xtoken.schemas.ui.progress import Silent

DAY = "2026-07-04"
ASKED = ["Hi there", "What is 2 + 2?", "日本語でどうぞ", "Name a colour."]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path, smollm2_dir: Path) -> PrecomputeConfig:
    return PrecomputeConfig.from_flat(
        corpus=write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ASKED]),
        teacher=str(smollm2_dir),
        backend="fake",
        out=str(tmp_path / "out"),
        k=16,
        date=DAY,
        generate=6,
        samples=3,
        shard_bytes=160,
    )


def capture(config: PrecomputeConfig) -> CaptureManifest:
    manifest = precompute(config, Silent(), executor=InProcess())
    assert manifest is not None
    return manifest


def samples(config: PrecomputeConfig) -> list[dict[str, Any]]:
    return [row for batch in iter_capture(config.out) for row in batch.to_pylist()]


def test_every_prompt_has_its_answers_once(config: PrecomputeConfig) -> None:
    manifest = capture(config)
    verify(config.out)
    rows = samples(config)
    assert [row["sample_id"] for row in rows] == [
        f"prompts.jsonl:{at}#1.{number}" for at in range(len(ASKED)) for number in range(3)
    ]
    assert len(manifest.parts) == 2, "a prompt counts for its answers when shards are planned"
    assert manifest.chat is not None
    assert manifest.chat.answering is not None
    assert manifest.chat.answering.model_dump() == {
        "tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "samples": 3,
        "seed": 0,
    }
    for row in rows:
        conversation = from_json(row["messages"])
        asked, answer = conversation.messages
        assert row["text"] == asked.content + answer.content
        assert row["complete"] == (row["span_kind"][-1] == "stop")
        assert [kind for kind, one in zip(row["span_kind"], row["span_learn"], strict=True) if one][:1] != ["user"]
    complete = Counter(row["complete"] for row in rows)
    assert capture_figures(manifest)["answers_cut"] == complete[False] > 0
    assert len({row["text"] for row in rows}) > len(ASKED), "samples of one prompt differ"


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(config: PrecomputeConfig, tmp_path: Path) -> None:
    first = capture(config)
    again = capture(config.changed(out=str(tmp_path / "again")))
    other = capture(config.changed(out=str(tmp_path / "other"), seed=1))
    assert first.parts == again.parts
    assert first.run_hash == again.run_hash != other.run_hash
    assert first.parts[0].sha256 != other.parts[0].sha256
    for changes in ({"seed": 1}, {"generate": 7}, {"temperature": 0.5}, {"samples": 2}, {"top_p": 0.9}):
        with pytest.raises(XtokenError, match=f"holds another run .*{next(iter(changes))}"):
            capture(config.changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": None}, r"--samples 3 is for answers that the teacher writes"),
        ({"turns": "last"}, r"--turns last means nothing to --generate"),
        ({"generate": 512}, r"--generate 512 leaves no room for a prompt within --max-tokens 512"),
        ({"generate": None, "samples": 1, "seed": 3}, r"--seed 3 means nothing to --codec topk"),
    ],
)
def test_settings_that_contradict_each_other(config: PrecomputeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.changed(**changes)


def test_a_dry_run_says_that_it_does_not_know(config: PrecomputeConfig) -> None:
    said = r"\(a prompt takes at most 3 x --generate 6 tokens\); run the same command with --limit 50 and another --out"
    with pytest.raises(XtokenError, match=said):
        dry_run(config.changed(dry_run=True), Silent())


def test_what_cannot_be_asked_is_named(config: PrecomputeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}, {"prompt": "word " * 500}]
    config = config.changed(corpus=write(tmp_path / "more.jsonl", rows), form="prompt")
    with pytest.raises(XtokenError, match=r"its last message is 'assistant', and --generate answers a user or a tool"):
        capture(config)
    manifest = capture(config.changed(on_bad="skip", out=str(tmp_path / "skip")))
    lines = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["it does not end with a question", "longer than --max-tokens"]
    assert sum(part.samples for part in manifest.parts) == 3


def test_greedy_answers_are_those_of_transformers_and_rows_of_a_forward_pass(
    config: PrecomputeConfig, smollm2_dir: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config.changed(
        backend="hf", dtype="float32", device="cpu", temperature=0.0, samples=1, generate=12, audit="hf"
    )
    manifest = capture(config)
    assert manifest.audits[0].same_top1 == 1.0
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    codec = open_codec(manifest.codec)
    for batch in iter_capture(config.out):
        rows, row_T = codec.decode(batch), row_of_token(batch)
        start = 0
        for text, sample in zip(
            ASKED[len(ASKED) - batch.num_rows :] if start else ASKED, batch.to_pylist(), strict=False
        ):
            text = from_json(sample["messages"]).messages[0].content
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            wanted = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, attention_mask=torch.ones(1, len(prompt))
            )[0].tolist()
            ids = sample["teacher_ids"]
            assert ids == wanted
            with torch.no_grad():
                logprob_TU = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
            here = row_T[start : start + len(ids)]
            assert (here >= 0).tolist() == [at >= len(prompt) for at in range(len(ids))]
            for at, row in enumerate(here):
                if row >= 0:
                    entries = slice(rows.offsets[row], rows.offsets[row + 1])
                    assert rows.ids[entries.start] == ids[at], "the most probable token was taken"
                    wanted_K = logprob_TU[at - 1][rows.ids[entries]]
                    np.testing.assert_allclose(rows.logprob[entries], wanted_K, atol=1 / 64 + 1e-3)
            start += len(ids)


def test_drawing_follows_the_distribution() -> None:
    logits_U = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    grid = (np.arange(1000) + 0.5) / 1000

    def shares(temperature: float, top_p: float) -> list[float]:
        counts = Counter(draw(logits_U, temperature, top_p, uniform) for uniform in grid)
        return [counts[token] / len(grid) for token in range(4)]

    assert shares(1.0, 1.0) == pytest.approx([0.1, 0.5, 0.15, 0.25])
    assert shares(1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2e-3)
    assert shares(1.0, 0.1) == [0, 1, 0, 0]
    assert shares(0.5, 1.0) == pytest.approx(np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345, abs=2e-3)
    assert {draw(logits_U, 0.0, 1.0, uniform) for uniform in grid} == {1}


@pytest.fixture(scope="module")
def qwen3(tokenizer_file: Any) -> Any:
    from datetime import datetime

    return open_chat_model(str(tokenizer_file("qwen3").parent), date=datetime.fromisoformat(DAY))


def written(model: Any, text: str, *, cut: int = 0, learn: Any = ("assistant", "call", "stop", "thinking")) -> Any:
    """The spans of an answer that a model wrote as this text, with its added tokens as such."""
    asked = Conversation((Message("user", "Hi"),))
    ids = model.tokenizer.template_ids(text, "marker")
    answer = np.array(ids[: len(ids) - cut], np.int32)
    conversation, tokens = with_answer(model, asked, model.encode_prompt(asked), answer, learn)
    assert tokens.ids.tolist()[-len(answer) :] == answer.tolist() or cut
    own = [span for span in tokens.spans if span.message == 1]
    data = tokens.text.encode()
    return conversation.messages[1], [
        (span.kind, data[span.byte_start : span.byte_end].decode(), span.learn) for span in own
    ]


def test_control_tokens_split_an_answer(qwen3: Any) -> None:
    message, spans = written(qwen3, "<think>\nhm\n</think>\n\nHello.<|im_end|>")
    assert (message.reasoning, message.content) == ("hm", "Hello.")
    assert spans == [
        ("marker", "", True),
        ("thinking", "hm", True),
        ("marker", "", True),
        ("assistant", "Hello.", True),
        ("stop", "", True),
    ]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    message, spans = written(qwen3, f"Wait.{call}\n{call}<|im_end|>", learn=("assistant", "call", "stop"))
    assert [one.name for one in message.calls] == ["weather", "weather"]
    assert message.calls[0].arguments == '{"city":"Zürich"}'
    assert spans == [("assistant", "Wait.", True), ("call", call, True), ("call", call, True), ("stop", "", True)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Hello <|im_start|> you<|im_end|>", "control token in an answer"),
        ("<tool_call>nothing</tool_call><|im_end|>", "a tool call that is none"),
        ("<tool_call>{}", "control token in an answer"),
        ("Hi<think>no</think><|im_end|>", "control token in an answer"),
        ('<tool_call>{"name": "a"}</tool_call> and so on<|im_end|>', "text behind a tool call"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(qwen3: Any, text: str, reason: str) -> None:
    with pytest.raises(Refused) as error:
        written(qwen3, text)
    assert error.value.reason == reason


def test_a_character_that_was_cut_is_dropped_and_others_refuse(qwen3: Any) -> None:
    table = qwen3.tokenizer.table
    whole = qwen3.tokenizer.template_ids("so 🦣🦣", "marker")
    pieces = [table.token(token) for token in whole]
    assert any(not _is_text(piece) for piece in pieces), "a character of several tokens"
    asked = Conversation((Message("user", "Hi"),))
    prompt = qwen3.encode_prompt(asked)
    for count in range(1, len(whole) + 1):
        answer = np.array(whole[:count], np.int32)
        _, tokens = with_answer(qwen3, asked, prompt, answer, ("assistant", "stop"))
        whole_ones = [n for n in range(count + 1) if _is_text(b"".join(pieces[:n]))]
        assert len(tokens.ids) - len(prompt) == whole_ones[-1]
    middle = [token for token, piece in zip(whole, pieces, strict=True) if not _is_text(piece)][:1]
    (stop,) = sorted(qwen3.stops)[:1]
    for ids in ([*middle, whole[0], stop], [*middle, stop]):
        with pytest.raises(Refused) as error:
            with_answer(qwen3, asked, prompt, np.array(ids, np.int32), ("assistant", "stop"))
        assert error.value.reason == "an answer that is not UTF-8"


def _is_text(data: bytes) -> bool:
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


def test_spans_of_an_answer_lie_in_the_capture(config: PrecomputeConfig) -> None:
    capture(config)
    for row in samples(config):
        spans = spans_of({name: row[name] for name in SPAN_COLUMNS})
        learned = [span for span in spans if span.learn]
        assert learned[-1].token_end == len(row["teacher_ids"])
        assert len(row["realised_logprob"]) == sum(span.token_end - span.token_start for span in learned)
