"""Which answers of a conversation one sample teaches, and what is left of one that is too long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from xtoken.pipeline.chats.conversation import Conversation, require_taught
from xtoken.pipeline.chats.refused import Refused

Turns = Literal["all", "last", "each"]
Long = Literal["cut", "skip"]
TOO_LONG = "longer than --max-tokens"  # why a conversation is refused that is no fault of it


@dataclass(frozen=True)
class Turn:
    """One sample of a conversation.

    Attributes:
        conversation: up to the last answer that it teaches; nothing learns from what follows.
        suffix: for the sample's id, where a conversation gives several: ``#`` and the index of the message.
    """

    conversation: Conversation
    suffix: str = ""


def samples_of(conversation: Conversation, turns: Turns) -> list[Turn]:
    """The samples of a conversation.

    ``all``: one that teaches every answer. ``last``: one that teaches the last. ``each``: one for every answer, with
    the messages before it as they were when it was given, which is right for templates that drop earlier reasoning.

    Raises:
        Refused: nothing of it is taught.
    """
    require_taught(conversation)
    taught = conversation.taught
    if turns == "each":
        return [Turn(conversation.cut(at + 1).only([at]), f"#{at}") for at in taught]
    upto = conversation.cut(taught[-1] + 1)
    return [Turn(upto if turns == "all" else upto.only(taught[-1:]))]


def kept_messages(ends: Sequence[tuple[int, int]], limit: int) -> int | None:
    """How many messages of a conversation that is too long can stay; None if not one taught one fits.

    Args:
        ends: for every taught message that a rendering has, in order, the number of messages up to and with it, and
            the number of tokens up to its end.
        limit: the tokens that a sample may have.
    """
    fitting = [count for count, tokens in ends if tokens <= limit]
    return fitting[-1] if fitting else None


class Sized(Protocol):
    """What was made of a conversation: how many tokens it has, and where its taught messages end."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    @property
    def message_ends(self) -> list[tuple[int, int]]:
        """See ``kept_messages``."""
        ...


S = TypeVar("S", bound=Sized)


def fit(
    conversation: Conversation, encode: Callable[[Conversation], S], limit: int, long: Long
) -> tuple[Conversation, S]:
    """Encode a conversation within a number of tokens.

    Whole messages are dropped from the end until it fits, so that it ends with a taught one. What is left is rendered
    again: without what followed, a template may write it otherwise.

    Args:
        conversation: of a sample of ``turns="all"``; with ``last`` and ``each`` only ``long="skip"`` makes sense.
        encode: renders and tokenizes.
        limit: tokens.
        long: ``cut`` or ``skip``.

    Raises:
        Refused: it does not fit; or what ``encode`` raises.
    """
    encoded = encode(conversation)
    size = len(encoded)
    while len(encoded) > limit:
        ends = [end for end in encoded.message_ends if end[0] < len(conversation.messages)]
        count = kept_messages(ends, limit) if long == "cut" else None
        if count is None:
            kept = "not one answer would be left of it" if long == "cut" else "--long skip leaves such samples out"
            raise Refused(
                TOO_LONG,
                f"it has {size:,} tokens, --max-tokens is {limit:,}, and {kept}",
                "raise --max-tokens, or say --long cut" if long == "skip" else "raise --max-tokens",
            )
        conversation = conversation.cut(count)
        encoded = encode(conversation)
    return conversation, encoded
