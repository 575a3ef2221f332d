"""Conversations where text is asked for: said as such, with the way out."""

from collections.abc import Sequence
from typing import Any

# Keys of a message, as hubs have them: OpenAI's, ShareGPT's, and others'.
_KEYS = {"role", "content", "from", "value", "speaker", "user", "assistant", "human", "gpt", "bot"}
_COLUMNS = {"messages", "conversation", "conversations", "dialog", "dialogue", "dialogues", "chat", "turns", "chosen"}
_PAIRS = [("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response")]
_PAIRS += [("question", "answer"), ("query", "response"), ("inputs", "targets")]
CHAT_WAY_OUT = (
    "precompute reads conversations: leave --text-field out where the columns are messages, conversations, prompt and "
    "completion, or instruction and output, or say which with --form; other columns are to be renamed to those"
)


def is_conversation(value: Any) -> bool:
    """Whether a JSON value is a message, or a list of messages."""
    if isinstance(value, list):
        return bool(value) and is_conversation(value[0])
    return isinstance(value, dict) and has_message_keys(list(value))


def has_message_keys(keys: Sequence[str]) -> bool:
    """Whether fields of these names make a message: who says, and what."""
    return len(_KEYS.intersection(key.lower() for key in keys)) >= 2


def chat_columns(names: Sequence[str]) -> list[str]:
    """Which of a record's fields hold a conversation, by their names; none if nothing looks so."""
    lower = {name.lower(): name for name in names}
    matching = [lower[name] for name in lower if name in _COLUMNS]
    for pair in _PAIRS:
        if lower.keys() >= set(pair):
            matching += [lower[name] for name in pair]
    return list(dict.fromkeys(matching))
