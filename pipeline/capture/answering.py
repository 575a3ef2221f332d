"""The teacher writes the answers: prompts of a corpus, what is asked of the engine, and its answers as samples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.conversations import Chat, ChatPiece, ChatPieces
from xtoken.pipeline.chats import TOO_LONG, ChatTokens, Conversation, Refused, from_json, with_answer
from xtoken.pipeline.corpus import Document
from xtoken.pipeline.teachers.base import Question
from xtoken.schemas.chat import Answering

BYTES_PER_TOKEN = 4  # of an answer that is yet to be written, roughly


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one answer is for.

    Attributes:
        sample_id: the document's id, ``#``, the index of the message that the answer becomes, ``.`` and its number.
        conversation: it.
        tokens: of the whole prompt.
        size: its share of the document's bytes.
    """

    sample_id: str
    conversation: Conversation
    tokens: ChatTokens
    size: int


def prompts_of(chat: Chat, documents: Iterable[Document]) -> tuple[list[Prompt], ChatPieces]:
    """The prompts of some documents, one for each answer, in order; and what cannot be asked.

    Raises:
        StopRun: a conversation cannot be rendered, under ``--on-bad stop``.
    """
    prompts, made, answering = list[Prompt](), ChatPieces(), _answering(chat)
    for document in documents:
        try:
            conversation = from_json(document.text)
            tokens = _asked(chat, conversation, answering.tokens)
        except Refused as refused:
            made.left_out.append(chat.left_out(document.id, refused))
            continue
        for number in range(answering.samples):
            sample_id = f"{document.id}#{len(conversation.messages)}.{number}"
            prompts.append(Prompt(sample_id, conversation, tokens, document.text_bytes // answering.samples))
    return prompts, made


def _answering(chat: Chat) -> Answering:
    assert chat.info.answering is not None, "asked of runs that say --generate"
    return chat.info.answering


def _asked(chat: Chat, conversation: Conversation, answer: int) -> ChatTokens:
    last = conversation.messages[-1]
    if last.role not in ("user", "tool"):
        raise Refused(
            "it does not end with a question",
            f"its last message is {last.role!r}, and --generate answers a user or a tool",
            "leave its last message out",
        )
    tokens = chat.model.encode_prompt(conversation)
    if len(tokens) + answer > chat.max_tokens:
        raise Refused(
            TOO_LONG,
            f"it has {len(tokens):,} tokens, and with --generate {answer} more than --max-tokens {chat.max_tokens:,}",
            "raise --max-tokens",
        )
    return tokens


def question(chat: Chat, prompt: Prompt) -> Question:
    """What the engine is asked; the seed follows from the run's and the sample's id."""
    asked = _answering(chat)
    seed = int.from_bytes(sha256(f"{asked.seed}:{prompt.sample_id}".encode()).digest()[:8], "little") >> 1
    stops = tuple(sorted(chat.model.stops))
    return Question(prompt.tokens.ids, asked.tokens, asked.temperature, asked.top_p, seed, stops)


def answered(chat: Chat, prompts: Sequence[Prompt], answers: Sequence[NDArray[np.int32]]) -> ChatPieces:
    """Prompts with their answers as samples; an answer that no message can hold is left out by name."""
    made = ChatPieces()
    learn = cast(Any, chat.info.learn)
    for prompt, ids in zip(prompts, answers, strict=True):
        try:
            conversation, tokens = with_answer(chat.model, prompt.conversation, prompt.tokens, ids, learn)
        except Refused as refused:
            made.left_out.append(chat.skipped(prompt.sample_id, refused))
            continue
        whole = any(span.kind == "stop" and span.learn for span in tokens.spans)
        made.pieces.append(ChatPiece(prompt.sample_id, tokens, conversation, whole, prompt.size))
    return made
