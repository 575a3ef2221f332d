"""Conversations of a corpus as samples of one teacher: how they are rendered, what is left out.

Shapes: T teacher tokens of a sample, R rows, those of taught tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.token_ids import teacher_of_ids
from xtoken.pipeline.chats import (
    TOO_LONG,
    ChatModel,
    ChatTokens,
    Conversation,
    NoTemplate,
    Refused,
    TokenRow,
    fit,
    from_json,
    open_chat_model,
    open_ids_model,
    pair,
    retold,
    samples_of,
    shared_parts,
    span_columns,
    to_json,
    tokens_of,
)
from xtoken.pipeline.corpus import Document
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.files import StopRun
from xtoken.pipeline.store.writer import Sample
from xtoken.pipeline.teachers.base import TeacherRows, chosen_rows
from xtoken.schemas.chat import Answering, CaptureChat
from xtoken.schemas.configs.capture import CorpusForm, RowsConfig
from xtoken.schemas.errors import XtokenError


@dataclass(frozen=True, eq=False)
class ChatPiece:
    """A sample of a conversation, or of token ids.

    Attributes:
        sample_id: the document's id, ``#``, and 0 or the message of ``--turns each``.
        tokens: what the teacher is shown.
        conversation: what was rendered; None of token ids.
        complete: nothing was cut off.
        size: its share of the document's bytes.
    """

    sample_id: str
    tokens: ChatTokens
    conversation: Conversation | None
    complete: bool
    size: int

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 [T]."""
        return self.tokens.ids

    @property
    def ends(self) -> NDArray[np.int32]:
        """int32 [T], bytes of the text up to each token's end."""
        return self.tokens.ends

    @property
    def text(self) -> str:
        """Its byte axis."""
        return self.tokens.text


@dataclass(frozen=True)
class LeftOut:
    """A sample, or a whole document, that the teacher cannot be shown; a line of skipped.jsonl."""

    sample_id: str
    reason: str
    detail: str


@dataclass
class ChatPieces:
    """What became of some documents."""

    pieces: list[ChatPiece] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Figures for a commit record."""
        tokens = [piece.tokens for piece in self.pieces]
        counts = Counter(
            conversations_skipped=len(self.left_out),
            conversations_cut=sum(not piece.complete for piece in self.pieces),
            turns=sum(len(one.message_ends) for one in tokens),
            tokenized_apart=sum(one.differs for one in tokens),
        )
        for one in tokens:
            counts.update(f"trimmed_{kind}" for kind, _, _ in one.trimmed)
            counts.update(f"absent_{kind}" for kind, _, _ in one.absent)
            for span in one.spans:
                if span.learn:
                    counts[f"taught_{span.kind}"] += span.token_end - span.token_start
        return +counts


def _answering(config: RowsConfig) -> Answering | None:
    chat = config.chat
    if chat.generate is None:
        return None
    return Answering(
        tokens=chat.generate,
        temperature=chat.temperature,
        top_p=chat.top_p,
        samples=chat.samples,
        seed=config.codec.seed,
    )


def _student(asked: str, date: str) -> ChatModel:
    """An intended student, which has its own template or none: ``--template`` is the teacher's."""
    try:
        return open_chat_model(asked, date=datetime.fromisoformat(date))
    except NoTemplate as error:
        raise XtokenError(
            f"--student {asked} has no chat template; leave --student out: align is given a template with the student"
        ) from error


