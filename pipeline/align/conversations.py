"""Captures of conversations: each as the student's template renders it, and chunks of what both renderings share. Of
token ids, which have no messages, the student reads what is stored of the teacher's side.

Chunks lie within a span that both have, and end where both have a token end, counted in bytes from the span's start; a
stop, and other spans without bytes, are one chunk. Whatever lies between is a gap.

Shapes: N samples, S student tokens, T teacher tokens, C chunks, M pairs of spans, all samples of a batch together.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import Chunks, Joined, offsets_of
from xtoken.pipeline.align.encoding import Refusal
from xtoken.pipeline.align.kernels import boundaries_batch
from xtoken.pipeline.chats import (
    ChatModel,
    ChatTokens,
    Conversation,
    Pairing,
    Part,
    Refused,
    Span,
    end_of,
    from_json,
    learned,
    on_axis,
    open_chat_model,
    open_ids_model,
    pair,
    retold,
    shared_parts,
    spans_of,
)
from xtoken.pipeline.chats.pairing import Spanned
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.tokens import Encoded
from xtoken.schemas.chat import CaptureChat, ChatInfo
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import SPAN_COLUMNS

COLUMNS = ("sample_id", "text", "messages", *SPAN_COLUMNS)
IDS_COLUMNS = (*COLUMNS, "teacher_ids", "teacher_end")


@dataclass(frozen=True, eq=False)
class Stored:
    """A sample as a capture has it: the byte axis, and the teacher's spans."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """A sample as both models read it: the teacher's spans, the student's tokens, and what they share."""

    stored: Spanned
    tokens: ChatTokens
    pairing: Pairing

    @property
    def taught_bytes(self) -> int:
        """Bytes that the teacher teaches."""
        return sum(span.byte_end - span.byte_start for span in self.stored.spans if span.learn)


def stored_conversation(row: dict[str, Any]) -> tuple[Conversation, Stored]:
    """A sample's conversation, and the sample as the teacher's template writes it.

    Args:
        row: its ``COLUMNS``.

    Raises:
        VerificationError: what is stored is no conversation.
    """
    try:
        stored = Stored(row["text"], spans_of({name: row[name] for name in SPAN_COLUMNS}))
        _refuse_cut(stored)
        return from_json(row["messages"]), stored
    except (Refused, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"sample {row['sample_id']!r}: its messages and spans are no conversation ({error}); 'xtoken verify' on "
            "the capture lists what is damaged"
        ) from error


def told(row: dict[str, Any]) -> str:
    """What of a sample's ``COLUMNS`` decides a student's tokens: its messages, or, of token ids, text and spans."""
    messages: str | None = row["messages"]
    if messages is not None:
        return messages
    return json.dumps([row[name] for name in COLUMNS if name not in ("sample_id", "span_token_end")])


def stored_ids(row: dict[str, Any]) -> ChatTokens:
    """A sample of token ids as the teacher read it.

    Args:
        row: its ``IDS_COLUMNS``.

    Raises:
        VerificationError: its spans do not fit its text.
    """
    try:
        spans = spans_of({name: row[name] for name in SPAN_COLUMNS})
        ids, ends = (np.array(row[name], np.int32) for name in ("teacher_ids", "teacher_end"))
        stored = ChatTokens(row["text"], ids, ends, learned(spans), spans, (), (), snapped=False, differs=False)
        _refuse_cut(stored)
        return stored
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"sample {row['sample_id']!r}: its spans do not fit its tokens ({error}); 'xtoken verify' on the capture "
            "lists what is damaged"
        ) from error


def _refuse_cut(stored: Spanned) -> None:
    """Raise UnicodeDecodeError for a span that begins or ends within a character."""
    data = stored.text.encode()
    for span in stored.spans:
        data[span.byte_start : span.byte_end].decode()


