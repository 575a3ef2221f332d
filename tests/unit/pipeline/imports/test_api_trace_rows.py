"""Rows of API traces against golden files, and what damaged lines are told."""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.chats import Refused
from xtoken.pipeline.imports.api_trace_choices import Answer, Exchange
from xtoken.pipeline.imports.api_trace_line import MOST_LINE, Line, line_ends, lines
from xtoken.pipeline.imports.api_trace_rows import TraceRow, chat_rows, prompt_rows, sglang_rows
from xtoken.schemas.errors import XtokenError

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "import"
CLOSE = 2e-6  # nats: golden numbers have seven significant digits
HERE = Line("a.jsonl", 6)


def golden(name: str) -> tuple[Any, list[dict[str, Any]]]:
    text = (GOLDEN / f"{name}.jsonl").read_text("utf-8").splitlines()
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8")), [json.loads(line) for line in text if line]


def rest(row: TraceRow) -> float:
    return math.log1p(-math.fsum(math.exp(value) for _, value in row.entries))


def wanted_entries(token: dict[str, Any]) -> list[tuple[bytes | int, float]]:
    if "ids" in token:
        return list(zip(token["ids"], token["logprob"], strict=True))
    return [(bytes.fromhex(data), value) for data, value in token["entries"]]


def check(row: TraceRow, token: dict[str, Any]) -> None:
    wanted = wanted_entries(token)
    assert [one for one, _ in row.entries] == [one for one, _ in wanted]
    np.testing.assert_allclose([value for _, value in row.entries], [value for _, value in wanted], atol=CLOSE)
    assert rest(row) == pytest.approx(token["rest_logprob"], abs=2e-5)  # 1 - sum loses digits
    logprob = token["realised_logprob"]
    assert math.isnan(row.logprob) if logprob is None else row.logprob == pytest.approx(logprob, abs=CLOSE)
    assert row.rank == (token["realised_rank"] or 0)


@pytest.mark.parametrize("number", range(5))
def test_chats_are_those_of_the_golden_file(number: int) -> None:
    wanted, found = golden("api_chat")
    trace = wanted["traces"][number]
    ((_, answer),) = Exchange.of(found[number], HERE).answers()
    if trace["refuse"]:
        assert isinstance(answer, Refused)
        assert (answer.reason, "128 tokens" in answer.detail) == ("hidden reasoning", True)
        return
    assert isinstance(answer, Answer)
    assert answer.complete is trace["complete"]
    end = 0
    for row, token in zip(answer.rows, trace["tokens"], strict=True):
        check(row, token)
        assert row.whole is ("fragment: row unusable" not in token.get("flags", ()))
        if isinstance(row.token, int):
            assert row.token == token["id"]
            continue
        end += len(row.token)
        assert end == token["end"]
    if end:
        assert b"".join(row.token for row in answer.rows if isinstance(row.token, bytes)) == bytes.fromhex(
            trace["text_hex"]
        )


def test_the_rows_of_hidden_reasoning_are_fine_but_for_that() -> None:
    wanted, found = golden("api_chat")
    content = found[2]["response"]["choices"][0]["logprobs"]["content"]
    for row, token in zip(chat_rows(content, HERE, "content"), wanted["traces"][2]["tokens"], strict=True):
        check(row, token)


@pytest.mark.parametrize("told", [True, False])
def test_a_scored_prompt_is_that_of_the_golden_file(told: bool) -> None:
    wanted, (found,) = golden("api_vllm_prompt")
    sample = wanted["samples"][0]
    if not told:
        del found["prompt_token_ids"]
    prompt = Exchange.of(found, HERE).prompt()
    assert prompt.headless is not told
    assert prompt.ids == sample["input_ids"][not told :]
    for row, token in zip(prompt.rows, sample["rows"], strict=True):
        check(row, token)


def test_sglang_scores_tokens_apart_from_its_lists() -> None:
    meta: dict[str, list[Any]] = {
        "input_token_logprobs": [[None, 7, "a"], [-2.5, 8, "b"], [-9999.0, 9, None]],
        "input_top_logprobs": [None, [[-0.25, 5, None], [-2.5, 8, None]], [[-0.5, 1, None]]],
    }
    tokens, rows = sglang_rows(meta, HERE)
    assert tokens == [7, 8, 9]
    assert rows[0] == TraceRow(8, -2.5, 2, ((5, -0.25), (8, -2.5)))
    assert (rows[1].token, math.isnan(rows[1].logprob), rows[1].rank) == (9, True, 0)
    with pytest.raises(XtokenError, match=r"length of meta_info.input_top_logprobs is 2, but .* has 3"):
        sglang_rows(meta | {"input_top_logprobs": meta["input_top_logprobs"][:2]}, HERE)


