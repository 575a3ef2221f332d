"""Conversations as spans and tokens of real models' templates, and of small ones worked out by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from talks import TAGGED, TALKS

from xtoken.pipeline.chats import (
    ChatModel,
    ChatTemplate,
    ChatTokens,
    Conversation,
    Refused,
    Span,
    open_chat_model,
    read_row,
    span_columns,
    spans_of,
)
from xtoken.pipeline.chats.slots import Kind, slots_of
from xtoken.pipeline.tokens import load_chat_tokenizer

from .conftest import DAY, Model, each

LEARN: tuple[Kind, ...] = ("assistant", "thinking", "call", "stop")
NAMES = [*TALKS]


def talk(name: str, *, tools: bool = False) -> Conversation:
    schema = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    return read_row({"messages": TALKS[name], "tools": [schema] if tools else None}, "messages")


def small(source: str) -> ChatModel:
    """Bytes with a template: ids are bytes, and nothing is a marker."""
    return ChatModel(ChatTemplate({"default": source}), load_chat_tokenizer("bytes"))


def seen(tokens: ChatTokens, model: ChatModel) -> list[tuple[str, int, int, str]]:
    """Kind, message, part and spelling of every span."""
    spelt = {
        **dict(enumerate(model.tokenizer.table.pieces())),
        **{t: n.encode() for t, n in model.tokenizer.added.items()},
    }
    return [
        (
            *span.key,
            b"".join(spelt[token] for token in tokens.ids[span.token_start : span.token_end].tolist()).decode(),
        )
        for span in tokens.spans
    ]


PLAIN = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}$"


def test_a_small_one_by_hand() -> None:
    tokens = small(PLAIN).encode(talk("system"))
    assert tokens.text == "Be short.Hi thereHello."
    assert bytes(tokens.ids.tolist()).decode() == "<s>Be short.<u>Hi there<a>Hello.$"
    assert tokens.spans == (
        Span("template", -1, 0, 0, 0, 0, 3, False),
        Span("system", 0, 0, 0, 9, 3, 12, False),
        Span("template", -1, 0, 9, 9, 12, 15, False),
        Span("user", 1, 0, 9, 17, 15, 23, False),
        Span("template", -1, 0, 17, 17, 23, 26, False),
        Span("assistant", 2, 0, 17, 23, 26, 32, True),
        Span("template", -1, 0, 23, 23, 32, 33, False),
    )
    assert tokens.ends.tolist() == [0, 0, 0, *range(1, 10), 9, 9, 9, *range(10, 18), 17, 17, 17, *range(18, 24), 23]
    assert np.flatnonzero(tokens.learn).tolist() == [26, 27, 28, 29, 30, 31]
    assert tokens.message_ends == [(3, 32)]
    assert not tokens.differs


def test_spans_are_stored_as_columns_and_read_back() -> None:
    tokens = small(PLAIN).encode(talk("system"))
    columns = span_columns(tokens.spans)
    assert columns["span_kind"][:2] == ["template", "system"]
    assert columns["span_token_end"] == [3, 12, 15, 23, 26, 32, 33]
    assert spans_of(columns) == tokens.spans
    assert spans_of(span_columns([])) == ()


# What of each kind of conversation a family's template leaves out or trims, or why it refuses it.
LEFT_OUT: dict[str, dict[str, str]] = {
    "smollm2": {"reasoning": "thinking 1 3", "calls": "call 1 1", "call": "call 1"},
    "qwen3": {"blanks": "~assistant 1", "thinking": "thinking 1", "reasoning": "thinking 1"},
    "phi3-mini": {"reasoning": "thinking 1 3", "calls": "result 2 3 call 1 1", "call": "result 2 call 1"},
    "phi3-medium": {
        "system": "system 0",
        "reasoning": "thinking 1 3",
        "calls": "result 2 3 call 1 1",
        "call": "result 2 call 1",
    },
    "chatglm3": {
        "reasoning": "thinking 1 3",
        "calls": "call 1 1",
        "call": "call 1",
        "empty": "nothing is taught: its answers are empty",
    },
    "llama3": {"blanks": "~user 0 ~assistant 1", "reasoning": "thinking 1 3", "calls": "call 1 1", "call": "call 1"},
    "gemma3": {
        "blanks": "~user 0 ~assistant 1",
        "reasoning": "thinking 1 3",
        "calls": "the chat template refuses it: the template says: Conversation roles must alternate",
        "call": "the chat template refuses it: the template says: Conversation roles must alternate",
    },
    "deepseek_v3": {"reasoning": "thinking 1 3", "call": "call 1"},
}
LEFT_OUT["llama3_1"] = LEFT_OUT["llama3"]


def left_out(tokens: ChatTokens) -> str:
    words: dict[str, list[int]] = {}
    for mark, keys in (("", tokens.absent), ("~", tokens.trimmed)):
        for kind, message, _ in keys:
            words.setdefault(mark + kind, []).append(message)
    return " ".join(f"{kind} {' '.join(map(str, messages))}" for kind, messages in words.items())


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", each())
def test_what_a_family_leaves_out(model: Model, name: str, kind: str) -> None:
    expected = LEFT_OUT[name].get(kind, "")
    if ":" in expected:
        with pytest.raises(Refused, match=expected):
            model(name).encode(talk(kind), LEARN)
    else:
        assert left_out(model(name).encode(talk(kind), LEARN)) == expected


def check(chat: ChatModel, conversation: Conversation, learn: tuple[Kind, ...] = LEARN) -> ChatTokens:
    """What holds of every conversation of every model."""
    tokens = chat.encode(conversation, learn)
    text, table = tokens.text.encode(), chat.tokenizer.table
    assert spans_of(span_columns(tokens.spans)) == tokens.spans
    assert (tokens.spans[-1].byte_end, tokens.spans[-1].token_end) == (len(text), len(tokens))
    assert (np.diff(tokens.ends, prepend=0) >= 0).all()
    contents = {slot.key: slot.text for slot in slots_of(conversation)}
    for span in tokens.spans:
        part = slice(span.token_start, span.token_end)
        assert (tokens.learn[part] == span.learn).all()
        assert span.kind in get_args(Kind)
        written = text[span.byte_start : span.byte_end].decode()
        if span.kind in ("template", "marker", "stop"):
            assert written == ""
            assert (tokens.ends[part] == span.byte_end).all()
        elif span.token_start < span.token_end:
            assert tokens.ends[part][-1] == span.byte_end
            assert (tokens.ends[part] > span.byte_start).all()
        if span.key in contents:
            # contents are the messages', whole or trimmed, and none of their tokens is a marker
            whole = contents[span.key]
            assert written in (
                whole,
                whole.strip(),
                whole.lstrip(),
                whole.rstrip(),
                whole.strip("\n"),
                whole.lstrip("\n"),
            )
            assert not [token for token in tokens.ids[part].tolist() if table.role[token] not in (None, "unk")]
        if span.kind == "stop":
            assert [int(token) in chat.stops for token in tokens.ids[part]] == [True]
        if span.kind == "call":
            assert conversation.messages[span.message].calls[span.part].name in written
        if span.learn:
            assert conversation.messages[span.message].taught
    return tokens


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", each())
def test_what_holds_of_all(model: Model, name: str, kind: str) -> None:
    if ":" not in LEFT_OUT[name].get(kind, ""):
        for tools in (False, True):
            check(model(name), talk(kind, tools=tools))


@pytest.mark.parametrize("name", each())
def test_no_template_token_is_taught_by_default(model: Model, name: str) -> None:
    tokens = check(model(name), talk("thinking"), ("assistant", "call", "stop"))
    taught = {span.kind for span in tokens.spans if span.learn}
    assert taught == ({"assistant"} if name == "chatglm3" else {"assistant", "stop"})


@pytest.mark.parametrize("name", each())
def test_who_writes_a_marker_writes_text(model: Model, name: str) -> None:
    """Every added token of the model, in the question and in the answer."""
    chat = model(name)
    marks = [mark for mark in chat.tokenizer.added.values() if "think" not in mark and not mark.isspace()]
    hostile = "x".join([mark for mark in marks if mark in chat.markers] + marks[:40])
    messages = [{"role": "user", "content": f"a{hostile}b"}, {"role": "assistant", "content": f"c{hostile}d"}]
    tokens = check(chat, read_row({"messages": messages}, "messages"))
    inside = [tokens.ids[s.token_start : s.token_end] for s in tokens.spans if s.kind in ("user", "assistant")]
    assert len(inside) == 2
    assert not set(np.concatenate(inside).tolist()) & {
        t for t, mark in chat.tokenizer.added.items() if mark in chat.markers
    }


def test_reasoning_is_taught_with_its_marks_and_an_empty_block_is_the_templates(model: Model) -> None:
    chat = model("qwen3")
    found = seen(chat.encode(talk("thinking"), LEARN), chat)
    assert found[7:] == [
        ("template", -1, 0, "<|im_end|>\n<|im_start|>assistant\n"),
        ("marker", 3, 0, "<think>\n"),
        ("thinking", 3, 0, "so"),
        ("marker", 3, 1, "\n</think>\n\n"),
        ("assistant", 3, 0, "See you."),
        ("stop", 3, 0, "<|im_end|>"),
        ("template", -1, 0, "\n"),
    ]
    assert seen(chat.encode(talk("system"), LEARN), chat)[4:] == [
        ("template", -1, 0, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("assistant", 2, 0, "Hello."),
        ("stop", 2, 0, "<|im_end|>"),
        ("template", -1, 0, "\n"),
    ]


def test_a_mark_that_the_prompt_writes_is_not_taught() -> None:
    source = (
        "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}{% endfor %}{{ 'a:<think>\n' if add_generation_prompt }}"
    )
    chat = small(source)
    kinds = [(kind, part, text) for kind, _, part, text in seen(chat.encode(talk("reasoning"), LEARN), chat)]
    assert kinds[2:6] == [
        ("template", 0, "a:<think>\n"),
        ("thinking", 0, "hm"),
        ("marker", 1, "</think>"),
        ("assistant", 0, "Hello."),
    ]


CALL = '<tool_call>\n{"name": "%s", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'


def test_calls_run_from_marker_to_marker(model: Model) -> None:
    chat = model("qwen3")
    tokens = check(chat, talk("calls", tools=True))
    found = seen(tokens, chat)
    at = next(at for at, span in enumerate(found) if span[0] == "call")
    assert found[at - 1 : at + 5] == [
        ("template", -1, 0, "<|im_end|>\n<|im_start|>assistant\n"),
        ("call", 1, 0, CALL % "weather"),
        ("template", -1, 0, "\n"),
        ("call", 1, 1, CALL % "news"),
        ("stop", 1, 0, "<|im_end|>"),
        ("template", -1, 0, "\n<|im_start|>user\n<tool_response>\n"),
    ]
    call = tokens.spans[at]
    widths = np.diff(tokens.ends[call.token_start : call.token_end], prepend=call.byte_start)
    assert widths[:2].tolist() == [len("<tool_call>"), 1]
    # the marker is one token, as the model writes it
    assert chat.tokenizer.added[int(tokens.ids[call.token_start])] == "<tool_call>"


@pytest.mark.thorough
def test_calls_of_deepseek_are_found_beside_no_content(model: Model) -> None:
    chat = model("deepseek_v3")
    found = [span for span in seen(check(chat, talk("calls")), chat) if span[0] in ("call", "stop")]
    assert [(kind, message, part) for kind, message, part, _ in found] == [
        ("call", 1, 0),
        ("call", 1, 1),
        ("stop", 1, 0),
        ("stop", 4, 0),
    ]
    assert found[0][3].startswith("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n")
    assert found[1][3].endswith("```<｜tool▁call▁end｜><｜tool▁calls▁end｜>")


def test_an_answer_whose_call_is_left_out_does_not_end_where_it_seems_to(model: Model) -> None:
    tokens = model("smollm2").encode(talk("call"))
    assert [(span.message, span.learn) for span in tokens.spans if span.kind == "stop"] == [(1, False), (3, True)]


def test_messages_that_are_switched_off_are_not_taught(model: Model) -> None:
    conversation = talk("plain").only([3])
    tokens = check(model("smollm2"), conversation)
    assert {span.message for span in tokens.spans if span.learn} == {3}
    assert tokens.message_ends == [(4, len(tokens) - 1)]


@pytest.mark.parametrize("name", each())
def test_tokens_are_those_of_the_whole_rendering(model: Model, name: str) -> None:
    """Or the difference is said; ChatGLM's template ends with a blank, which goes with the word behind it."""
    chat = model(name)
    apart = {"chatglm3": {"plain", "system", "thinking", "calls"}, "smollm2": {"thinking"}}  # which joins ">\n\n"
    for kind in ("plain", "system", "thinking", "calls"):
        if ":" in LEFT_OUT[name].get(kind, ""):
            continue
        tokens = chat.encode(talk(kind), LEARN)
        whole = chat.tokenizer.template_ids(chat.template.render(talk(kind)), "start")
        assert tokens.differs == (tokens.ids.tolist() != whole) == (kind in apart.get(name, ()))
        bos = [at for at, token in enumerate(tokens.ids.tolist()) if token == chat.tokenizer.table.info.bos_id]
        if name != "smollm2":  # whose BOS opens every message
            assert bos in ([], [0])


