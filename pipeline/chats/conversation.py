"""A conversation: messages with their reasoning and tool calls, and the tools that were offered."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from xtoken.pipeline.chats.refused import Refused, shown

Role = Literal["system", "user", "assistant", "tool"]
_SURROGATES = re.compile("[\ud800-\udfff]")
# of JSON, and what is no ASCII behind it
_ESCAPE = re.compile(r"(\\(?:[bfnrt]|u[0-9a-f]{4}))([^\x00-\x7f]+)")
# reasoning at the start of an answer, with the line ends that belong to its marks
_THINKING = re.compile(r"(\s*<think>\n*)(.*?)(\n*</think>\n*)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call.

    Attributes:
        name: of the function.
        arguments: JSON; an object as it was written, key by key, or text that is no JSON object.
        id: as results refer to it; None where the data has none.
    """

    name: str
    arguments: str
    id: str | None = None

    @property
    def parsed(self) -> Any:
        """The arguments as an object, or the text where they are none."""
        value = parsed_json(self.arguments)
        return value if isinstance(value, dict) else self.arguments


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: who speaks; ``tool`` answers a call.
        content: text, perhaps empty; reasoning may stand at its start.
        reasoning: where the data has it apart from the content.
        calls: tool calls of an assistant.
        call_id: which call a tool answers, if the data say so.
        name: of the tool that answers, if the data say so.
        train: whether an assistant's message is taught.
    """

    role: Role
    content: str
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None
    train: bool = True

    @property
    def taught(self) -> bool:
        """Whether it is an assistant's and not switched off."""
        return self.role == "assistant" and self.train


@dataclass(frozen=True)
class Thinking:
    """An answer that begins with its reasoning: ``opening + text + closing + answer`` is the content."""

    opening: str
    text: str
    closing: str
    answer: str


def thinking_in(message: Message) -> Thinking | None:
    """The reasoning at the start of an assistant's content; None where there is none, or it is given apart."""
    found = _THINKING.fullmatch(message.content) if message.role == "assistant" and message.reasoning is None else None
    return Thinking(*found.groups()) if found else None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call, each a JSON schema as JSON text."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()

    @property
    def taught(self) -> tuple[int, ...]:
        """Indices of the messages that are taught."""
        return tuple(at for at, message in enumerate(self.messages) if message.taught)

    @property
    def schemas(self) -> list[Any]:
        """The tools, parsed."""
        return [json.loads(tool) for tool in self.tools]

    @property
    def text_bytes(self) -> int:
        """Bytes of its contents, reasoning and calls."""
        texts = [text for one in self.messages for text in (one.content, one.reasoning or "")]
        texts += [text for one in self.messages for call in one.calls for text in (call.name, call.arguments)]
        return sum(len(text.encode()) for text in texts)

    def cut(self, count: int) -> "Conversation":
        """The first ``count`` messages."""
        return replace(self, messages=self.messages[:count])

    def only(self, taught: Sequence[int]) -> "Conversation":
        """The same with no other messages taught than these."""
        return replace(
            self,
            messages=tuple(
                replace(message, train=message.train and (at in taught or message.role != "assistant"))
                for at, message in enumerate(self.messages)
            ),
        )


def conversation_of(messages: Sequence[Message], tools: Sequence[str] = ()) -> Conversation:
    """A conversation whose messages follow each other as they may.

    Raises:
        Refused: it is empty, or a tool answers no call.
    """
    if not messages:
        raise Refused("empty conversation", "it has no messages", "remove the record")
    waiting: list[Call] = []
    for at, message in enumerate(messages):
        if message.role == "tool":
            _answer(at, message, waiting)
        else:
            waiting = list(message.calls)
    return Conversation(tuple(messages), tuple(tools))


def _answer(at: int, message: Message, waiting: list[Call]) -> None:
    """Take the call that a result answers off those that wait."""
    ids = [call.id for call in waiting]
    if not waiting or (message.call_id is not None and None not in ids and message.call_id not in ids):
        which = f" {message.call_id!r}" if message.call_id is not None else ""
        raise Refused(
            "tool result without a call",
            f"message {at} answers the call{which}, which the assistant's message before it does not make",
            "give the call as tool_calls of that message, or remove the result",
        )
    waiting.pop(ids.index(message.call_id) if message.call_id in ids else 0)


def require_taught(conversation: Conversation) -> None:
    """Refuse a conversation of which nothing would be learned.

    Raises:
        Refused: no message of an assistant is taught.
    """
    if not conversation.taught:
        roles = [message.role for message in conversation.messages]
        why = "all its answers are switched off" if "assistant" in roles else f"its roles are {', '.join(roles)[:80]}"
        raise Refused("nothing is taught", why, "add an assistant's message that is taught, or remove the record")


def compact(value: Any) -> str:
    """JSON in one line, keys in the order they have; NFC leaves it as it is where its texts are in NFC.

    A combining character behind a line end would meet the letter of the escape there: NFC makes one of ``\\n`` and an
    accent. It is escaped itself.
    """
    return _ESCAPE.sub(_escape_marks, json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _escape_marks(found: re.Match[str]) -> str:
    escape, behind = found.groups()
    marks = "".join(takewhile(unicodedata.combining, behind))
    return str(escape) + json.dumps(marks)[1:-1] + str(behind[len(marks) :])


def parsed_json(text: str) -> Any:
    """The value, or None where the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def clean(value: Any, levels: int = 100) -> Any:
    """A JSON value with its texts in NFC, as all text of a corpus is.

    Args:
        value: it.
        levels: how deep lists and objects may lie in each other.

    Raises:
        Refused: a text holds a lone surrogate, which no encoding can represent, or lists lie too deep in each other.
    """
    if not levels:
        raise Refused("nested too deeply", "lists or objects lie over 100 deep in each other", "remove the record")
    if isinstance(value, str):
        if _SURROGATES.search(value):
            raise Refused(
                "lone surrogate", f"{shown(value)} holds one, which no encoding can represent", "mend the text"
            )
        return unicodedata.normalize("NFC", value)
    if isinstance(value, Mapping):
        return {clean(key): clean(one, levels - 1) for key, one in value.items()}
    return [clean(one, levels - 1) for one in value] if isinstance(value, list | tuple) else value
