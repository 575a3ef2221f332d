"""Reader of DistillKit's sets: what a row of a file holds as documents, or as a conversation.

Row j of a row of the file predicts id j + 1. Sampled files have one id more than rows; the last may be a pad token that
the sampler appended. Packed ones have as many ids as rows: the last id of each document is lost, and what its last row
predicts is not in the file, so that row is dropped.

Shapes: N ids and M rows in a row of the file, K entries of each, T tokens and R rows of a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.chats import Refused, TokenRow, tokens_of
from xtoken.pipeline.imports.conversations import Chats
from xtoken.pipeline.imports.distillkit_rows import FileRow, RowDecoder
from xtoken.pipeline.imports.documents import Border, Spelling, by_mask, by_token
from xtoken.pipeline.imports.parquet_rows import (
    BadRow,
    ParquetRows,
)
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice, Source
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError


@dataclass(frozen=True, eq=False)
class DistillKitReader:
    """See ``xtoken.pipeline.imports.samples.Reader``.

    Attributes:
        borders: of documents that a token separates, how many were seen, and behind how many stands a token that the
            row before does not list, as it should be where another document begins.
    """

    source: Source
    config: ImportConfig
    spelling: Spelling
    rows: ParquetRows
    decoder: RowDecoder
    chats: Chats | None = None
    shift: int = 0
    borders: list[int] = field(default_factory=lambda: [0, 0])

    def slices(self) -> Sequence[Slice]:
        """See ``Reader``."""
        return self.rows.slices(self.config.part_bytes)

    def moved(self, by: int) -> Reader | None:
        """See ``Reader``: nothing but raw top k leaves doubt."""
        return replace(self, shift=self.shift + by) if self.decoder.variant == "raw top k" else None

    def read(self, wanted: Slice) -> Iterator[ImportedSample | LeftOut]:
        """See ``Reader``."""
        name = self.rows.files[wanted.file].name
        for first, batch in self.rows.read(wanted):
            for row in range(batch.num_rows):
                place = f"{name}:{first + row}"
                try:
                    yield from self._samples(place, batch, row)
                except BadRow as bad:
                    if self.config.on_bad == "stop":
                        raise
                    yield LeftOut(place, bad.reason, bad.detail)

    def _samples(self, place: str, batch: pa.RecordBatch, row: int) -> Iterator[ImportedSample | LeftOut]:
        found = self.decoded(batch, row, place)
        if self.chats is None or self.chats.info.template is None:
            yield from self._documents(place, found)
            return
        try:
            yield self._rendered(f"{place}.0", batch["messages"][row].as_py(), found)
        except Refused as refused:
            yield LeftOut(f"{place}.0", refused.reason, refused.detail)

    def _rendered(self, name: str, messages: Any, row: FileRow) -> ImportedSample | LeftOut:
        """A row with its conversation: what the template writes must be the ids, but for BOS in front."""
        assert self.chats is not None
        conversation, chat = self.chats.rendered(messages)
        mine, theirs = (self._leading_bos(ids) for ids in (chat.ids, row.ids))
        wanted = chat.ids[mine:]
        if not np.array_equal(row.ids[theirs : theirs + len(wanted)], wanted):
            return LeftOut(
                name, "a conversation of other ids", "they are not what the template writes, or the row was cut"
            )
        at_R = np.flatnonzero(chat.learn) + theirs - mine - 1 - self.shift
        made = self._sample(name, chat.ids, 1, at_R, row, complete=True)
        return replace(made, chat=chat, conversation=conversation)

    def _leading_bos(self, ids: NDArray[Any]) -> int:
        other = np.flatnonzero(ids != self.spelling.table.info.bos_id)
        return int(other[0]) if len(other) else len(ids)

    def _documents(self, place: str, row: FileRow) -> Iterator[ImportedSample | LeftOut]:
        cut = len(row.ids) == len(row.logprob)
        for number, border in enumerate(self._borders(place, row)):
            name = f"{place}.{number}"
            self._see_border(row, border.stop)
            ids = row.ids[border.start : border.stop]
            if not self.spelling.known(ids):
                bad = int(ids[~self._is_known(ids)][0])
                yield LeftOut(
                    name,
                    "an id that is no token",
                    f"id {bad} is none of {self.config.tokenizer}'s {self.spelling.table.size}",
                )
                continue
            yield self._document(name, ids.astype(np.int32), row, border.start, cut=cut)

    def _see_border(self, row: FileRow, stop: int) -> None:
        if self.config.documents in ("bos", "eos") and stop < len(row.ids) and stop <= len(row.entry_ids):
            self.borders[0] += 1
            self.borders[1] += bool((row.entry_ids[stop - 1] != row.ids[stop]).all())

    @property
    def findings(self) -> tuple[str, ...]:
        """What was seen while rows were looked at, a sentence each."""
        seen, unlisted = self.borders
        if not seen:
            return ()
        return (
            f"Behind {unlisted} of {seen} borders of documents stands a token that the row before does not list; where "
            "it does, the border may be none.",
        )

    def _is_known(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        inside = (ids >= 0) & (ids < self.spelling.table.size)
        inside[inside] = self.spelling.valid[ids[inside]]
        return inside

    def _borders(self, place: str, row: FileRow) -> list[Border]:
        ids, mask, info = row.ids, row.mask, self.spelling.table.info
        how = self.config.documents
        numbered = mask is not None and len(np.unique(mask[mask > 0])) > 1
        if how == "mask" or (how == "auto" and numbered):
            if mask is None:
                raise BadRow(place, "no attention_mask", "the row has none", "split with --documents bos or eos")
            return list(by_mask(mask))
        stop = len(ids) if mask is None else int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        ids = ids[:stop]
        if how in ("bos", "eos"):
            token = info.bos_id if how == "bos" else info.eos_id
            if token is None:
                raise XtokenError(f"--documents {how}: {self.config.tokenizer} has no such token; use another way")
            return list(by_token(ids, token, opens=how == "bos"))
        if len(row.ids) == len(row.logprob) and self._has_border(ids):
            raise BadRow(
                place,
                "several documents without a mask",
                "the row is packed, and its attention_mask does not number its documents",
                "say what separates them: --documents bos or --documents eos",
            )
        return [Border(0, stop)] if stop else []

    def _has_border(self, ids: NDArray[np.int64]) -> bool:
        info = self.spelling.table.info
        inner = ids[:-1]
        if info.bos_id is not None and bool((ids[1:][ids[:-1] != info.bos_id] == info.bos_id).any()):
            return True
        return info.eos_id is not None and info.eos_id != info.bos_id and bool((inner == info.eos_id).any())

    def _document(
        self, name: str, ids: NDArray[np.int32], row: FileRow, start: int, *, cut: bool
    ) -> ImportedSample | LeftOut:
        """One document of a row of the file; ``cut``: the id behind its last is not in the file."""
        table, limit = self.spelling.table, self.config.max_tokens
        shown = 0
        while shown < len(ids) and ids[shown] == table.info.bos_id:
            shown += 1
        stop, complete = len(ids), False
        if not cut and stop > shown + 1 and table.role[int(ids[-1])] == "pad":
            # what the sampler appended: the last row stands behind the last token of the document
            eos = table.info.eos_id
            ids, complete = ids.copy(), eos is not None and self.chats is None
            if eos is not None and complete:
                ids[-1] = eos
            else:
                stop -= 1
        elif stop and int(ids[stop - 1]) == table.info.eos_id:
            complete = True
        if stop - shown > limit:
            stop, complete = shown + limit, False
        if not complete:
            stop = shown + self.spelling.whole_characters(ids[shown:stop])
        first_row = 0 if shown else 1
        tokens = ids[shown:stop]
        # token i of the row is predicted by row i - 1 (- shift)
        predicted = np.arange(shown + first_row, stop)
        if self.chats is not None:
            return self._conversation(name, tokens, row, start + shown, complete=complete)
        if not len(tokens):
            return LeftOut(name, "an empty document", "it has no token but BOS")
        return self._sample(name, tokens, first_row, start + predicted - 1 - self.shift, row, complete=complete)

    def _conversation(
        self, name: str, tokens: NDArray[np.int32], row: FileRow, at: int, *, complete: bool
    ) -> ImportedSample | LeftOut:
        assert self.chats is not None
        learn = (False, *[True] * (len(tokens) - 1))
        try:
            chat = tokens_of(self.chats.model, TokenRow(tuple(tokens.tolist()), learn))
        except Refused as refused:
            return LeftOut(name, refused.reason, refused.detail)
        predicted = at + np.flatnonzero(chat.learn)
        made = self._sample(name, tokens, 1, predicted - 1 - self.shift, row, complete=complete)
        return replace(made, chat=chat)

    def _sample(
        self,
        name: str,
        tokens: NDArray[np.int32],
        first_row: int,
        at_R: NDArray[np.int64],
        row: FileRow,
        *,
        complete: bool,
    ) -> ImportedSample:
        """A sample whose rows are those of the file's row at ``at_R``; one outside has no entry."""
        width, inside_R = row.logprob.shape[1], (at_R >= 0) & (at_R < len(row.logprob))
        taken_R = at_R[inside_R]
        listed_R = np.full(len(at_R), -np.inf)
        listed_R[inside_R] = row.listed[taken_R]
        return ImportedSample(
            name=name,
            ids=tokens,
            first_row=first_row,
            offsets=np.append(0, np.cumsum(inside_R * width)).astype(np.int64),
            entry_ids=np.clip(row.entry_ids[taken_R], -1, np.iinfo(np.int32).max).astype(np.int32).ravel(),
            entry_logprob=row.logprob[taken_R].ravel(),
            label_logprob=np.full(len(at_R), np.nan),
            complete=complete,
            listed_logprob=listed_R,
        )

    def decoded(self, batch: pa.RecordBatch, row: int, place: str) -> FileRow:
        """One row of the file; see ``RowDecoder.decoded``."""
        return self.decoder.decoded(batch, row, place)

    def refuse_unsound(self, above_one: float, above_zero: bool) -> None:
        """See ``RowDecoder.refuse_unsound``."""
        self.decoder.refuse_unsound(above_one, above_zero)