def transformers_tokenizer(folder: Path, template: str | None = None) -> Any:
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {
        key: value for key, value in config.items() if key in ("bos_token", "eos_token") and isinstance(value, str)
    }
    found = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)
    found.chat_template = template or config["chat_template"]
    return found


@pytest.mark.parametrize("name", ["smollm2", pytest.param("qwen3", marks=pytest.mark.thorough)])
def test_transformers_renders_and_tokenizes_the_same(
    model: Model, tokenizer_file: Callable[[str], Path], name: str
) -> None:
    theirs = transformers_tokenizer(tokenizer_file(name).parent)
    for kind in ("plain", "system", "blanks", "hostile", "calls"):
        messages = [{"content": "", **{k: v for k, v in one.items() if v is not None}} for one in TALKS[kind]]
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert model(name).template.render(talk(kind)) == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert model(name).tokenizer.template_ids(text, "start") == ids


@pytest.fixture(scope="module")
def tagged(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatModel, Any]:
    """SmolLM2's tokenizer with a template that has generation tags: ours, and transformers'."""
    folder = tokenizer_file("smollm2").parent
    given = tmp_path_factory.mktemp("tagged") / "tagged.jinja"
    given.write_text(TAGGED)
    return open_chat_model(str(folder), template=str(given), date=DAY), transformers_tokenizer(folder, TAGGED)