@dataclass(frozen=True)
class Chat:
    """How a run makes samples of conversations.

    Attributes:
        model: the teacher's template and tokenizer; of token ids it renders nothing.
        info: what the manifest says of it.
        max_tokens: most of a sample.
        stops: whether a conversation that the template refuses ends the run.
        student: the same of an intended student; None where there is none.
    """

    model: ChatModel
    info: CaptureChat
    max_tokens: int
    stops: bool
    student: ChatModel | None = None

    @classmethod
    def of(cls, config: RowsConfig, form: CorpusForm, date: str | None = None) -> "Chat | None":
        """Of a run's settings; None for text.

        Args:
            config: of the run.
            form: of the corpus.
            date: ISO 8601, of the plan; before there is one, a day that stands for it.

        Raises:
            XtokenError: the teacher has no chat template, or its tokenizer cannot be loaded.
        """
        asked, stops = getattr(config, "student", None), config.corpus.on_bad == "stop"
        if form == "text":
            return None
        if form == "ids":
            model, info = teacher_of_ids(config)
            student = None if asked is None else open_ids_model(asked)
            return cls(model, info, config.codec.max_tokens, stops, student)
        chat, date = config.chat, date or plan_date(config, form)
        assert date is not None, "conversations have a date"
        model = open_chat_model(
            config.teacher.teacher,
            revision=config.teacher.revision,
            template=chat.template,
            arguments=chat.arguments,
            date=datetime.fromisoformat(date),
        )
        info = CaptureChat(
            template=model.template.sha256,
            date=date,
            arguments=chat.arguments,
            learn=chat.learned,
            stop_token=model.stop_token,
            form=form,
            turns=chat.turns,
            long=chat.long if chat.turns == "all" and chat.generate is None else "skip",
            answering=_answering(config),
        )
        student = None if asked is None else _student(asked, date)
        return cls(model, info, config.codec.max_tokens, stops, student)

    @property
    def settings(self) -> dict[str, Any]:
        """What run.json holds beside the settings themselves."""
        if self.info.template is None:
            return {}
        student = {} if self.student is None else {"student_template_hash": self.student.template.sha256}
        seed = {} if self.info.answering is None else {"answer_seed": self.info.answering.seed}
        return {"template_hash": self.info.template, **student, **seed}

    def pieces(self, documents: Iterable[Document]) -> ChatPieces:
        """Samples of some documents, in order.

        Raises:
            StopRun: a conversation cannot be rendered, under ``--on-bad stop``.
        """
        made = ChatPieces()
        for document in documents:
            if self.info.form == "ids":
                self._take_ids(document, made)
            else:
                self._take_conversation(document, made)
        return made

    def _take_conversation(self, document: Document, made: ChatPieces) -> None:
        try:
            turns = samples_of(from_json(document.text), self.info.turns)
        except Refused as refused:
            made.left_out.append(self.left_out(document.id, refused))
            return
        for turn in turns:
            sample_id = document.id + (turn.suffix or "#0")
            try:
                kept, tokens = fit(turn.conversation, self._encode, self.max_tokens, self.info.long)
            except Refused as refused:
                made.left_out.append(self.left_out(sample_id, refused))
                continue
            whole = len(kept.messages) == len(turn.conversation.messages)
            size = document.text_bytes // len(turns)
            made.pieces.append(ChatPiece(sample_id, tokens, kept, whole, size))

    def _take_ids(self, document: Document, made: ChatPieces) -> None:
        sample_id, row = f"{document.id}#0", TokenRow.from_json(document.text)
        try:
            if len(row.ids) > self.max_tokens:
                sizes = f"it has {len(row.ids):,} tokens, --max-tokens is {self.max_tokens:,}"
                raise Refused(TOO_LONG, f"{sizes}, and token ids are not cut", "raise --max-tokens")
            tokens = tokens_of(self.model, row)
        except Refused as refused:
            made.left_out.append(self.left_out(sample_id, refused))
            return
        made.pieces.append(ChatPiece(sample_id, tokens, None, complete=True, size=document.text_bytes))

    def _encode(self, conversation: Conversation) -> ChatTokens:
        return self.model.encode(conversation, cast(Any, self.info.learn))

    def left_out(self, sample_id: str, refused: Refused) -> LeftOut:
        """What is counted; a conversation that is too long is nobody's mistake."""
        if self.stops and refused.reason != TOO_LONG:
            raise StopRun(
                f"conversation {sample_id!r}: {refused}, or run the same command with --on-bad skip, which counts it "
                "and goes on with what is committed"
            )
        return self.skipped(sample_id, refused)

    @staticmethod
    def skipped(sample_id: str, refused: Refused) -> LeftOut:
        """The record of a sample that is left out."""
        return LeftOut(sample_id, refused.reason, refused.detail)

    def counts(self, made: ChatPieces) -> Counter[str]:
        """Figures for a commit record, with those of how an intended student's spans meet the teacher's."""
        counts = made.counts
        if self.student is not None:
            for piece in made.pieces:
                counts.update(student_counts(piece.tokens, self._read_by(self.student, piece)))
        return counts

    def _read_by(self, student: ChatModel, piece: ChatPiece) -> ChatTokens | None:
        """A sample as an intended student reads it; None where it cannot."""
        try:
            if piece.conversation is None:
                return retold(student, piece.tokens, self.model.tokenizer.table.info.hash)
            return student.encode(piece.conversation, cast(Any, self.info.learn))
        except Refused:
            return None

    def sequences(self, documents: Iterable[Document]) -> Iterator[NDArray[np.int32]]:
        """int32 [R] of each sample: the tokens that rows will be about."""
        if self.info.answering is not None:  # nothing is answered yet
            for document in documents:
                with suppress(Refused):
                    yield self.model.encode_prompt(from_json(document.text)).ids
            return
        for piece in self.pieces(documents).pieces:
            yield piece.ids[piece.tokens.learn]

    def sample(self, piece: ChatPiece, rows: TeacherRows, codec: Codec, vocab_size: int, *, text: bool) -> Sample:
        """One row of the capture.

        Args:
            piece: the sample.
            rows: of all its tokens but the first.
            codec: packs those of taught tokens.
            vocab_size: of the tokenizer.
            text: whether the text is stored, and so the messages.
        """
        tokens = piece.tokens
        taught = chosen_rows(rows, np.flatnonzero(tokens.learn) - 1)
        return Sample(
            sample_id=piece.sample_id,
            text=tokens.text if text else None,
            teacher_ids=tokens.ids,
            teacher_end=tokens.ends,
            packed=codec.encode(taught, vocab_size),
            realised_logprob=taught.target_logprob,
            space_logprob=taught.space_logprob,
            first_row=1,
            complete=piece.complete,
            snapped=tokens.snapped,
            spans=span_columns(tokens.spans),
            messages=to_json(piece.conversation) if text and piece.conversation is not None else None,
        )


