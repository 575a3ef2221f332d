"""A rendered conversation as a list of spans, which are the rendering when they are joined."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from xtoken.pipeline.chats.calls import find_calls
from xtoken.pipeline.chats.conversation import Conversation
from xtoken.pipeline.chats.refused import Refused, shown
from xtoken.pipeline.chats.slots import Found, Kind, find_contents, slots_of
from xtoken.pipeline.chats.template import ChatTemplate

_OPENING, _CLOSING = re.compile(r"<think>\s*\Z"), re.compile(r"\A\s*</think>\s*")
Key = tuple[Kind, int, int]  # kind, message, part


@dataclass(frozen=True)
class TextSpan:
    """A stretch of a rendering.

    Attributes:
        kind: what it is; stops are still part of the template.
        message: index of its message; -1 for the template.
        part: index of the call; 0 opens and 1 closes reasoning; else 0.
        text: it.
        plain: text of which nothing is a control token: contents, and what a template made of one.
    """

    kind: Kind
    message: int
    part: int
    text: str
    plain: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation as one model's template writes it.

    Attributes:
        text: the rendering.
        spans: in order; their texts joined are ``text``.
        absent: kind, message and part of what the rendering does not have, or not as it is.
        trimmed: of contents that it has without the blanks at their ends.
    """

    text: str
    spans: tuple[TextSpan, ...]
    absent: tuple[Key, ...]
    trimmed: tuple[Key, ...]


def render_spans(
    conversation: Conversation, template: ChatTemplate, markers: Collection[str], stops: Collection[str]
) -> Rendered:
    """Render a conversation and find what of it the template wrote, and what it was given.

    Args:
        conversation: what to render.
        template: the model's.
        markers: the added tokens that the template writes.
        stops: those that end an answer.

    Raises:
        Refused: the template refuses the conversation, or its contents cannot be told apart in the rendering; or a tool
            or call holds a marker, which could not be told from the template's own.
    """
    _refuse_markers(conversation, markers)
    text = template.render(conversation)
    contents = find_contents(conversation, template, text)
    found = [*contents, *find_calls(conversation, template, text, contents, markers, stops)]
    found.sort(key=lambda one: (one.start, one.end, one.message, one.part))
    _refuse_repeated(found)
    wanted: dict[Key, str] = {slot.key: slot.text for slot in slots_of(conversation)}
    calls: list[Key] = [
        ("call", at, part) for at, one in enumerate(conversation.messages) for part in range(len(one.calls))
    ]
    there = {(one.kind, one.message, one.part): text[one.start : one.end] for one in found if not one.rewritten}
    return Rendered(
        text,
        tuple(_with_marks(_spans(text, found), opened=template.opens_thinking)),
        tuple(key for key in (*(key for key, one in wanted.items() if one), *calls) if key not in there),
        tuple(key for key, one in there.items() if one != wanted.get(key, one)),
    )


def _refuse_markers(conversation: Conversation, markers: Collection[str]) -> None:
    """Refuse control tokens where a template writes what it is given in between its own words."""
    given = [("a tool", tool) for tool in conversation.tools]
    for message in conversation.messages:
        given += [
            ("a tool call", text) for call in message.calls for text in (call.name, call.arguments, call.id or "")
        ]
        given += [("a tool's name or id", text) for text in (message.name, message.call_id) if text]
    for what, text in given:
        held = [marker for marker in markers if marker in text]
        if held:
            raise Refused(
                "control token in a tool or call",
                f"{what} holds {held[0]!r}: {shown(text)}",
                "leave it out there: as part of the template it would steer the model",
            )


def _refuse_repeated(found: Sequence[Found]) -> None:
    counts = Counter((one.kind, one.message, one.part) for one in found)
    for (kind, message, _), count in counts.items():
        if count > 1 and kind in ("assistant", "thinking", "call"):
            raise Refused(
                "answer written twice",
                f"the chat template writes message {message} {count} times",
                "give another template with --template",
            )


def _spans(text: str, found: Sequence[Found]) -> list[TextSpan]:
    spans, at = [], 0
    for one in found:
        spans.append(TextSpan("template", -1, 0, text[at : one.start], False))
        inside = text[one.start : one.end]
        if one.rewritten:
            spans.append(TextSpan("template", -1, 0, inside, True))
        else:
            spans.append(TextSpan(one.kind, one.message, one.part, inside, one.kind != "call"))
        at = one.end
    spans.append(TextSpan("template", -1, 0, text[at:], False))
    return [span for span in spans if span.text or span.kind != "template"]


def _with_marks(spans: Sequence[TextSpan], *, opened: bool) -> list[TextSpan]:
    """The same with what opens and closes reasoning as spans of their own; ``opened``: the prompt opens it."""
    cut: list[TextSpan] = []
    for at, span in enumerate(spans):
        before, after = spans[at - 1] if at else None, spans[at + 1] if at + 1 < len(spans) else None
        pieces = [span]
        if span.kind == "template" and not span.plain:
            if before is not None and before.kind == "thinking":
                pieces = _split(span, _CLOSING, before.message, 1)
            if after is not None and after.kind == "thinking" and not opened:
                pieces = [*pieces[:-1], *_split(pieces[-1], _OPENING, after.message, 0)]
        cut += pieces
    return cut


def _split(span: TextSpan, mark: re.Pattern[str], message: int, part: int) -> list[TextSpan]:
    found = mark.search(span.text) if span.kind == "template" else None
    if found is None:
        return [span]
    texts = (span.text[: found.start()], found[0], span.text[found.end() :])
    kinds: tuple[tuple[Kind, int, int], ...] = (("template", -1, 0), ("marker", message, part), ("template", -1, 0))
    return [TextSpan(*kind, text, False) for kind, text in zip(kinds, texts, strict=True) if text]
