"""A held-out sample, tokenized by whoever calls: the trainer never tokenizes text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class TaughtSpan(NamedTuple):
    """A stretch of a conversation that is taught.

    Attributes:
        kind: ``assistant``, ``thinking``, ``call``, ``stop`` or another of ``xtoken.schemas.tables``' spans.
        start, stop: its tokens.
        size: bytes of its text; a stop has none.
    """

    kind: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Question:
    """What a student is asked to answer.

    Attributes:
        ids: int32, the conversation up to an answer, and what asks for it, as the student's template writes them.
        text: the same as text.
        answer: what the conversation has there.
        stop: the token with which the template ends an answer; None: with none.
    """

    ids: NDArray[np.int32]
    text: str
    answer: str
    stop: int | None = None


@dataclass(frozen=True)
class EvalSample:
    """Tokens of one held-out window, or of one conversation.

    Attributes:
        ids: int32 [S], without BOS; of a conversation all that its template writes.
        text_bytes: bytes of the text all tokens stand for; of a conversation those that are taught.
        first_token_bytes: bytes of the first token, which is not predicted where a student has no context token.
        id: name of the window, unique among the samples; what rows of several runs are paired by.
        source: where its document comes from; empty = not known.
        taught: of a conversation, what counts of it; None: plain text, all of which counts.
        question: of a conversation, what is asked for completions.
    """

    ids: NDArray[np.int32]
    text_bytes: int
    first_token_bytes: int
    id: str = ""
    source: str = ""
    taught: Sequence[TaughtSpan] | None = None
    question: Question | None = None
