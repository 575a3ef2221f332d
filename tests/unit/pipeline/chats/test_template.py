"""Where a chat template is found, what it is given, and what becomes of its refusals."""

import hashlib
import json
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.chats import Call, ChatTemplate, Conversation, Message, Refused, load_template
from xtoken.pipeline.chats.template import CallForm
from xtoken.schemas.errors import XtokenError

load = partial(load_template, date=datetime(2026, 7, 4))
TALK = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def folder(root: Path, jinja: str | None = None, **config: Any) -> str:
    (root / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if jinja is not None:
        (root / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return str(root)


def test_a_file_of_its_own_comes_before_the_configuration(tmp_path: Path) -> None:
    source = folder(tmp_path, PLAIN, chat_template="other")
    assert load(source).render(TALK) == "<user>Hi<assistant>Hello"
    assert load(str(tmp_path / "tokenizer_config.json")).sources == {"default": PLAIN}
    assert load(folder(tmp_path, PLAIN)).sha256 == hashlib.sha256(PLAIN.encode()).hexdigest()


def test_a_template_in_the_configuration_knows_its_special_tokens(tmp_path: Path) -> None:
    text = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ name }}"
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    source = folder(tmp_path, chat_template=text, **config)
    assert load(source).render(TALK) == "<s>|</s>||"
    assert load(source, arguments={"name": "a", "bos_token": "b"}).render(TALK) == "b|</s>||a"


def test_of_named_templates_the_one_for_tools_is_taken_where_there_are_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    found = load(folder(tmp_path, chat_template=named))
    assert found.render(TALK) == "plain"
    assert found.render(Conversation(TALK.messages, ('{"name":"add"}',))) == "add"
    assert found.sha256 != load(folder(tmp_path, chat_template=named[:1])).sha256


def test_a_given_file_counts_whatever_the_model_has(tmp_path: Path) -> None:
    given = tmp_path / "own.jinja"
    given.write_text(PLAIN)
    assert load(folder(tmp_path, chat_template="other"), file=str(given)).sources == {"default": PLAIN}
    assert load("bytes", file=str(given)).render(TALK) == "<user>Hi<assistant>Hello"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no chat template .* give a template with --template FILE"),
        ({"chat_template": []}, "named nothing, and none is 'default'"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, "named rag, and none is 'default'"),
        ({"chat_template": 3}, "is a int, not text"),
    ],
)
def test_a_model_without_a_template_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(XtokenError, match=message):
        load(folder(tmp_path, **config))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"none\.jinja cannot be read"):
        load("bytes", file=str(tmp_path / "none.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(XtokenError, match="not readable JSON"):
        load(str(tmp_path))
    with pytest.raises(XtokenError, match="--template-arg messages is what the template is given by the run"):
        load(folder(tmp_path, PLAIN), arguments={"messages": 1})


def test_a_template_that_is_no_template_fails_for_all_conversations() -> None:
    with pytest.raises(XtokenError, match="the chat template cannot be used") as caught:
        ChatTemplate({"default": "{% if %}"}).render(TALK)
    assert not isinstance(caught.value, Refused)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content + 'a' }}", ""),
    ],
)
def test_what_a_template_refuses_is_refused_by_name(source: str, said: str) -> None:
    with pytest.raises(Refused, match=f"the chat template refuses it: the template says: .*{said}.*--template"):
        ChatTemplate({"default": source}).render(TALK)


def test_today_is_the_day_of_the_plan() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate({"default": source}, date=datetime(2026, 7, 4)).render(TALK) == "04 Jul 2026"


def test_stops_are_those_of_the_generation_config(tmp_path: Path) -> None:
    source = folder(tmp_path, PLAIN)
    for value, stops in ((None, ()), (2, (2,)), ([2, 7], (2, 7)), ("a", ()), (True, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert load(source).stops == stops


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}", CallForm()),
        (
            "{% for m in messages %}{{ m.content + '' }}{% for c in m.tool_calls or [] %}"
            "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}",
            CallForm("", as_text=True),
        ),
        (
            "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name }}"
            "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            CallForm(None),
        ),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", CallForm()),
    ],
)
def test_calls_have_the_form_in_which_the_template_writes_them(source: str, form: CallForm) -> None:
    template = ChatTemplate({"default": source})
    assert template.call_form(tools=False) == form
    call = Message("assistant", "", calls=(Call("add", '{"x":1}'),))
    assert ("add" in template.render(Conversation((call,)))) == ("tool_calls" in source)


def test_whether_the_prompt_opens_reasoning() -> None:
    assert ChatTemplate({"default": "{{ '<think>\n' if add_generation_prompt }}"}).opens_thinking
    assert not ChatTemplate({"default": PLAIN}).opens_thinking