def student_counts(teacher: ChatTokens, tokens: ChatTokens | None) -> Counter[str]:
    """Chunks of the taught spans that both sides have, those of one token on both, and what is lost.

    Args:
        teacher: the sample as the teacher reads it.
        tokens: as a student does; None: it cannot.
    """
    if tokens is None:
        return Counter(student_refused=1)
    pairing = pair(teacher, tokens)
    counts = Counter(student_tokens=len(tokens), student_snapped=int(tokens.snapped), student_lost=len(pairing.lost))
    for match in pairing.matches:
        if match.taught:
            mine, theirs = shared_parts(match, tokens.ends, teacher.ends)
            chunks, single = chunk_counts(mine.ends, theirs.ends)
            counts.update(chunks=chunks, chunks_1_1=single)
    return counts


def chunk_counts(left: NDArray[np.int32], right: NDArray[np.int32]) -> tuple[int, int]:
    """Chunks between byte ends both sides share, and how many hold exactly one token of each."""
    shared = np.intersect1d(left, right)
    tokens = [np.diff(np.searchsorted(ends, shared, side="right"), prepend=0) for ends in (left, right)]
    return len(shared), int(((tokens[0] == 1) & (tokens[1] == 1)).sum())


def plan_date(config: RowsConfig, form: CorpusForm) -> str | None:
    """The day that templates are told in a new plan: the one asked for, else today (UTC); None where nothing is
    rendered, so that the same corpus is the same plan on every day."""
    if form in ("text", "ids"):
        return None
    return config.chat.date or datetime.now(UTC).date().isoformat()
