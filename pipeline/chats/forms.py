"""Rows of chat data in the forms that datasets have, read into conversations; and the form in which they are stored.

``form_of`` finds the form from a file's columns, ``read_row`` reads one row. What is wrong with a row is raised as
``Refused``, which its caller counts by reason.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from xtoken.pipeline.chats.conversation import (
    Call,
    Conversation,
    Message,
    Role,
    clean,
    compact,
    conversation_of,
    parsed_json,
    thinking_in,
)
from xtoken.pipeline.chats.refused import Refused, shown
from xtoken.schemas.errors import XtokenError

Form = Literal["messages", "sharegpt", "prompt", "alpaca", "ids"]
FORMS: tuple[Form, ...] = get_args(Form)
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")  # of ShareGPT: a message that is one call
_COLUMNS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "ids": ("input_ids",),
}

# What a row may have beside them.
_BESIDE: dict[Form, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt": ("tools",),
    "alpaca": ("input", "system", "history", "tools"),
    "ids": (
        *("labels", "loss_mask", "assistant_masks", "completion_mask"),
        *("attention_mask", "seq_lengths", "position_ids"),
    ),
}


def form_of(columns: Collection[str]) -> Form | None:
    """The form of rows with these columns; None if they are no conversations. Of several forms, the first counts.

    The order: ``messages``; ``conversations``; ``prompt`` and ``completion``; ``instruction`` and ``output``;
    ``input_ids``, whose rows ``ids.py`` reads.
    """
    return next((form for form, names in _COLUMNS.items() if set(names) <= set(columns)), None)


def columns_of(form: Form, columns: Collection[str]) -> list[str]:
    """Those of a table's columns that ``read_row`` reads, needed ones first, whether they are there or not."""
    needed = ("prompt",) if form == "prompt" else _COLUMNS[form]
    others = [name for name in (*_COLUMNS[form], *_BESIDE[form]) if name in columns and name not in needed]
    return [*needed, *others]


def read_row(row: Mapping[str, Any], form: Form) -> Conversation:
    """Read a row.

    Args:
        row: its columns.
        form: from ``form_of``, or forced. A ``prompt`` needs no ``completion`` if it is forced.

    Raises:
        Refused: the row is no conversation of this form.
        XtokenError: there is no such form of messages.
    """
    if form not in _READERS:
        raise XtokenError(f"there is no form {form!r} of chat data; the forms are {', '.join(_READERS)}")
    row = clean(row)
    return conversation_of(_READERS[form](row), _tools(row.get("tools")))


def to_json(conversation: Conversation) -> str:
    """The conversation as it is stored: one text for one conversation, its fields in one order, tools' as they came."""
    value: dict[str, Any] = {"messages": [_fields(message) for message in conversation.messages]}
    if conversation.tools:
        value["tools"] = conversation.schemas
    return compact(value)


def from_json(text: str) -> Conversation:
    """Inverse of ``to_json``.

    Raises:
        Refused: it is no such text.
    """
    value = parsed_json(text)
    if not isinstance(value, Mapping):
        raise Refused("bad conversation", f"{shown(text)} is not a JSON object", "fetch the file again")
    return read_row(value, "messages")


def _fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.calls:
        fields["tool_calls"] = [call_fields(call, call.arguments) for call in message.calls]
    optional = {"tool_call_id": message.call_id, "name": message.name, "train": None if message.train else False}
    return fields | {key: value for key, value in optional.items() if value is not None}


def call_fields(call: Call, arguments: Any) -> dict[str, Any]:
    """A call as templates and stored conversations have it."""
    function = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return function if call.id is None else {"id": call.id, **function}


