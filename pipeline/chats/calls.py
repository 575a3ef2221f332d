"""Where the tool calls of a conversation stand in its rendering: by renderings with one call less."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise

from xtoken.pipeline.chats.conversation import Conversation
from xtoken.pipeline.chats.refused import Refused
from xtoken.pipeline.chats.slots import Found, common_start
from xtoken.pipeline.chats.template import ChatTemplate


def find_calls(
    conversation: Conversation,
    template: ChatTemplate,
    rendering: str,
    contents: Sequence[Found],
    markers: Collection[str],
    stops: Collection[str],
) -> list[Found]:
    """The calls that a rendering holds, each from its opening to its closing marker, without blanks around; in order.

    Args:
        conversation: what was rendered.
        template: rendered it.
        rendering: the result.
        contents: from ``find_contents``.
        markers: added tokens that the template writes; a call begins and ends with a whole one.
        stops: those that end an answer, and so a call.
    """
    atoms = re.compile("|".join([*map(re.escape, sorted(markers, key=len, reverse=True)), "."]), re.DOTALL)
    found = []
    for at, message in enumerate(conversation.messages):
        if not message.calls:
            continue
        start = max((one.end for one in contents if one.message <= at), default=0)
        limit = min((one.start for one in contents if one.message > at and one.start >= start), default=len(rendering))
        texts = _texts(conversation, template, at, atoms)
        for part, (call, text) in enumerate(zip(message.calls, texts, strict=True)):
            for stop in stops:
                text = text.partition(stop)[0]
            text = text.strip()
            begin = rendering.find(text, start, limit) if call.name in text else -1
            if begin >= 0:
                start = begin + len(text)
                found.append(Found("call", at, part, begin, start))
    return found


def _texts(conversation: Conversation, template: ChatTemplate, at: int, atoms: re.Pattern[str]) -> list[str]:
    """What each call of a message adds to the rendering; of the message's last ones nothing if the template fails."""
    try:
        steps = _steps(conversation, template, at)
    except Refused:  # results without their call, or a call without its result
        try:
            steps = _steps(conversation.cut(at + 1), template, at)
        except Refused:
            return [""] * len(conversation.messages[at].calls)
    split = [atoms.findall(step) for step in steps]
    starts = [common_start(before, after) for before, after in pairwise(split)]
    last, before = split[-1], split[-2]
    same = min(common_start(last[::-1], before[::-1]), len(last) - starts[-1], len(before) - starts[-1])
    return ["".join(last[start:end]) for start, end in zip(starts, [*starts[1:], len(last) - same], strict=True)]


def _steps(conversation: Conversation, template: ChatTemplate, at: int) -> list[str]:
    """Renderings with the first 0, 1, ... and all calls of a message."""
    messages, calls = conversation.messages, conversation.messages[at].calls
    return [
        template.render(
            replace(
                conversation,
                messages=(*messages[:at], replace(messages[at], calls=calls[:count]), *messages[at + 1 :]),
            )
        )
        for count in range(len(calls) + 1)
    ]