def one(**changes: Any) -> list[dict[str, Any]]:
    top = [{"token": "x", "logprob": -0.1, "bytes": [120]}]
    return [{"token": "x", "logprob": -0.1, "bytes": [120], "top_logprobs": top, **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one(logprob=0.5), r"content\[0\].logprob is 0.5, but a log-probability is at most 0"),
        (one(logprob=float("nan")), "is nan, but a log-probability is a finite number"),
        (one(logprob=True), "is True, but a log-probability is a finite number"),
        (one(logprob=None), "is None, but a log-probability is a finite number"),
        (one(bytes=[256]), r"content\[0\].bytes is \[256\], but bytes are whole numbers from 0 to 255"),
        (one(bytes=[1] * 2000), "the length of .*bytes is 2000, but at most 1,024 are read"),
        (one(top_logprobs=[1]), r"content\[0\].top_logprobs\[0\] is 1, but it must be an object"),
        (one(top_logprobs=one() * 5000), "the length of .*top_logprobs is 5000, but at most 4,096"),
        (one(token="token_id:4294967296"), "is 4294967296, but a token id is a whole number"),
        (one(token="\ud800"), "holds half a character"),
        ({}, "is {}, but it must be a list"),
    ],
)
def test_what_is_no_row_is_named(content: Any, message: str) -> None:
    with pytest.raises(XtokenError, match=message) as caught:
        chat_rows(content, HERE, "content")
    assert "a.jsonl, line 7: " in str(caught.value)
    assert "; write the trace again" in str(caught.value)


@pytest.mark.parametrize(
    ("found", "ids", "message"),
    [
        ([{}], None, "nothing predicts the first token: it must be null"),
        ([None, {}], None, r"the length of p\[1\] is 0"),
        ([None, {"x": {"logprob": -1, "rank": 1}}], None, r"a key of p\[1\] is 'x', but a token id"),
        ([None, {"5": {"logprob": -1, "rank": -1}}], None, "rank is -1, but it must be a whole number"),
        ([None, {"5": {"logprob": -1, "rank": 1}}], [1, 6], "it must hold the prompt's own token 6"),
        ([None, {"5": {"logprob": -1, "rank": 1}}], [1, 5, 6], "the prompt has 3 tokens"),
    ],
)
def test_what_is_no_scored_prompt_is_named(found: Any, ids: list[int] | None, message: str) -> None:
    with pytest.raises(XtokenError, match=message):
        prompt_rows(found, ids, HERE, "p")


def test_a_list_of_one_says_the_rank_only_of_the_more_probable_half() -> None:
    def rank(logprob: float) -> int:
        listed = [{"token": "x", "logprob": logprob, "bytes": [120]}]
        return chat_rows(one(logprob=logprob, top_logprobs=listed), HERE, "content")[0].rank

    assert (rank(-0.1), rank(-1.0)) == (1, 0)


def respond(request: dict[str, Any], **changes: Any) -> Answer | Refused:
    choice = {"index": 0, "message": {"content": "x"}, "logprobs": {"content": one()}, "finish_reason": "stop"}
    response = {"choices": [choice | changes.pop("choice", {})], **changes}
    ((_, found),) = Exchange.of({"request": request, "response": response}, HERE).answers()
    return found


@pytest.mark.parametrize(
    ("request_", "changes", "reason"),
    [
        ({"temperature": 0.7}, {}, "a temperature other than 1"),
        ({"temperature": 0.7}, {"system_fingerprint": "fp_44709d6fcb"}, "a temperature other than 1"),
        ({"logit_bias": {"50256": -100}}, {}, "a changed distribution"),
        ({"presence_penalty": 0.5}, {}, "a changed distribution"),
        (
            {"response_format": {"type": "json_object"}},
            {"system_fingerprint": "vllm-0.32.0-1"},
            "a changed distribution",
        ),
        ({"structured_outputs": {"choice": ["x"]}}, {"kv_transfer_params": None}, "a changed distribution"),
        ({"continue_final_message": True}, {}, "an answer that goes on"),
        ({"response_format": {"type": "text"}}, {}, None),
        ({}, {"choice": {"message": {"tool_calls": [{}]}}}, "a tool call has no rows"),
        ({}, {"choice": {"logprobs": None}}, "no log-probabilities"),
        ({}, {"choice": {"logprobs": {"tokens": ["x"], "token_logprobs": [-0.1]}}}, "no bytes"),
        ({"temperature": 1.0, "logit_bias": None}, {}, None),
        ({"temperature": 0.7, "presence_penalty": 1}, {"kv_transfer_params": None}, None),  # vLLM reports raw values
        ({"temperature": 0.7}, {"system_fingerprint": "vllm-0.32.0-1234"}, None),
    ],
)
def test_what_rows_cannot_be_trusted_for_leaves_the_answer_out(
    request_: dict[str, Any], changes: dict[str, Any], reason: str | None
) -> None:
    found = respond(request_, **changes)
    assert (found.reason if isinstance(found, Refused) else None) == reason


