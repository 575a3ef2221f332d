"""Conversations of a corpus as samples of one teacher: which form they have, how they are rendered, what is left out.

Shapes: T teacher tokens of a sample, R rows, those of taught tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.plan import PLAN_FILE, load_plan
from xtoken.pipeline.chats import (
    FORMS,
    TOO_LONG,
    ChatModel,
    ChatTokens,
    Conversation,
    Form,
    Refused,
    fit,
    from_json,
    open_chat_model,
    samples_of,
    span_columns,
    to_json,
)
from xtoken.pipeline.corpus import Corpus, Document
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.pipeline.store.writer import Sample
from xtoken.pipeline.teachers.base import TeacherRows, chosen_rows
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.base import flag, leaves
from xtoken.schemas.configs.capture import ChatGroup, CorpusForm, PrecomputeConfig, RowsConfig
from xtoken.schemas.errors import XtokenError


def form_of_run(config: PrecomputeConfig, folder: Folder) -> CorpusForm:
    """What the corpus holds: as the run's plan says; without one, as the settings or the corpus's columns do.

    Raises:
        XtokenError: there is no corpus; or a setting of conversations, and it holds text; or the other way round.
    """
    plan = load_plan(folder) if folder.exists(PLAN_FILE) else None
    form = plan.form if plan is not None else Corpus(config.corpus).form or "text"
    if form == "text":
        _refuse_unused(config.chat)
    elif config.teacher.bos != "auto":
        raise XtokenError(
            f"--bos {config.teacher.bos} is for text: of conversations the chat template says whether BOS comes first; "
            "leave it out, or change the template with --template"
        )
    return form


def _refuse_unused(chat: ChatGroup) -> None:
    for leaf in leaves(ChatGroup):
        value = getattr(chat, leaf.name)
        if value != leaf.field.get_default(call_default_factory=True):
            shown = ",".join(value) if isinstance(value, list) else value
            raise XtokenError(
                f"--{flag(leaf.name, leaf.field)} {shown} is for conversations, and the corpus holds text; leave it "
                f"out, or say with --form how conversations lie in the corpus ({', '.join(FORMS)})"
            )


def form_words(corpus: Corpus) -> str | None:
    """What a run says of what it found in the corpus; None where there is nothing to say."""
    form, columns = corpus.form, corpus.columns
    others = [name for name in FORMS if name != form and _has(name, columns)]
    if form is None:
        return f"the corpus is read as text; its columns hold {others[0]} too, see --form" if others else None
    also = f" (its columns would also do for {', '.join(others)}; --form takes another)" if others else ""
    return f"the corpus holds conversations, form {form}{also}"


def _has(form: Form, columns: Sequence[str]) -> bool:
    from xtoken.pipeline.chats import form_of

    return form_of([name for name in columns if form_of([name]) == form]) == form


@dataclass(frozen=True, eq=False)
class ChatPiece:
    """A sample of a conversation.

    Attributes:
        sample_id: the document's id, ``#``, and 0 or the message of ``--turns each``.
        tokens: what the teacher is shown.
        conversation: what was rendered.
        complete: nothing was cut off.
        size: its share of the document's bytes.
    """

    sample_id: str
    tokens: ChatTokens
    conversation: Conversation
    complete: bool
    size: int

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 [T]."""
        return self.tokens.ids


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


@dataclass(frozen=True)
class Chat:
    """How a run makes samples of conversations.

    Attributes:
        model: the teacher's template and tokenizer.
        info: what the manifest says of it.
        max_tokens: most of a sample.
        stops: whether a conversation that the template refuses ends the run.
    """

    model: ChatModel
    info: CaptureChat
    max_tokens: int
    stops: bool

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
        chat, date = config.chat, date or plan_date(config)
        if form == "text":
            return None
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
            long=chat.long if chat.turns == "all" else "skip",
        )
        return cls(model, info, config.codec.max_tokens, config.corpus.on_bad == "stop")

    @property
    def settings(self) -> dict[str, Any]:
        """What run.json holds beside the settings themselves."""
        return {"template_hash": self.info.template}

    def pieces(self, documents: Iterable[Document]) -> ChatPieces:
        """Samples of some documents, in order.

        Raises:
            StopRun: a conversation cannot be rendered, under ``--on-bad stop``.
        """
        made = ChatPieces()
        for document in documents:
            try:
                turns = samples_of(from_json(document.text), self.info.turns)
            except Refused as refused:
                made.left_out.append(self._left_out(document.id, refused))
                continue
            for turn in turns:
                sample_id = document.id + (turn.suffix or "#0")
                try:
                    kept, tokens = fit(turn.conversation, self._encode, self.max_tokens, self.info.long)
                except Refused as refused:
                    made.left_out.append(self._left_out(sample_id, refused))
                    continue
                whole = len(kept.messages) == len(turn.conversation.messages)
                size = document.text_bytes // len(turns)
                made.pieces.append(ChatPiece(sample_id, tokens, kept, whole, size))
        return made

    def _encode(self, conversation: Conversation) -> ChatTokens:
        return self.model.encode(conversation, cast(Any, self.info.learn))

    def _left_out(self, sample_id: str, refused: Refused) -> LeftOut:
        """What is counted; a conversation that is too long is nobody's mistake."""
        if self.stops and refused.reason != TOO_LONG:
            raise StopRun(
                f"conversation {sample_id!r}: {refused}, or run the same command with --on-bad skip, which counts it "
                "and goes on with what is committed"
            )
        return LeftOut(sample_id, refused.reason, refused.detail)

    def sequences(self, documents: Iterable[Document]) -> Iterator[NDArray[np.int32]]:
        """int32 [R] of each sample: the tokens that rows will be about."""
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
            messages=to_json(piece.conversation) if text else None,
        )


def plan_date(config: RowsConfig) -> str:
    """The day that templates are told in a new plan: the one asked for, else today (UTC)."""
    return config.chat.date or datetime.now(UTC).date().isoformat()
