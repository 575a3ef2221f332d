"""Held-out conversations of real templates: what counts, what is asked, and whose template it must be."""

from pathlib import Path

import pytest
from talks import TALKS

from xtoken.pipeline.chats import Conversation, Message, Refused, read_row
from xtoken.pipeline.chats.held_out import held_out, open_student
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.errors import XtokenError

from .conftest import DAY, Model, each

LEARN = ("assistant", "call", "stop")
TALK = Conversation(
    (
        Message("user", "What is 2 + 2?"),
        Message("assistant", "It is 4."),
        Message("user", "And 3 + 3?"),
        Message("assistant", "That is six, surely."),
        Message("user", "Thanks!"),
    )
)


@pytest.mark.parametrize("name", each())
def test_what_counts_and_what_is_asked(model: Model, name: str) -> None:
    chat = model(name)
    found = held_out(chat, TALK, LEARN, 500)
    answers = [span for span in found.taught if span.kind == "assistant"]
    assert [span.size for span in answers] == [len("It is 4."), len("That is six, surely.")]
    assert found.taught_bytes == sum(span.size for span in answers)
    table = chat.tokenizer.table
    texts = [b"".join(map(table.token, found.ids[span.start : span.stop].tolist())) for span in answers]
    assert [text.strip() for text in texts] == [b"It is 4.", b"That is six, surely."]
    for span in found.taught:
        if span.kind == "stop":
            assert (span.size, span.stop - span.start) == (0, 1)
            assert found.ids[span.start] in chat.stops
    assert found.asked is not None
    assert found.asked.answer == "It is 4."
    assert "2 + 2" in found.asked.text
    assert "3 + 3" not in found.asked.text
    assert "It is" not in found.asked.text
    # what is asked is how the conversation begins, up to its first answer; ChatGLM3 asks without the line's end
    if name != "chatglm3":
        assert found.asked.ids.tolist() == found.ids[: answers[0].start].tolist()
    assert found.asked.stop == chat.stop_token


def test_too_long_loses_its_end(model: Model) -> None:
    chat = model("smollm2")
    whole = held_out(chat, TALK, LEARN, 500)
    stops = [span.stop for span in whole.taught if span.kind == "stop"]
    cut = held_out(chat, TALK, LEARN, stops[-1] - 1)
    assert cut.ids.tolist()[: stops[0]] == whole.ids.tolist()[: stops[0]]
    assert len(cut.taught) == 2
    with pytest.raises(Refused, match="longer than --max-tokens"):
        held_out(chat, TALK, LEARN, stops[0] - 1)
    with pytest.raises(Refused, match="nothing is taught"):
        held_out(chat, TALK.cut(1), LEARN, 500)


def test_a_call_is_an_answer(model: Model) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    talk = next(name for name, messages in TALKS.items() if any(m.get("tool_calls") for m in messages))
    found = held_out(model("qwen3"), read_row({"messages": TALKS[talk], "tools": [tool]}, "messages"), LEARN, 2000)
    assert "call" in {span.kind for span in found.taught}
    assert found.asked is not None
    assert found.asked.answer


def test_a_student_has_the_template_of_its_targets(smollm2_dir: Path, model: Model, tmp_path: Path) -> None:
    template = model("smollm2").template
    info = ChatInfo(template=template.sha256, date=DAY.isoformat(), arguments={"lang": "en"}, learn=[*LEARN])
    opened = open_student(str(smollm2_dir), info)
    assert opened.template.date == DAY
    assert opened.template.variables["lang"] == "en"
    # the same said again is no contradiction
    assert open_student(str(smollm2_dir), info, None, {"lang": "en"}, DAY.isoformat()).template.date == DAY
    with pytest.raises(
        XtokenError, match=r"--template-arg: {'lang': 'de'} .* written with {'lang': 'en'}; leave it out"
    ):
        open_student(str(smollm2_dir), info, None, {"lang": "de"})
    with pytest.raises(XtokenError, match=r"--date: 2020-01-01 was asked for, .*; leave it out"):
        open_student(str(smollm2_dir), info, None, None, "2020-01-01")
    other = tmp_path / "other.jinja"
    other.write_text(template.sources["default"] + "\n")
    with pytest.raises(XtokenError, match=r"other\.jinja \(\w{12}\) is not the one .* give that one with --template"):
        open_student(str(smollm2_dir), info, str(other))
    same = tmp_path / "same.jinja"
    same.write_text(template.sources["default"])
    assert open_student(str(smollm2_dir), info, str(same)).template.sha256 == info.template
