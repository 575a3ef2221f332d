"""A model's chat template: found, named by its hash, and rendered by transformers' own machinery.

Templates are programs; transformers runs them in a sandbox. What they say about a conversation (roles that must
alternate, tools that they do not know) refuses that conversation, by name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from xtoken.pipeline.chats.conversation import Call, Conversation, Message
from xtoken.pipeline.chats.forms import call_fields
from xtoken.pipeline.chats.refused import Refused
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.hub_files import hub_file, there

_JINJA, _CONFIG, _SPECIAL = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
_GENERATION = "generation_config.json"
_NO_TEMPLATE = ("TemplateSyntaxError", "TemplateAssertionError", "ImportError")  # whatever the conversation
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "conversations", "chat_template"}
_PROBE = "probe_of_calls"


class NoTemplate(XtokenError):
    """A model has no chat template."""


@dataclass(frozen=True)
class CallForm:
    """How a template wants tool calls: what content stands beside them, and whether arguments are JSON text."""

    content: str | None = ""
    as_text: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one model, with everything that its renderings depend on.

    Attributes:
        sources: name -> Jinja source; a model with one has it as ``default``.
        variables: what it is given beside messages and tools: how special tokens are spelt, and ``--template-arg``.
        date: what ``strftime_now`` says.
        stops: ids of tokens that end an answer, by generation_config.json.
        asks: whether a rendering ends with what asks for the next answer (``add_generation_prompt``).
    """

    sources: Mapping[str, str]
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime = datetime(1970, 1, 1)
    stops: tuple[int, ...] = ()
    asks: bool = False

    @property
    def sha256(self) -> str:
        """Of the source; of all of them, by name, where there are several."""
        one = (
            self.sources["default"]
            if list(self.sources) == ["default"]
            else json.dumps(dict(self.sources), sort_keys=True)
        )
        return hashlib.sha256(one.encode()).hexdigest()

    def source(self, *, tools: bool) -> str:
        """The template for a conversation with or without tools, chosen as transformers does."""
        return self.sources["tool_use"] if tools and "tool_use" in self.sources else self.sources["default"]

    def render(self, conversation: Conversation) -> str:
        """The conversation as the model reads it.

        Raises:
            Refused: the template refuses it, or fails on it.
        """
        form = self.call_form(tools=bool(conversation.tools)) if any(m.calls for m in conversation.messages) else None
        return self._render(conversation, form or CallForm())

    def call_form(self, *, tools: bool) -> CallForm:
        """The first form of tool calls in which the template writes one at all; the usual one if it never does."""
        return self._call_forms[tools]

    @cached_property
    def _call_forms(self) -> dict[bool, CallForm]:
        return {tools: next(_forms_that_show(self, tools), CallForm()) for tools in (False, True)}

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether what asks for an answer ends with the mark that opens reasoning: the model never writes it then."""
        try:
            asked = replace(self, asks=True).render(Conversation((Message("user", "a"),)))
        except Refused:
            return False
        return asked.rstrip().endswith("<think>")

    def _render(self, conversation: Conversation, form: CallForm) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = conversation.schemas or None
        try:
            rendered = render_jinja_template(
                conversations=[[_as_dict(message, form) for message in conversation.messages]],
                tools=tools,
                chat_template=self.source(tools=tools is not None),
                add_generation_prompt=self.asks,
                **{**self.variables, "strftime_now": self.date.strftime},
            )
        except Exception as error:
            if type(error).__name__ in _NO_TEMPLATE:
                raise XtokenError(
                    f"the chat template cannot be used ({error}); give another one with --template"
                ) from error
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise Refused(
                "the chat template refuses it",
                f"the template says: {said}",
                "leave such conversations out, or give another template with --template",
            ) from error
        return str(rendered[0][0])


def _as_dict(message: Message, form: CallForm) -> dict[str, Any]:
    """A message as templates read it; what it does not have is not there."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.calls:
        fields["content"] = message.content or form.content
        fields["tool_calls"] = [
            call_fields(call, call.arguments if form.as_text else call.parsed) for call in message.calls
        ]
    if message.call_id is not None:
        fields["tool_call_id"] = message.call_id
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _forms_that_show(template: ChatTemplate, tools: bool) -> Iterator[CallForm]:
    schema = {"type": "function", "function": {"name": _PROBE, "description": "a", "parameters": {"type": "object"}}}
    call = Call(_PROBE, '{"a":"b"}', "abcdefghi")
    asked, said = Message("user", "a"), Message("assistant", "", calls=(call,))
    answer = Message("tool", "c", call_id=call.id, name=_PROBE)
    offered = (json.dumps(schema),) if tools else ()
    for content, as_text in product(("", None), (False, True)):
        for messages in ((asked, said), (asked, said, answer)):
            without = Conversation((asked, Message("assistant", "a")), offered)
            try:
                shown = template._render(Conversation(messages, offered), CallForm(content, as_text))
                before = template._render(without, CallForm())
            except Refused:
                continue
            if shown.count(_PROBE) > before.count(_PROBE) and (content is not None or "None" not in shown):
                yield CallForm(content, as_text)


