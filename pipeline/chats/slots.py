"""Where the contents of a conversation stand in its rendering.

The conversation is rendered once more with sentinels in place of its contents. What comes out is the skeleton: what the
template writes by itself. The real rendering must be skeleton and contents, interleaved; a template may trim contents.
Where it is not, contents are looked for one at a time, with the others as they are.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from xtoken.pipeline.chats.conversation import Conversation, Message, thinking_in
from xtoken.pipeline.chats.refused import Refused
from xtoken.pipeline.chats.template import ChatTemplate

# ``marker``: what opens and closes reasoning; it is taught where reasoning is.
Kind = Literal["text", "template", "system", "user", "result", "assistant", "thinking", "marker", "call", "stop"]
_KINDS: dict[str, Kind] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "result"}


@dataclass(frozen=True)
class Slot:
    """A content of a conversation, by the index of its message."""

    kind: Kind
    message: int
    text: str

    @property
    def key(self) -> tuple[Kind, int, int]:
        """Kind, message, and part 0: contents have one."""
        return self.kind, self.message, 0


@dataclass(frozen=True)
class Found:
    """Characters ``start`` to ``end`` of a rendering that are a content, or what the template made of it.

    Attributes:
        kind, message, part: whose; the part is the index of a call, else 0.
        start, end: where.
        rewritten: it is not the content, trimmed or not; nobody learns from it.
    """

    kind: Kind
    message: int
    part: int
    start: int
    end: int
    rewritten: bool = False


def slots_of(conversation: Conversation) -> list[Slot]:
    """The contents of a conversation, in order; reasoning before its answer. Blank reasoning is none."""
    slots = []
    for at, message in enumerate(conversation.messages):
        thinking = thinking_in(message)
        reasoning = thinking.text if thinking else message.reasoning
        if reasoning is not None and reasoning.strip():
            slots.append(Slot("thinking", at, reasoning))
        slots.append(Slot(_KINDS[message.role], at, thinking.answer if thinking else message.content))
    return slots


def find_contents(conversation: Conversation, template: ChatTemplate, rendering: str) -> list[Found]:
    """The contents that a rendering holds, in the order in which they stand there; the others are absent.

    Args:
        conversation: what was rendered.
        template: rendered it.
        rendering: the result.

    Raises:
        Refused: the template writes contents in a way that cannot be told apart, or fails on the skeleton.
    """
    slots = slots_of(conversation)
    sentinels = _sentinels(conversation, template, rendering, len(slots))
    everything = range(len(slots))
    filled = [at for at in everything if slots[at].text]
    # An empty content has a place, too; but many templates ask whether there is one.
    for chosen in [everything, filled] if len(filled) < len(slots) else [filled]:
        found = _try(conversation, template, rendering, slots, sentinels, chosen)
        if found is not None:
            return found
    return _one_by_one(conversation, template, rendering, slots, sentinels)


def _sentinels(conversation: Conversation, template: ChatTemplate, rendering: str, count: int) -> list[str]:
    """Words that occur nowhere else: no template changes them, and none is part of another."""
    texts = [rendering, *template.sources.values(), *map(repr, conversation.messages), *conversation.tools]
    number = next(n for n in range(1 << 30) if not any(f"Qz{n}q" in text for text in texts))
    return [f"Qz{number}q{at}Z" for at in range(count)]


def _try(
    conversation: Conversation,
    template: ChatTemplate,
    rendering: str,
    slots: Sequence[Slot],
    sentinels: Sequence[str],
    chosen: Collection[int],
) -> list[Found] | None:
    """The chosen contents, if the rendering is the skeleton with them in it; None otherwise, or without a skeleton."""
    try:
        skeleton = template.render(with_texts(conversation, {slots[at].key: sentinels[at] for at in chosen}))
    except Refused:
        return None
    pieces, order = _pieces(skeleton, sentinels, chosen)
    places = _interleaved(rendering, pieces, [slots[at].text for at in order])
    if places is None:
        return None
    return [Found(slots[at].kind, slots[at].message, 0, *place) for at, place in zip(order, places, strict=True)]


def with_texts(conversation: Conversation, texts: Mapping[tuple[Kind, int, int], str]) -> Conversation:
    """The conversation with these contents, by kind and message; an answer keeps the marks of its reasoning."""
    given = {(message, kind == "thinking"): text for (kind, message, _), text in texts.items()}
    return replace(
        conversation,
        messages=tuple(
            _filled(message, given.get((at, True)), given.get((at, False)))
            for at, message in enumerate(conversation.messages)
        ),
    )


def _filled(message: Message, reasoning: str | None, content: str | None) -> Message:
    thinking = thinking_in(message)
    if thinking is None:
        return replace(
            message,
            content=message.content if content is None else content,
            reasoning=message.reasoning if reasoning is None else reasoning,
        )
    inside = thinking.text if reasoning is None else reasoning
    return replace(
        message,
        content=thinking.opening + inside + thinking.closing + (thinking.answer if content is None else content),
    )


def _pieces(skeleton: str, sentinels: Sequence[str], chosen: Collection[int]) -> tuple[list[str], list[int]]:
    """What stands before, between and after the sentinels, and whose they are."""
    words = "|".join(re.escape(sentinels[at]) for at in chosen)
    parts = re.split(f"({words})", skeleton) if words else [skeleton]
    return parts[::2], [sentinels.index(word) for word in parts[1::2]]


def _interleaved(rendering: str, pieces: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each text stands if the rendering is pieces and texts, as they are or trimmed, in turn; else None."""
    if not rendering.startswith(pieces[0]):
        return None
    # behind each piece, every place that can be reached: where the text before it began and ended
    reached: list[dict[int, tuple[int, int]]] = [{len(pieces[0]): (0, 0)}]
    for piece, text in zip(pieces[1:], texts, strict=True):
        ends: dict[int, tuple[int, int]] = {}
        for start in reached[-1]:
            for form in _forms(text):
                end = start + len(form)
                if rendering.startswith(form, start) and rendering.startswith(piece, end):
                    ends.setdefault(end + len(piece), (start, end))
        reached.append(ends)
    at, places = len(rendering), []
    for ends in reached[:0:-1]:
        if at not in ends:
            return None
        places.append(ends[at])
        at = ends[at][0]
    return places[::-1] if at in reached[0] else None


