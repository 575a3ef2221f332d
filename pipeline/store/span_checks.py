"""What must hold of the spans of conversations.

Shapes: N samples of one batch, T teacher tokens, G spans of all of them together.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.columns import any_per_sample, flat, list_lengths, refuse
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import SPAN_COLUMNS

_CONTENTS = ("text", "system", "user", "result", "assistant", "thinking", "call")
_NO_BYTES = ("template", "marker", "stop")
_TAUGHT = ("text", "assistant", "thinking", "marker", "call", "stop")


def check_spans(batch: pa.RecordBatch, tokens_N: NDArray[np.int64]) -> None:
    """Check the spans of samples whose tokens and byte ends are known to fit each other.

    Args:
        batch: with ``SPAN_COLUMNS`` and ``messages``.
        tokens_N: tokens of each sample, at least one.

    Raises:
        VerificationError: a sample breaks a rule; the message names it and the rule.
    """
    spans_N = list_lengths(batch, SPAN_COLUMNS[0])
    refuse(batch, spans_N == 0, "it has no spans")
    for name in SPAN_COLUMNS[1:]:
        refuse(batch, list_lengths(batch, name) != spans_N, f"{name} has another length than {SPAN_COLUMNS[0]}")
    kind_G = flat(batch, "span_kind")
    refuse(batch, any_per_sample(~np.isin(kind_G, (*_CONTENTS, *_NO_BYTES)), spans_N), "span_kind is unknown")
    starts_N, stops_N = np.cumsum(tokens_N) - tokens_N, np.cumsum(tokens_N)
    end_T = flat(batch, "teacher_end").astype(np.int64)
    token_end_G = _ends(batch, "span_token_end", spans_N, tokens_N)
    byte_end_G = _ends(batch, "span_byte_end", spans_N, end_T[stops_N - 1])
    at_G = np.repeat(starts_N, spans_N) + token_end_G - 1
    reached_G = np.where(token_end_G > 0, end_T[np.maximum(at_G, 0)], 0)
    refuse(batch, any_per_sample(reached_G != byte_end_G, spans_N), "a span ends where none of its tokens does")
    width_G = byte_end_G - _before(byte_end_G, spans_N)
    refuse(batch, any_per_sample(np.isin(kind_G, _NO_BYTES) & (width_G > 0), spans_N), "a template's span has bytes")
    _check_learned(batch, kind_G, token_end_G, spans_N)
    _check_messages(batch, kind_G, spans_N)


def token_ends_fit(batch: pa.RecordBatch, tokens_N: NDArray[np.int64]) -> bool:
    """Whether ``xtoken.schemas.spans`` may read a batch: spans end where tokens do, the last where the sample does."""
    spans_N = list_lengths(batch, "span_learn")
    try:
        refuse(batch, (spans_N == 0) | (list_lengths(batch, "span_token_end") != spans_N), "spans do not fit")
        _ends(batch, "span_token_end", spans_N, tokens_N)
    except VerificationError:
        return False
    return True


def _ends(batch: pa.RecordBatch, name: str, spans_N: NDArray[np.int64], last_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """A column of ends [G], which rise from 0 to ``last_N``."""
    end_G: NDArray[np.int64] = flat(batch, name).astype(np.int64)
    refuse(batch, any_per_sample(end_G < _before(end_G, spans_N), spans_N), f"{name} decreases")
    refuse(batch, end_G[np.cumsum(spans_N) - 1] != last_N, f"the last {name} is not the end of the sample")
    return end_G


def _before(end_G: NDArray[np.int64], spans_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The end of the span before each, 0 for a sample's first [G]."""
    before_G: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), end_G[:-1]])
    before_G[np.cumsum(spans_N) - spans_N] = 0
    return before_G


def _check_learned(
    batch: pa.RecordBatch, kind_G: NDArray[Any], token_end_G: NDArray[np.int64], spans_N: NDArray[np.int64]
) -> None:
    learn_G = flat(batch, "span_learn")
    refuse(batch, any_per_sample(learn_G & ~np.isin(kind_G, _TAUGHT), spans_N), "a span is taught that nobody answers")
    tokens_G = token_end_G - _before(token_end_G, spans_N)
    first_G = (_before(token_end_G, spans_N) == 0) & (tokens_G > 0)
    refuse(batch, any_per_sample(learn_G & first_G, spans_N), "the first token is taught, which nothing predicts")
    taught_N = np.add.reduceat(learn_G & (tokens_G > 0), np.cumsum(spans_N) - spans_N)
    refuse(batch, taught_N == 0, "nothing of it is taught")


def _check_messages(batch: pa.RecordBatch, kind_G: NDArray[Any], spans_N: NDArray[np.int64]) -> None:
    message_G, part_G = flat(batch, "span_message"), flat(batch, "span_part")
    refuse(
        batch,
        any_per_sample((message_G < 0) != (kind_G == "template"), spans_N),
        "a template's span has a message, or another has none",
    )
    refuse(batch, any_per_sample((message_G < -1) | (part_G < 0), spans_N), "span_message or span_part is negative")
    count_N = np.array([_count(text) for text in batch["messages"].to_pylist()], np.int64)
    beyond_G = message_G >= np.repeat(count_N, spans_N)
    refuse(batch, count_N < 0, "messages is not the JSON of a conversation")
    refuse(batch, any_per_sample(beyond_G, spans_N), "span_message is beyond the messages")


def _count(messages: str | None) -> int:
    """Messages of a conversation; -1 where it is none, and more than any where it was left out."""
    if messages is None:
        return np.iinfo(np.int64).max
    try:
        value = json.loads(messages)
    except (ValueError, RecursionError):
        return -1
    found = value.get("messages") if isinstance(value, dict) else None
    return len(found) if isinstance(found, list) else -1