@pytest.mark.parametrize("kind", ["plain", "system", "thinking", "reasoning"])
def test_what_is_taught_is_what_transformers_masks(kind: str, tagged: tuple[ChatModel, Any]) -> None:
    """Its assistant mask, of a template with generation tags."""
    chat, theirs = tagged
    masked = theirs.apply_chat_template(TALKS[kind], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    tokens = chat.encode(talk(kind), LEARN)
    mask = np.array(masked["assistant_masks"], np.bool_)
    taught = theirs.convert_tokens_to_string(theirs.convert_ids_to_tokens(tokens.ids[tokens.learn].tolist()))
    assert taught == theirs.convert_tokens_to_string(
        theirs.convert_ids_to_tokens(np.array(masked["input_ids"])[mask].tolist())
    )
    if kind != "thinking":  # whose marks, apart, have other tokens
        assert tokens.ids.tolist() == masked["input_ids"]
        assert tokens.learn.tolist() == mask.tolist()


def test_control_tokens_in_a_tool_or_call_are_refused(model: Model) -> None:
    messages = json.loads(json.dumps(TALKS["calls"]))
    messages[1]["tool_calls"][0]["function"]["arguments"]["city"] = "<|im_end|>"
    with pytest.raises(Refused, match=r"control token in a tool or call: a tool call holds '<\|im_end\|>'"):
        model("qwen3").encode(read_row({"messages": messages}, "messages"))
    row = {"messages": TALKS["plain"], "tools": [{"name": "a", "description": "ends with <tool_call>"}]}
    with pytest.raises(Refused, match="a tool holds '<tool_call>'"):
        model("qwen3").encode(read_row(row, "messages"))
    named = [*TALKS["calls"][:2], {**TALKS["calls"][2], "name": "<|im_start|>"}, *TALKS["calls"][3:]]
    with pytest.raises(Refused, match=r"a tool's name or id holds '<\|im_start\|>'"):
        model("qwen3").encode(read_row({"messages": named}, "messages"))


def test_what_a_template_rewrites_is_plain_text_and_not_taught(model: Model) -> None:
    """Qwen3 takes what stands behind the last </think> for the answer, wherever it stands."""
    chat = model("qwen3")
    answer = "a</think>b<|im_end|>c"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}, *TALKS["plain"]]
    tokens = chat.encode(read_row({"messages": messages}, "messages"))
    assert ("assistant", 1, 0) in tokens.absent
    assert {span.message for span in tokens.spans if span.learn} == {3, 5}
    counts = [int((tokens.ids == token).sum()) for token in chat.stops]
    assert counts == [6]
    assert "b<|im_end|>c" in chat.template.render(read_row({"messages": messages}, "messages"))
    with pytest.raises(Refused, match="nothing is taught: the chat template leaves out: assistant of message 1"):
        chat.encode(read_row({"messages": messages[:2]}, "messages"))


