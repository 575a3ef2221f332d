"""Samples of an API trace: a conversation with its one answer taught, a scored conversation, or plain text.

Shapes: T tokens of a sample, P of its prompt, R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats import (
    LEARNED,
    TOO_LONG,
    ChatModel,
    ChatTokens,
    Conversation,
    Refused,
    TokenRow,
    read_row,
    tokens_of,
    with_answer,
)
from xtoken.pipeline.chats.refused import shown
from xtoken.pipeline.imports.api_trace_choices import Answer, Exchange, ScoredPrompt
from xtoken.pipeline.imports.api_trace_rows import TraceRow
from xtoken.pipeline.imports.api_trace_tokens import TokenIds
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut
from xtoken.pipeline.tokens.failures import CannotTokenize


@dataclass(frozen=True)
class SampleMaker:
    """How lines become samples.

    Attributes:
        model: the tokenizer, and the chat template if there is one.
        spelling: what its ids spell.
        tokens: bytes to ids.
        scored: lines hold scored prompts, not answers.
        form: messages: conversations; ids: control tokens and text told apart; text.
        max_tokens: of a sample.
    """

    model: ChatModel
    spelling: Spelling
    tokens: TokenIds
    scored: bool
    form: str
    max_tokens: int

    def samples(self, exchange: Exchange, name: str) -> Iterator[ImportedSample | LeftOut]:
        """Those of a line, in order.

        Args:
            exchange: the line.
            name: of the line; a sample's ends with the number of its choice.

        Raises:
            XtokenError: the line is damaged.
        """
        if exchange.scored != self.scored:
            kinds = ("answers", "a scored prompt")
            yield _left_out(
                f"{name}.0", Refused("another kind of trace", f"it has {kinds[exchange.scored]}", "import apart")
            )
        elif self.scored:
            yield self._made(f"{name}.0", exchange, exchange.prompt())
        else:
            for at, answer in exchange.answers():
                yield self._made(f"{name}.{at}", exchange, answer)

    def _made(self, name: str, exchange: Exchange, found: Answer | ScoredPrompt | Refused) -> ImportedSample | LeftOut:
        try:
            if isinstance(found, Refused):
                raise found
            if isinstance(found, ScoredPrompt):
                return self._scored(name, exchange, found)
            return self._answer(name, exchange, found)
        except Refused as refused:
            return _left_out(name, refused)

    def _asked(self, exchange: Exchange) -> Conversation:
        """The conversation of the request.

        Raises:
            Refused: it is not there, or none.
        """
        if exchange.messages is None:
            raise Refused("no messages", "the line has no request.messages, as the first line has", "import it apart")
        return read_row({"messages": exchange.messages, "tools": exchange.request.get("tools")}, "messages")

    def _answer(self, name: str, exchange: Exchange, answer: Answer) -> ImportedSample:
        ids = self.tokens.answer(answer.rows) if answer.ids is None else answer.ids
        self._refuse_foreign(ids)
        self._refuse_other_text(answer, ids)
        if self.form != "messages":
            return self._text(name, ids, answer.rows[: len(ids)], 0, complete=answer.complete)
        asked = self._asked(exchange)
        prompt = self.model.encode_prompt(asked)
        conversation, tokens = with_answer(self.model, asked, prompt, np.array(ids, np.int32), LEARNED)
        taught = [answer.rows[at] for at in (np.flatnonzero(tokens.learn) - len(prompt)).tolist()]
        return self._sample(
            name, tokens.ids, taught, 1, complete=answer.complete, chat=tokens, conversation=conversation
        )

    def _refuse_foreign(self, ids: Sequence[int]) -> None:
        table = self.model.tokenizer.table
        if foreign := [token for token in ids if token >= table.size or table.role[token] == "hole"]:
            what = f"id {foreign[0]} is none of the {table.size} tokens of {table.info.name}"
            raise Refused("an id that is no token", what, "name the model's own tokenizer")

    def _refuse_other_text(self, answer: Answer, ids: Sequence[int]) -> None:
        """Raise Refused where the tokens are not those of the text that the server shows."""
        text = self.tokens.text(ids)
        for shown_text in (answer.reasoning, answer.content):
            if shown_text and len(ids) == len(answer.rows) and shown_text.strip().encode() not in text:
                what = f"the server shows {shown(shown_text)}, its tokens are {shown(text.decode(errors='replace'))}"
                raise Refused("the tokens are another text", what, "name the model's own tokenizer")

    def _conversation(self, name: str, exchange: Exchange, found: ScoredPrompt) -> ImportedSample:
        conversation = self._asked(exchange)
        tokens = self.model.encode(conversation)
        skip = int(found.headless)
        scored = found.ids[: len(tokens) - skip]
        if tokens.ids[skip:].tolist() != scored:
            at = next(
                (at for at, pair in enumerate(zip(tokens.ids[skip:], scored, strict=False)) if pair[0] != pair[1]),
                len(scored),
            )
            what = (
                f"the tokenizer's chat template writes other tokens than the server scored, from token {at + skip} on"
            )
            raise Refused("another rendering", what, "name the tokenizer, with its template, that the server had")
        taught = [found.rows[at] for at in (np.flatnonzero(tokens.learn) - 1).tolist()]
        return self._sample(name, tokens.ids, taught, 1, complete=True, chat=tokens, conversation=conversation)

    def _scored(self, name: str, exchange: Exchange, found: ScoredPrompt) -> ImportedSample:
        if self.form == "messages":
            return self._conversation(name, exchange, found)
        ids = self._with_head(found, exchange.request.get("prompt")) if found.headless else found.ids
        first = len(ids) - len(found.rows)  # 0 where nobody knows what stands before all rows
        info = self.model.tokenizer.table.info
        lead = (
            next((at for at, token in enumerate(ids) if token != info.bos_id), len(ids))
            if info.bos_id is not None
            else 0
        )
        rows = found.rows[max(0, lead - first) :]
        if not rows:
            raise Refused("no rows", f"the prompt has {len(ids)} tokens, {lead} of them BOS", "remove it")
        complete = info.eos_id is not None and ids[-1] == info.eos_id
        return self._text(name, ids[lead:], rows, len(ids) - lead - len(rows), complete=complete)

    def _text(
        self, name: str, ids: Sequence[int], rows: Sequence[TraceRow], first_row: int, *, complete: bool
    ) -> ImportedSample:
        """A sample of text, or of ids, cut to the limit."""
        self._refuse_foreign(ids)
        ids_T = np.array(ids[: self.max_tokens], np.int32)
        complete = complete and len(ids_T) == len(ids)
        if not complete:
            ids_T = ids_T[: self.spelling.whole_characters(ids_T)]
        rows = rows[: len(ids_T) - first_row]
        if self.form == "text" or not len(rows):
            return self._sample(name, ids_T, rows, first_row, complete=complete)
        # nothing of the sample stands before its first token
        chat = tokens_of(self.model, TokenRow(tuple(ids_T.tolist()), (False, *[True] * (len(ids_T) - 1))))
        taught = [rows[at - first_row] for at in np.flatnonzero(chat.learn).tolist()]
        return self._sample(name, ids_T, taught, 1, complete=complete, chat=chat)

    def _with_head(self, found: ScoredPrompt, asked: Any) -> list[int]:
        """A prompt's tokens with the first one, which no row names, where the request's text has the others."""
        if isinstance(asked, str):
            try:
                ids: list[int] = self.model.tokenizer.encode(asked, "start").ids.tolist()
            except (CannotTokenize, UnicodeEncodeError):
                return found.ids
            if ids[1:] == found.ids:
                return ids
        return found.ids

    def _sample(
        self,
        name: str,
        ids: NDArray[np.int32],
        rows: Sequence[TraceRow],
        first_row: int,
        *,
        complete: bool,
        chat: ChatTokens | None = None,
        conversation: Conversation | None = None,
    ) -> ImportedSample:
        if len(ids) > self.max_tokens:
            sizes = f"it has {len(ids):,} tokens, --max-tokens is {self.max_tokens:,}"
            raise Refused(TOO_LONG, f"{sizes}, and conversations are not cut", "raise --max-tokens")
        if not len(rows):
            raise Refused("no rows", "nothing that is taught has any", "remove it")
        offsets, entry_ids, entry_logprob = self._entries(rows)
        return ImportedSample(
            name=name,
            ids=ids,
            first_row=first_row,
            offsets=offsets,
            entry_ids=entry_ids,
            entry_logprob=entry_logprob,
            label_logprob=np.array([row.logprob for row in rows], np.float64),
            label_rank=np.array([row.rank for row in rows], np.int32),
            complete=complete,
            chat=chat,
            conversation=conversation,
        )

    def _entries(self, rows: Sequence[TraceRow]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
        """Offsets [R + 1], ids and log-probabilities of all rows; none of a row whose entries are no tokens."""
        ids, logprob, offsets = list[int](), list[float](), [0]
        for row in rows:
            for token, value in row.entries if row.whole else ():
                if (found := self.tokens.entry(token)) is not None:
                    ids.append(found)
                    logprob.append(value)
            offsets.append(len(ids))
        return np.array(offsets, np.int64), np.array(ids, np.int32), np.array(logprob, np.float64)


def _left_out(name: str, refused: Refused) -> LeftOut:
    return LeftOut(name, refused.reason, f"{refused.detail}; {refused.fix}")