def _column(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        has = ", ".join(list(row)[:8]) or "nothing"
        what = f"its {name!r} is null" if name in row else f"it has no {name!r}; it has {has}"
        raise Refused("missing field", what, "choose another form, or mend the record")
    return row[name]


def _bad(what: str, value: object, rule: str) -> Refused:
    return Refused("bad field", f"{what} is {shown(value)}, but {rule}", "mend the record")


def _list(what: str, value: Any) -> list[Any]:
    """A list, or a list as JSON text."""
    found = parsed_json(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise _bad(what, value, "it must be a list")
    return found


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(what, value, "it must be text")
    return value


def _messages_form(row: Mapping[str, Any]) -> list[Message]:
    return _messages(_column(row, "messages"), "messages")


def _messages(value: Any, what: str) -> list[Message]:
    return [_message(one, f"message {at} of {what}") for at, one in enumerate(_list(what, value))]


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, Mapping):
        raise _bad(what, value, "it must be an object with role and content")
    role = _role(value.get("role"), what)
    calls = _calls(value.get("tool_calls"), what) if role == "assistant" else ()
    reasoning = next((value[key] for key in ("reasoning_content", "reasoning") if value.get(key) is not None), None)
    message = Message(
        role,
        _content(value.get("content"), what, optional=bool(calls) or reasoning is not None),
        None if reasoning is None or role != "assistant" else _text(f"the reasoning of {what}", reasoning),
        calls,
        _optional(value.get("tool_call_id"), f"tool_call_id of {what}"),
        _optional(value.get("name"), f"the name of {what}"),
        _train(value, role, what),
    )
    if reasoning is not None and thinking_in(Message(role, message.content)):
        raise Refused(
            "reasoning twice",
            f"{what} has reasoning_content, and its content begins with <think>",
            "keep one of them",
        )
    return message


def _role(value: Any, what: str) -> Role:
    if value not in _ROLES:
        known = ", ".join(_ROLES)
        raise Refused("unknown role", f"the role of {what} is {shown(value)}; known are {known}", "rename the role")
    return _ROLES[value]


def _content(value: Any, what: str, *, optional: bool) -> str:
    """A text, or text parts as one."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise _bad(f"the content of {what}", value, "it must be text, or a list of text parts")
    return value


def _part(part: Any, what: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    text = part.get("text") if isinstance(part, Mapping) else part
    if kind != "text":
        raise Refused(
            "content that is not text",
            f"the content of {what} has a part of type {shown(kind)}, and only text is learned",
            "leave out conversations with images, audio or files",
        )
    return _text(f"a text part of {what}", text)


def _optional(value: Any, what: str) -> str | None:
    return None if value is None else _text(what, value)


def _train(value: Mapping[str, Any], role: Role, what: str) -> bool:
    """Whether a message is taught, by ``train`` or ``weight``."""
    train, weight = value.get("train"), value.get("weight")
    if train is not None and not isinstance(train, bool):
        raise _bad(f"train of {what}", train, "it must be true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _bad(f"weight of {what}", weight, "it must be 0 or 1: a message is taught or not")
    taught = [one for one in (train, None if weight is None else bool(weight)) if one is not None]
    if role != "assistant" and True in taught:
        raise _bad(f"train or weight of {what}", f"{train or weight} ({role})", "only an assistant's message is taught")
    return role != "assistant" or False not in taught


def _calls(value: Any, what: str) -> tuple[Call, ...]:
    return () if value is None else tuple(_call(one, what) for one in _list(f"tool_calls of {what}", value))


def _call(value: Any, what: str) -> Call:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise _bad(f"a tool call of {what}", value, "it must be an object with a name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, Mapping) or arguments is None:
        arguments = compact(arguments or {})
    return Call(
        name,
        _text(f"the arguments of a tool call of {what}", arguments),
        _optional(value.get("id"), f"a call of {what}"),
    )


def _tools(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    tools = _list("tools", value)
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise _bad("a tool", tool, "it must be an object, the JSON schema of a function")
    return tuple(map(compact, tools))


def _sharegpt_form(row: Mapping[str, Any]) -> list[Message]:
    turns = _list("conversations", _column(row, "conversations"))
    system = _optional(row.get("system"), "system")
    messages = [Message("system", system)] if system else []
    return messages + [_turn(turn, f"message {at} of conversations") for at, turn in enumerate(turns)]


def _turn(turn: Any, what: str) -> Message:
    """A message of ShareGPT, whose keys may also be those of the ``messages`` form."""
    if not isinstance(turn, Mapping):
        raise _bad(what, turn, "it must be an object with from and value")
    if "from" not in turn:
        return _message(turn, what)
    if turn["from"] in _CALL_ROLES:
        call = parsed_json(turn["value"]) if isinstance(turn.get("value"), str) else turn.get("value")
        return _message({"role": "assistant", "tool_calls": call if isinstance(call, list) else [call]}, what)
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return _message({**others, "role": turn["from"], "content": turn.get("value")}, what)


def _prompt_form(row: Mapping[str, Any]) -> list[Message]:
    """What the prompt holds is not taught."""
    prompt, completion = _column(row, "prompt"), row.get("completion")
    before = [Message("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
    before = [replace(message, train=message.role != "assistant") for message in before]
    if completion is None:
        return before
    if isinstance(completion, str):
        return [*before, Message("assistant", completion)]
    return before + _messages(completion, "completion")


def _alpaca_form(row: Mapping[str, Any]) -> list[Message]:
    if row.get("history"):
        raise Refused("history of an instruction", f"history is {shown(row['history'])}", "write it as messages")
    asked = [_text("instruction", _column(row, "instruction")), _optional(row.get("input"), "input") or ""]
    system = _optional(row.get("system"), "system")
    question = Message("user", "\n\n".join(filter(None, asked)))
    answer = Message("assistant", _text("output", _column(row, "output")))
    return [*([Message("system", system)] if system else []), question, answer]


_READERS: Mapping[Form, Callable[[Mapping[str, Any]], Sequence[Message]]] = {
    "messages": _messages_form,
    "sharegpt": _sharegpt_form,
    "prompt": _prompt_form,
    "alpaca": _alpaca_form,
}