def _forms(text: str) -> dict[str, None]:
    """A content as it is, and as templates trim it: blanks or line ends, on one side or both."""
    blanks = (text, text.strip(), text.lstrip(), text.rstrip())
    return dict.fromkeys([*blanks, text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")])


def _one_by_one(
    conversation: Conversation,
    template: ChatTemplate,
    rendering: str,
    slots: Sequence[Slot],
    sentinels: Sequence[str],
) -> list[Found]:
    """Each content by a skeleton in which all others are real; what is not there as it is was rewritten."""
    found: list[Found] = []
    for at, slot in enumerate(slots):
        alone = _try(conversation, template, rendering, slots, sentinels, [at])
        if alone is not None:
            found += alone
        elif slot.text:
            found += _rewritten(conversation, template, rendering, slots, sentinels, at)
    found.sort(key=lambda one: (one.start, one.end, one.message))
    for one, following in pairwise(found):
        if following.start < one.end:
            raise Refused(
                "contents that cannot be told apart",
                f"the chat template rewrites message {one.message if one.rewritten else following.message} and what "
                "stands around it",
                "leave such conversations out, or give another template with --template",
            )
    return found


def _rewritten(
    conversation: Conversation,
    template: ChatTemplate,
    rendering: str,
    slots: Sequence[Slot],
    sentinels: Sequence[str],
    at: int,
) -> list[Found]:
    """What the template made of a content: all that differs from the rendering with a sentinel in its place."""
    skeleton = template.render(with_texts(conversation, {slots[at].key: sentinels[at]}))
    first, last = common_start(skeleton, rendering), common_start(skeleton[::-1], rendering[::-1])
    start, end = first, max(first, len(rendering) - last)
    return [Found(slots[at].kind, slots[at].message, 0, start, end, rewritten=True)] if end > start else []


def common_start(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the common start of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