@dataclass(frozen=True)
class ChatStudent:
    """The student's side of the conversations of one capture.

    Attributes:
        model: its template and tokenizer; of token ids it renders nothing.
        info: what the targets' manifest says of it.
        generated: the teacher wrote the last message of each, and may have been cut in it; one that it ended is
            complete, whether its stop was recorded or not.
        teacher: of token ids, the hash of the teacher's tokenizer.
    """

    model: ChatModel
    info: ChatInfo
    generated: bool = False
    teacher: str | None = None

    @classmethod
    def open(
        cls, student: str, template: str | None, arguments: Mapping[str, Any], capture: CaptureChat, teacher: str
    ) -> "ChatStudent":
        """Load it; what is taught, and the date that templates are told, are those of the capture.

        Args:
            student: model or tokenizer.
            template: file that counts instead of the student's own template.
            arguments: further variables of the template.
            capture: what its manifest says of conversations.
            teacher: hash of the teacher's tokenizer.

        Raises:
            XtokenError: the student has no template, or it cannot be loaded.
        """
        if capture.template is None:
            model = open_ids_model(student)
            ids = ChatInfo(template=None, date=None, learn=capture.learn, stop_token=end_of(model))
            return cls(model, ids, teacher=teacher)
        assert capture.date is not None, "what is rendered has a date"
        date = datetime.fromisoformat(capture.date)
        model = open_chat_model(student, template=template, arguments=arguments, date=date)
        info = ChatInfo(
            template=model.template.sha256,
            date=capture.date,
            arguments=dict(arguments),
            learn=capture.learn,
            stop_token=model.stop_token,
        )
        return cls(model, info, generated=capture.answering is not None)

    def read(self, batch: pa.RecordBatch) -> list[Reading | Refusal]:
        """Every sample of a batch as the student reads it, or why it cannot."""
        return [self.read_one(row) for row in batch.select(list(self.columns)).to_pylist()]

    @property
    def columns(self) -> tuple[str, ...]:
        """What of a capture decides a reading."""
        if self.generated:
            return (*COLUMNS, "complete")
        return COLUMNS if self.teacher is None else IDS_COLUMNS

    def read_one(self, row: dict[str, Any]) -> Reading | Refusal:
        """One sample.

        Args:
            row: its ``columns``.

        Raises:
            VerificationError: what is stored of it is no conversation.
        """
        try:
            if self.teacher is not None:
                ids = stored_ids(row)
                tokens = retold(self.model, ids, self.teacher)
                return Reading(ids, tokens, pair(ids, tokens))
            conversation, stored = stored_conversation(row)
            tokens = self.model.encode(conversation, self.info.learn)
        except Refused as refused:
            return Refusal(refused.reason, f"{refused.detail}; {refused.fix}")
        if self.generated and not row["complete"]:
            tokens = _cut_as(stored, tokens, len(conversation.messages) - 1)
        return Reading(stored, tokens, pair(stored, tokens))


def _cut_as(stored: Stored, tokens: ChatTokens, message: int) -> ChatTokens:
    """The student's tokens of an answer that the teacher was cut in: its own template ends every answer, and a student
    must not learn to end one there.

    Args:
        stored: the teacher's.
        tokens: the student's.
        message: the answer.
    """
    stop, closing = ("stop", message, 0), ("marker", message, 1)
    theirs = {span.key for span in stored.spans}
    if stop in theirs:
        return tokens
    spans = tuple(
        replace(span, learn=False) if span.key in (stop, closing) and span.key not in theirs else span
        for span in tokens.spans
    )
    return replace(tokens, learn=learned(spans), spans=spans)


def join_conversations(batch: pa.RecordBatch, readings: Sequence[Reading | Refusal]) -> list[Joined]:
    """Chunks of each conversation that the student can read.

    Args:
        batch: columns of ``CaptureParts.read``.
        readings: of each sample.
    """
    known = [(at, one) for at, one in enumerate(readings) if isinstance(one, Reading)]
    teacher_N = _each(batch, "teacher_end")
    matches = [(n, match) for n, (_, one) in enumerate(known) for match in one.pairing.matches if match.taught]
    parts = [shared_parts(match, known[n][1].tokens.ends, teacher_N[known[n][0]]) for n, match in matches]
    chunk_N, starts, ends = _cut_spans(parts, np.array([n for n, _ in matches], np.int64), len(known))
    met_N = Counter[int]()
    for (n, match), (_, theirs) in zip(matches, parts, strict=True):
        met_N[n] += int(theirs.ends[-1]) if match.size and len(theirs.ends) else 0
    joined = []
    for n, (at, one) in enumerate(known):
        span = slice(chunk_N[n], chunk_N[n + 1])
        tokens = one.tokens
        chunks = with_gaps(starts[:, span], ends[:, span], (len(tokens), len(teacher_N[at])))
        mine = Encoded(one.stored.text, tokens.ids, on_axis(one.pairing, tokens.ends), tokens.snapped)
        joined.append(Joined(at, mine, chunks, tokens.learn, one.taught_bytes - met_N[n]))
    return joined


def _each(batch: pa.RecordBatch, name: str) -> list[NDArray[np.int32]]:
    return np.split(flat(batch, name), np.cumsum(list_lengths(batch, name))[:-1])