def test_contents_that_cannot_be_told_apart_are_refused() -> None:
    """The first question decides how all others are written."""
    source = (
        "{% for m in messages %}<{{ m.content if messages[0].content != 'Hi there' else m.content[::-1] }}>{% endfor %}"
    )
    with pytest.raises(Refused, match="contents that cannot be told apart: the chat template rewrites message 0"):
        small(source).encode(talk("plain"))
    with pytest.raises(Refused, match="answer written twice: the chat template writes message 1 2 times"):
        small("{% for m in messages %}<{{ m.content }}|{{ m.content }}>{% endfor %}").encode(talk("plain"))


def test_an_assistant_that_speaks_first_needs_something_before_it() -> None:
    first = read_row({"messages": [{"role": "assistant", "content": "a"}]}, "messages")
    with pytest.raises(Refused, match="the assistant speaks first"):
        small("{% for m in messages %}{{ m.content }}{% endfor %}").encode(first)
    assert small(PLAIN).encode(first).learn.tolist() == [False] * 3 + [True, False]


def test_the_same_conversation_gives_the_same_tokens(model: Model) -> None:
    first, second = (model("qwen3").encode(talk("calls", tools=True), LEARN) for _ in range(2))
    assert first.spans == second.spans
    assert first.ids.tobytes() == second.ids.tobytes()


