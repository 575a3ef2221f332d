"""Rows of chat data in every form: what they become, what is refused and why, and the stored form and back."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.chats import (
    Call,
    Conversation,
    Form,
    Message,
    Refused,
    form_of,
    from_json,
    read_row,
    require_taught,
    to_json,
)
from xtoken.schemas.errors import XtokenError

ASK, TOLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"y": 1, "x": "é"}}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
}


def read(*messages: Any, **columns: Any) -> Conversation:
    return read_row({"messages": list(messages), **columns}, "messages")


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["id", "messages", "tools"], "messages"),
        (["conversations"], "sharegpt"),
        (["prompt", "completion"], "prompt"),
        (["instruction", "input", "output"], "alpaca"),
        (["prompt", "completion", "messages"], "messages"),
        (["prompt"], None),
        (["text"], None),
    ],
)
def test_the_form_is_found_from_the_columns(columns: list[str], form: str | None) -> None:
    assert form_of(columns) == form


def test_messages() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"z": 1, "a": 2}}}
    found = read(
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "train": False},
        ASK,
        CALLS,
        {"role": "tool", "content": "2", "tool_call_id": "b", "name": "now"},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "assistant", "content": "", "weight": 1},
        tools=[tool],
    )
    assert found == Conversation(
        (
            Message("system", "Be short."),
            Message("user", "ab"),
            Message("assistant", "c", reasoning="hm", train=False),
            Message("user", "Hi"),
            Message("assistant", "", calls=(Call("add", '{"y":1,"x":"é"}', "a"), Call("now", "{}", "b"))),
            Message("tool", "2", call_id="b", name="now"),
            Message("tool", "1", call_id="a"),
            Message("assistant", ""),
        ),
        (json.dumps(tool, separators=(",", ":")),),
    )
    assert found.taught == (4, 7)
    assert found.messages[4].calls[0].parsed == {"y": 1, "x": "é"}


def test_columns_that_a_table_fills_with_null_are_not_there() -> None:
    empty = {"tool_calls": None, "tool_call_id": None, "reasoning_content": None, "train": None, "weight": None}
    assert read(ASK | empty, TOLD | empty, tools=None) == read(ASK, TOLD)


def test_text_is_nfc() -> None:
    assert read({"role": "user", "content": "e\u0301"}, TOLD).messages[0].content == "é"


@pytest.mark.parametrize("blank", ["\n", "\t", "\r\n", "\x1c", "\n\u0316", "\\n"])
def test_an_accent_behind_a_line_end_stays_one_in_what_is_stored(blank: str) -> None:
    """A corpus brings its texts to NFC, JSON of a conversation, too: no accent may join the letter of an escape."""
    text = f"a{blank}\u0301 漢"
    calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": text}}}]
    conversation = read(
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "tool_calls": calls},
        tools=[{"n": text}],
    )
    stored = to_json(conversation)
    assert unicodedata.normalize("NFC", stored) == stored
    assert from_json(stored) == conversation
    assert conversation.messages[1].calls[0].parsed == {"a": unicodedata.normalize("NFC", text)}
    assert "漢" in stored


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Hello", "weight": 0},
    ]
    assert read_row({"conversations": turns, "system": "Be short."}, "sharegpt").messages == (
        Message("system", "Be short."),
        Message("user", "Hi"),
        Message("assistant", "", calls=(Call("add", '{"x":1}'),)),
        Message("tool", "2"),
        Message("assistant", "Hello", train=False),
    )
    assert read_row({"conversations": [ASK, TOLD]}, "sharegpt") == read(ASK, TOLD)


def test_prompt_and_completion() -> None:
    assert read_row({"prompt": "Hi", "completion": "Hello"}, "prompt") == read(ASK, TOLD)
    found = read_row({"prompt": [ASK, TOLD, ASK], "completion": [TOLD]}, "prompt")
    assert found == read(ASK, TOLD | {"train": False}, ASK, TOLD)
    assert read_row({"prompt": "Hi"}, "prompt") == read(ASK)


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be short."}
    assert read_row(row, "alpaca").messages == (
        Message("system", "Be short."),
        Message("user", "Add.\n\n1 and 2"),
        Message("assistant", "3"),
    )
    assert read_row(row | {"input": ""}, "alpaca").messages[1] == Message("user", "Add.")


TOOL = {"role": "tool", "content": "2"}
REFUSALS: list[tuple[Form, dict[str, Any], str, str]] = [
    ("messages", {"messages": []}, "empty conversation", "no messages"),
    ("messages", {"text": "a"}, "missing field", "no 'messages'; it has text"),
    ("messages", {"messages": None}, "missing field", "its 'messages' is null"),
    ("messages", {"messages": "a"}, "bad field", "messages is 'a', but it must be a list"),
    ("messages", {"messages": ["a"]}, "bad field", "message 0 of messages is 'a'"),
    ("messages", {"messages": [{"role": "narrator", "content": "a"}]}, "unknown role", "'narrator'; known are system"),
    ("messages", {"messages": [{"content": "a"}]}, "unknown role", "is None"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "bad field", "content of message 0"),
    ("messages", {"messages": [{"role": "assistant", "content": None}]}, "bad field", "content of message 0"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "bad field", "is 3"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "content that is not text",
        "'image_url'",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "content that is not text",
        "audio",
    ),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate", "\\ud800"),
    ("messages", {"messages": [ASK, TOLD | {"train": "no"}]}, "bad field", "train of message 1"),
    ("messages", {"messages": [ASK, TOLD | {"weight": 0.5}]}, "bad field", "must be 0 or 1"),
    ("messages", {"messages": [ASK | {"weight": 1}, TOLD]}, "bad field", "only an assistant's message is taught"),
    ("messages", {"messages": [ASK, TOOL]}, "tool result without a call", "message 1"),
    ("messages", {"messages": [ASK, CALLS, TOOL | {"tool_call_id": "c"}]}, "tool result without a call", "'c'"),
    ("messages", {"messages": [ASK, CALLS, TOOL, TOOL, TOOL]}, "tool result without a call", "message 4"),
    ("messages", {"messages": [ASK, TOLD | {"tool_calls": [{"id": "a"}]}]}, "bad field", "a tool call of message 1"),
    ("messages", {"messages": [ASK, TOLD | {"tool_calls": "no"}]}, "bad field", "must be a list"),
    (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}]},
        "reasoning twice",
        "message 1",
    ),
    ("messages", {"messages": [ASK, TOLD], "tools": {"name": "a"}}, "bad field", "tools is"),
    ("messages", {"messages": [ASK, TOLD], "tools": ["a"]}, "bad field", "a tool is 'a'"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "bad field", "content of message 0 of conversations"),
    ("sharegpt", {"conversations": [{"from": "elf", "value": "a"}]}, "unknown role", "'elf'"),
    ("prompt", {"prompt": 3, "completion": "a"}, "bad field", "prompt is 3"),
    ("alpaca", {"instruction": "a", "output": None}, "missing field", "'output'"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history of an instruction", "'c'"),
]


@pytest.mark.parametrize(("form", "row", "reason", "detail"), REFUSALS)
def test_what_is_refused_is_named(form: Form, row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(Refused) as caught:
        read_row(row, form)
    refused = caught.value
    assert refused.reason == reason
    assert detail in refused.detail
    assert refused.fix
    assert str(refused) == f"{reason}: {refused.detail}; {refused.fix}"


def test_an_unknown_form_is_no_fault_of_a_row() -> None:
    with pytest.raises(XtokenError, match="no form 'chatml' of chat data; the forms are messages, sharegpt") as caught:
        read_row({}, "chatml")  # type: ignore[arg-type]
    assert not isinstance(caught.value, Refused)


def test_a_conversation_that_teaches_nothing_is_refused() -> None:
    for messages, why in (([ASK], "roles are user"), ([ASK, TOLD | {"train": False}], "switched off")):
        with pytest.raises(Refused, match=f"nothing is taught: .*{why}"):
            require_taught(read(*messages))


words = st.text(max_size=6)
values = st.none() | st.integers() | words | st.lists(words, max_size=2)
turns = st.tuples(words, words, st.none() | words, st.booleans(), st.dictionaries(words, values, max_size=2))


@settings(max_examples=25)
@given(st.lists(turns, max_size=2), words)
def test_the_stored_form_reads_back(turns: list[Any], tool: str) -> None:
    messages: list[dict[str, Any]] = []
    for asked, said, reasoning, train, arguments in turns:
        calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"-{said}", "reasoning_content": reasoning, "train": train},
            {"role": "assistant", "content": said if reasoning is None else None, "tool_calls": calls},
            {"role": "tool", "content": said, "tool_call_id": "x"},
        ]
    conversation = read(ASK, *messages, tools=[{"name": tool}])
    stored = to_json(conversation)
    assert from_json(stored) == conversation
    assert to_json(from_json(stored)) == stored


def test_the_stored_form_is_this_one() -> None:
    assert to_json(
        read(ASK, CALLS, TOOL | {"tool_call_id": "a"}, TOLD | {"train": False}, tools=[{"name": "add"}])
    ) == (
        '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"","tool_calls":[{"id":"a",'
        '"type":"function","function":{"name":"add","arguments":"{\\"y\\":1,\\"x\\":\\"é\\"}"}},{"id":"b","type":'
        '"function","function":{"name":"now","arguments":"{}"}}]},{"role":"tool","content":"2","tool_call_id":"a"},'
        '{"role":"assistant","content":"Hello","train":false}],"tools":[{"name":"add"}]}'
    )
    with pytest.raises(Refused, match="'no' is not a JSON object"):
        from_json("no")