def _cut_spans(
    parts: Sequence[tuple[Part, Part]], sample_M: NDArray[np.int64], samples: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Chunks of all pairs of spans, the student's part and the teacher's of each: where each sample's start [N + 1],
    and the first token and the one after the last, of the student's and of the teacher's tokens of the sample, [2, C]
    each."""
    sides = [[pair[side] for pair in parts] for side in (0, 1)]
    ends, sizes = ([[one.ends for one in side] for side in sides], [[len(one.ends) for one in side] for side in sides])
    empty, no_M = np.zeros(0, np.int32), np.zeros(len(parts), np.bool_)
    offset_M, s_end_C, t_end_C, lead_M, decreasing = boundaries_batch(
        np.concatenate([empty, *ends[0]]),
        offsets_of(sizes[0]),
        np.concatenate([empty, *ends[1]]),
        offsets_of(sizes[1]),
        no_M,
        no_M,
    )
    assert decreasing < 0, f"byte ends of tokens from {parts[decreasing]} on decrease within their span"
    end_C = np.stack([s_end_C, t_end_C]).astype(np.int64)
    start_C = np.concatenate([np.zeros((2, 1), np.int64), end_C], axis=1)[:, :-1]
    start_C[:, offset_M[:-1][np.diff(offset_M) > 0]] = 0
    match_C = np.repeat(np.arange(len(parts)), np.diff(offset_M))
    first_M = np.array([[one.first for one in side] for side in sides], np.int64).reshape(2, -1)
    # tokens of no bytes that a span begins with are no chunk: they join the gap before the next one
    kept_C = np.ones(len(match_C), np.bool_)
    kept_C[offset_M[:-1][lead_M]] = False
    chunk_N = np.searchsorted(sample_M[match_C[kept_C]], np.arange(samples + 1))
    return chunk_N, (start_C + first_M[:, match_C])[:, kept_C], (end_C + first_M[:, match_C])[:, kept_C]


def with_gaps(starts: NDArray[np.int64], ends: NDArray[np.int64], tokens: tuple[int, int]) -> Chunks:
    """Chunks with a target, and gaps of what lies before, between and behind them.

    Args:
        starts, ends: of the chunks with a target, [2, C]: the student's tokens and the teacher's.
        tokens: how many either side has.
    """
    all_ = np.array(tokens, np.int64)[:, None]
    before = np.concatenate([starts, all_], axis=1)  # a gap ends where the next chunk starts, or with the sample
    gap = (before > np.concatenate([np.zeros_like(all_), ends], axis=1)).any(axis=0)
    both = np.stack([before, np.concatenate([ends, all_], axis=1)], axis=2).reshape(2, -1)
    is_gap = np.tile([True, False], before.shape[1])
    there = np.stack([gap, np.arange(len(gap)) < len(gap) - 1], axis=1).ravel()
    student, teacher = both[:, there].astype(np.int32)
    return Chunks(student, teacher, is_gap[there])


def conversation_counts(readings: Sequence[Reading | Refusal], samples: Sequence[Joined]) -> Counter[str]:
    """For ``Part.counts``, each ``chat_``: ``taught_bytes`` of the teacher's and ``chunk_bytes`` of them in chunks;
    spans ``lost_KIND_REASON``, which the teacher teaches and the student cannot have, and ``alone_KIND``, which the
    student learns from its own text; its tokens ``learn_tokens``, those of them without a target ``ce_only_tokens``;
    and samples whose rendering, tokenized at once, has other tokens (``tokens_differ``)."""
    found: Counter[str] = Counter()
    for one in readings:
        if isinstance(one, Reading):
            found.update(_counts(one))
    for sample in samples:
        assert sample.learn is not None
        tokens_C = np.diff(sample.chunks.student_end, prepend=0)
        found["chunk_bytes"] -= sample.lost_bytes
        found["ce_only_tokens"] += int((sample.learn & np.repeat(sample.chunks.gap, tokens_C)).sum())
    return Counter({f"chat_{name}": count for name, count in sorted(found.items())})


def _counts(reading: Reading) -> Counter[str]:
    found = Counter(f"lost_{key[0]}_{reason.replace(' ', '_')}" for key, reason in reading.pairing.lost)
    found.update(f"alone_{key[0]}" for key in reading.pairing.alone)
    found["taught_bytes"] += reading.taught_bytes
    found["chunk_bytes"] += reading.taught_bytes
    found["learn_tokens"] += int(reading.tokens.learn.sum())
    found["tokens_differ"] += int(reading.tokens.differs)
    return found