def test_reasoning_that_is_shown_and_has_rows_is_not_hidden() -> None:
    usage = {"completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}}
    shown = {"message": {"content": "x", "reasoning_content": "x"}, "logprobs": {"content": one() * 3}}
    assert isinstance(respond({}, usage=usage, choice=shown), Answer)
    few = {**shown, "logprobs": {"content": one()}}
    assert isinstance(respond({}, usage=usage, choice=few), Refused)


def test_batch_output_is_a_response_too() -> None:
    body = {"choices": [{"message": {"content": "x"}, "logprobs": {"content": one()}, "finish_reason": "length"}]}
    value = {"custom_id": "7", "response": {"status_code": 200, "body": body}, "error": None}
    ((_, found),) = Exchange.of(value, HERE).answers()
    assert isinstance(found, Answer)
    assert not found.complete


def test_lines_are_bounded_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n[3]\n')
    with path.open("rb") as file:
        found = lines(file, "a.jsonl", 0, None)
        assert [(line.at, line.parse(data)) for line, data in islice(found, 2)] == [(0, {"a": 1}), (2, {"a": 2})]
        line, data = next(found)
        with pytest.raises(XtokenError, match=r"a.jsonl, line 4: the line is \[3\], but it must be a JSON object"):
            line.parse(data)
    with path.open("wb") as file:
        file.truncate(MOST_LINE + 5)
    with path.open("rb") as file, pytest.raises(XtokenError, match="line 1: the length of the line is"):
        next(lines(file, "a.jsonl", 0, None))
    with path.open("rb") as file, pytest.raises(XtokenError, match="line 1: the length of the line is"):
        list(line_ends(file, "a.jsonl", 10))


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_not_json_is_named(text: str) -> None:
    with pytest.raises(XtokenError, match=r"a.jsonl, line 7 is not JSON"):
        HERE.parse(text.encode())


WORDS = [
    *("choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "bytes", "prompt_logprobs"),
    *(
        "rank",
        "token_ids",
        "usage",
        "completion_tokens_details",
        "reasoning_tokens",
        "meta_info",
        "response",
        "request",
    ),
    *("input_token_logprobs", "input_top_logprobs", "prompt_token_ids", "temperature", "tool_calls", "body", "5"),
]
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "token_id:7", "é"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=20,
)


def read(value: dict[str, Any]) -> None:
    exchange = Exchange.of(value, HERE)
    _ = exchange.messages, exchange.reports_raw
    if exchange.scored:
        rows = exchange.prompt().rows
    else:
        rows = [row for _, found in exchange.answers() if isinstance(found, Answer) for row in found.rows]
    for row in rows:
        values = [value for _, value in row.entries]
        assert values == sorted(values, reverse=True)
        assert b"" not in [token for token, _ in row.entries]


def read_or_refuse(value: dict[str, Any]) -> None:
    refusal = ""
    try:
        read(value)
    except XtokenError as error:
        refusal = str(error)
    assert not refusal or "a.jsonl, line 7" in refusal


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(WORDS), ANY, max_size=6))
def test_any_object_is_read_or_refused_by_name(value: dict[str, Any]) -> None:
    read_or_refuse(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


SMALL = [value for name in ("api_chat", "api_vllm_prompt") for value in golden(name)[1]]
PLACES = [(at, place) for at, value in enumerate(SMALL) for place in places(value)[1:]]


@settings(max_examples=400)
@given(st.sampled_from(PLACES), ANY)
def test_a_changed_value_is_read_or_refused_by_name(where: tuple[int, tuple[Any, ...]], other: Any) -> None:
    value = json.loads(json.dumps(SMALL[where[0]]))
    inner = value
    for key in where[1][:-1]:
        inner = inner[key]
    inner[where[1][-1]] = other
    read_or_refuse(value)