def load_template(
    source: str,
    *,
    revision: str | None = None,
    file: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: datetime,
    optional: bool = False,
) -> ChatTemplate:
    """The chat template of a tokenizer or model.

    Args:
        source: as for ``load_tokenizer``: a folder, a tokenizer.json (its folder counts), a hub id, or ``bytes``.
        revision: of a hub id.
        file: a template that counts instead of the model's own (``--template``).
        arguments: more variables (``--template-arg``); they win over those of the model.
        date: what the template takes for now, so that the same run gives the same text.
        optional: a model without one gives a template without sources, which refuses every conversation.

    Raises:
        XtokenError: the model has no template, or a file cannot be read.
    """
    if taken := _OURS.intersection(arguments or ()):
        raise XtokenError(f"--template-arg {min(taken)} is what the template is given by the run; choose another name")
    config, special, generation = (_json_file(source, name, revision) for name in (_CONFIG, _SPECIAL, _GENERATION))
    own = file is None
    sources = _sources(source, config, revision) if own else {"default": _text_of(Path(file or "").expanduser())}
    if not sources and not optional:
        raise NoTemplate(
            f"{source} has no chat template (neither {_JINJA} nor chat_template in {_CONFIG}), and conversations need "
            "one; use the chat model of the family, or give a template with --template FILE"
        )
    spelt = {**_spelt(special), **_spelt(config)}
    stops = generation.get("eos_token_id")
    ids = stops if isinstance(stops, list) else [stops]
    return ChatTemplate(
        sources,
        {**spelt, **(arguments or {})},
        date,
        tuple(one for one in ids if isinstance(one, int) and not isinstance(one, bool)),
    )


def _sources(source: str, config: Mapping[str, Any], revision: str | None) -> dict[str, str]:
    """By name; none where the model has no template."""
    path = _path(source, _JINJA, revision)
    if path is not None:
        return {"default": _text_of(path)}
    found = config.get("chat_template")
    if isinstance(found, str) and found:
        return {"default": found}
    if isinstance(found, list) and all(isinstance(one, Mapping) for one in found):
        named = {str(one.get("name")): str(one.get("template")) for one in found}
        if "default" in named:
            return named
        raise XtokenError(
            f"{source} has chat templates named {', '.join(named)[:200] or 'nothing'}, and none is 'default'; save the "
            "one to use in a file and give it with --template"
        )
    if found is not None and found != "":
        raise XtokenError(f"chat_template of {source} is a {type(found).__name__}, not text; fetch {_CONFIG} again")
    return {}


def _path(source: str, name: str, revision: str | None) -> Path | None:
    """A file beside a tokenizer, or None where there is none."""
    local = Path(source).expanduser()
    if local.is_file() or local.is_dir():
        path = (local if local.is_dir() else local.parent) / name
        return path if there(path) else None
    return None if source == "bytes" else hub_file(source, name, revision)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise XtokenError(f"the chat template {path} cannot be read ({error}); give a text file in UTF-8") from error


def _json_file(source: str, name: str, revision: str | None) -> Mapping[str, Any]:
    path = _path(source, name, revision)
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise XtokenError(f"{path} is not readable JSON ({error}); fetch the file again") from error
    return value if isinstance(value, Mapping) else {}


def _spelt(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens as templates name them: ``bos_token`` and the like, where there is one."""
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    contents = {name: token.get("content") if isinstance(token, Mapping) else token for name, token in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
