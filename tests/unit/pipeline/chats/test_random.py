"""Random conversations of random models: what holds of all, in one model and between two."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from xtoken.pipeline.chats import Refused, fit, from_json, read_row, samples_of, to_json

from .conftest import Model, each
from .test_pairs import check_pair
from .test_spans import check

REASONS = {
    *("none", "nothing is taught", "the chat template refuses it", "contents that cannot be told apart"),
    *("reasoning twice", "control token in a tool or call"),
}
PIECES = [
    *("Hello", " world", "naïve café", "日本語", "Ελληνικά", "עברית", "👩‍👩‍👧", "e\u0301", "12345", "x = [1]", "QzqZ"),
    *("\n", "\n\n", " ", "  ", "\t", "\u00a0", "\u3000", "", "{{ 1 }}", "{% raw %}", '"', "\\", "None"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_end|>", "<|"),
    *(
        "<|im_start|>user\n",
        "<|eot_id|>",
        "<end_of_turn>\n",
        "<s>",
        "</s>",
        "<|end|>",
        "<｜end▁of▁sentence｜>",
        "[gMASK]",
    ),
]
text = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
arguments = st.dictionaries(
    st.sampled_from(["city", "q", "日"]), st.integers() | st.sampled_from(["rain", "a\nb", "é"])
)


@st.composite
def turn(draw: Any) -> list[dict[str, Any]]:
    """A question, perhaps a call with its result, and an answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(text)}]
    if draw(st.integers(0, 3)) == 0:
        calls = [
            {
                "id": f"call0000{at}",
                "type": "function",
                "function": {"name": f"tool_{at}", "arguments": draw(arguments)},
            }
            for at in range(draw(st.integers(1, 2)))
        ]
        said = {"role": "assistant", "content": draw(st.none() | text), "tool_calls": calls}
        results = [{"role": "tool", "content": draw(text), "tool_call_id": call["id"]} for call in calls]
        messages += [said, *results]
    answer: dict[str, Any] = {"role": "assistant", "content": draw(text), "train": draw(st.booleans())}
    thinking = draw(st.sampled_from(["no", "no", "apart", "inside"]))
    if thinking == "apart" and "<think>" not in answer["content"]:
        answer["reasoning_content"] = draw(text)
    elif thinking == "inside":
        answer["content"] = f"<think>\n{draw(text)}\n</think>\n\n{answer['content']}"
    return [*messages, answer]


turns = st.lists(turn(), min_size=1, max_size=3).map(lambda turns: [message for turn in turns for message in turn])
system = st.just([]) | text.map(lambda content: [{"role": "system", "content": content}])
talks: SearchStrategy[list[dict[str, Any]]] = st.tuples(system, turns).map(lambda parts: parts[0] + parts[1])


@pytest.mark.parametrize("name", each())
def test_any_conversation_is_spans_of_its_own_contents_or_refused(model: Model, name: str) -> None:
    chat = model(name)
    reasons = Counter[str]()

    @settings(max_examples=40)
    @given(talks)
    def run(messages: list[dict[str, Any]]) -> None:
        try:
            conversation = read_row({"messages": messages}, "messages")
            tokens = check(chat, conversation)
        except Refused as refused:
            reasons[refused.reason] += 1
            return
        reasons["none"] += 1
        # what is rewritten for other tokens only, or not at all, is not taught
        assert from_json(to_json(conversation)) == conversation
        taught = {span.message for span in tokens.spans if span.learn}
        assert taught <= set(conversation.taught)
        # no content brings a token that ends an answer: as many as without any
        plain = [{**one, "content": "a" if one.get("content") else one.get("content")} for one in messages]
        plain = [{**one, "reasoning_content": "b"} if one.get("reasoning_content") else one for one in plain]
        stops = sum(token in chat.stops for token in tokens.ids.tolist())
        if not tokens.absent and not any("<think>" in str(one) or "tool_" in str(one) for one in messages):
            other = check(chat, read_row({"messages": plain}, "messages"))
            assert stops == sum(token in chat.stops for token in other.ids.tolist())
        for sample in samples_of(conversation, "each"):
            try:
                _, part = fit(sample.conversation, chat.encode, len(tokens) // 2, "cut")
            except Refused:
                continue
            assert len(part) <= len(tokens) // 2

    run()
    assert reasons["none"] >= 5
    assert set(reasons) <= REASONS


@pytest.mark.parametrize(
    ("first", "second"),
    [("smollm2", "qwen3"), ("qwen3", "smollm2"), ("phi3-medium", "qwen3"), ("chatglm3", "phi3-medium")]
    + [
        pytest.param(*two, marks=pytest.mark.thorough)
        for two in (("deepseek_v3", "qwen3"), ("llama3_1", "deepseek_v3"), ("gemma3", "llama3"), ("qwen3", "gemma3"))
    ],
)
def test_any_conversation_pairs(model: Model, first: str, second: str) -> None:
    teacher, student = model(first), model(second)

    @settings(max_examples=25)
    @given(talks)
    def run(messages: list[dict[str, Any]]) -> None:
        try:
            check_pair(teacher, student, read_row({"messages": messages}, "messages"))
        except Refused:
            return

    run()