@pytest.mark.parametrize(
    ("behind", "stop"),
    [
        ("<|im_end|>", True),
        (" \n<|im_end|>", True),
        ("<|im_end|><|im_end|>", True),
        (".<|im_end|>", False),
        ("<|im_start|><|im_end|>", False),
        ("<|endoftext|>", False),
        ("", False),
    ],
)
def test_a_stop_is_the_first_control_token_behind_an_answer_with_blanks_at_most_before_it(
    model: Model, behind: str, stop: bool
) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content }}" + behind + "{% endfor %}"
    chat = ChatModel(ChatTemplate({"default": source}), model("smollm2").tokenizer)
    found = seen(chat.encode(talk("system")), chat)
    assert [span for span in found if span[0] == "stop"] == ([("stop", 2, 0, "<|im_end|>")] if stop else [])


def test_a_stop_that_the_generation_config_names(model: Model) -> None:
    (token,) = model("smollm2").tokenizer.template_ids("<|endoftext|>", "start")
    template = ChatTemplate({"default": "{% for m in messages %}:{{ m.content }}<|endoftext|>{% endfor %}"})
    for stops, expected in (((), None), ((token,), token)):
        chat = ChatModel(replace(template, stops=stops), model("smollm2").tokenizer)
        assert chat.stop_token == expected


@pytest.mark.parametrize("name", each())
def test_a_question_is_asked_with_its_content_as_text(model: Model, name: str) -> None:
    """What asks for an answer is the start of what has one."""
    chat = model(name)
    question = talk("hostile").cut(1)
    asked = chat.encode_prompt(question)
    assert not asked.learn.any()
    assert [span.kind for span in asked.spans].count("user") == 1
    answer = chat.encode(talk("hostile"), ("assistant",))
    start = answer.spans[[span.kind for span in answer.spans].index("assistant")].token_start
    # Qwen3 writes an empty block of reasoning behind it, ChatGLM a line end and a blank
    size = min(len(asked), start)
    assert asked.ids[:size].tolist() == answer.ids[:size].tolist()
    assert start - size <= 4


@pytest.mark.parametrize("name", each())
def test_the_token_that_ends_a_plain_answer(model: Model, name: str) -> None:
    ends = {
        "smollm2": "<|im_end|>",
        "qwen3": "<|im_end|>",
        "phi3-mini": "<|end|>",
        "phi3-medium": "<|end|>",
        "chatglm3": None,
        "llama3": "<|eot_id|>",
        "llama3_1": "<|eot_id|>",
        "gemma3": "<end_of_turn>",
        "deepseek_v3": "<｜end▁of▁sentence｜>",
    }
    stop = model(name).stop_token
    assert (None if stop is None else model(name).tokenizer.added[stop]) == ends[name]
