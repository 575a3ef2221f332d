"""Reader of axolotl's sets: generated answers with their log-probabilities, or rows as its trainer takes them.

Generated: a list for each token of the answer, of objects with "token_id:N" and a log-probability, or two parallel
lists; ``messages`` beside them. Row j predicts token j of the answer, wherever the template puts it. Prepared: as many
rows as ids, renormalised over their entries, so that REST is unknown; which token a row predicts depends on the code
that wrote it, and the test of the shift decides.

Shapes: M rows of a row of the file, R of a sample, E entries of all its rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.chats import ChatTokens, Conversation, Refused, TokenRow, tokens_of
from xtoken.pipeline.imports.conversations import Chats
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.parquet_rows import BadRow, ParquetRows, list_files, matrix, numbers, whole_numbers
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice, Source
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError

_PREPARED = ("input_ids", "target_logprobs", "target_token_ids", "target_mask")
_PAIRED = ("logprobs", "target_token_ids")
_MESSAGES = ("messages", "messages_combined", "conversations")
_TOKEN = re.compile(r"token_id:(\d{1,10})")
_MOST, _LONGEST = 4096, 1 << 20
_NO_LOGPROB = -9998.0  # servers write -9999 for none, padding has -1e9
_NEAR = range(-2, 3)  # places, as of the test of the shift
_PRESENT = 0.5  # of an answer's rows list the token that stands there: a sampled one always is


@dataclass(frozen=True, eq=False)
class AnswerRows:
    """Rows of a row of the file.

    Attributes:
        offsets: int64 [M + 1].
        ids: int64 [E].
        logprob: float64 [E], nats; -inf where there is none.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    logprob: NDArray[np.float64]

    def taken(self, at_R: NDArray[np.int64]) -> "AnswerRows":
        """Some of them; one outside has no entry."""
        inside_R = (at_R >= 0) & (at_R < len(self.offsets) - 1)
        place_R = np.where(inside_R, at_R, 0)
        count_R = np.where(inside_R, np.diff(np.append(self.offsets, self.offsets[-1]))[place_R], 0)
        offsets = np.append(0, np.cumsum(count_R)).astype(np.int64)
        start_R = self.offsets[place_R] if len(at_R) else at_R
        entry_E = np.repeat(start_R - offsets[:-1], count_R) + np.arange(int(offsets[-1]))
        return AnswerRows(offsets, self.ids[entry_E], self.logprob[entry_E])


def token_objects(value: Any, place: str) -> AnswerRows:
    """Rows of objects {"token": "token_id:N", "logprob": x}; a row may be null or empty.

    Raises:
        BadRow: it is something else.
    """
    ids, logprob, offsets = list[int](), list[float](), [0]
    if not isinstance(value, list) or len(value) > _LONGEST:
        raise BadRow(place, "no list of log-probabilities", f"it is {type(value).__name__}")
    for at, row in enumerate(value):
        if row is not None and (not isinstance(row, list) or len(row) > _MOST):
            raise BadRow(place, "a token without a list of candidates", f"row {at} is no list of at most {_MOST}")
        for one in row or ():
            found = _TOKEN.fullmatch(str(one.get("token"))) if isinstance(one, dict) else None
            if found is None or not isinstance(one.get("logprob"), int | float):
                raise BadRow(
                    place,
                    "a candidate without token id or log-probability",
                    f"row {at} has {str(one)[:80]}; tokens must be written as token_id:N",
                    "generate with return_tokens_as_token_ids, or leave such rows out with --on-bad skip",
                )
            ids.append(int(found[1]))
            logprob.append(float(one["logprob"]))
        offsets.append(len(ids))
    return _rows(offsets, ids, logprob)


def parallel_lists(logprobs: Any, token_ids: Any, place: str) -> AnswerRows:
    """Rows of two lists of lists that go together.

    Raises:
        BadRow: they do not.
    """
    if not isinstance(logprobs, list) or not isinstance(token_ids, list) or len(logprobs) != len(token_ids):
        raise BadRow(place, "log-probabilities and ids that do not fit", "they are no lists of one length")
    if len(logprobs) > _LONGEST:
        raise BadRow(place, "too many rows", f"{len(logprobs)}")
    ids, values, offsets = list[int](), list[float](), [0]
    for at, (mine, theirs) in enumerate(zip(logprobs, token_ids, strict=True)):
        mine, theirs = mine or [], theirs or []
        if not _are(mine, int | float) or not _are(theirs, int):
            raise BadRow(
                place,
                "log-probabilities and ids that are no lists of numbers",
                f"row {at} has {str(mine)[:80]} and {str(theirs)[:80]}",
            )
        if len(mine) != len(theirs) or len(mine) > _MOST:
            raise BadRow(
                place, "log-probabilities and ids that do not fit", f"row {at} has {len(mine)} and {len(theirs)}"
            )
        ids += theirs
        values += mine
        offsets.append(len(ids))
    return _rows(offsets, ids, values)


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) for one in values)


def _rows(offsets: Sequence[int], ids: Sequence[int], logprob: Sequence[float]) -> AnswerRows:
    value = np.array(logprob, np.float64)
    value[value < _NO_LOGPROB] = -np.inf
    return AnswerRows(
        np.array(offsets, np.int64), np.array([one if 0 <= one < 1 << 31 else -1 for one in ids], np.int64), value
    )


@dataclass(frozen=True, eq=False)
class AxolotlReader:
    """See ``xtoken.pipeline.imports.samples.Reader``.

    Attributes:
        field: column of a generated set's rows; None of a prepared one.
        messages: column of its conversations.
    """

    source: Source
    config: ImportConfig
    spelling: Spelling
    rows: ParquetRows
    chats: Chats
    field: str | None
    messages: str | None
    shift: int = 0

    def slices(self) -> Sequence[Slice]:
        """See ``Reader``."""
        return self.rows.slices(self.config.part_bytes)

    def moved(self, by: int) -> Reader | None:
        """See ``Reader``."""
        return replace(self, shift=self.shift + by)

    def read(self, wanted: Slice) -> Iterator[ImportedSample | LeftOut]:
        """See ``Reader``."""
        name = self.rows.files[wanted.file].name
        for first, batch in self.rows.read(wanted):
            for row in range(batch.num_rows):
                place = f"{name}:{first + row}"
                try:
                    yield self._prepared(batch, row, place) if self.field is None else self._answer(batch, row, place)
                except Refused as refused:
                    yield LeftOut(f"{place}.0", refused.reason, refused.detail)
                except BadRow as bad:
                    if self.config.on_bad == "stop":
                        raise
                    yield LeftOut(f"{place}.0", bad.reason, bad.detail)

    def _prepared(self, batch: pa.RecordBatch, row: int, place: str) -> ImportedSample | LeftOut:
        ids = numbers(batch, "input_ids", row, place)
        labels, mask = (numbers(batch, name, row, place) for name in ("labels", "attention_mask"))
        logprob, token, wanted = (matrix(batch, name, row, place) for name in _PREPARED[1:])
        if ids is None or not logprob.shape == token.shape == wanted.shape or len(logprob) != len(ids):
            raise BadRow(
                place, "ids and rows that do not fit", f"{logprob.shape} rows of {None if ids is None else len(ids)}"
            )
        if logprob.shape[1] > _MOST:
            raise BadRow(place, "rows that are too wide", f"{logprob.shape[1]} entries, of at most {_MOST}")
        for column, given in (("labels", labels), ("attention_mask", mask)):
            if given is not None and len(given) != len(ids):
                raise BadRow(place, f"{column} of another length", f"{len(given)}, where there are {len(ids)} ids")
        place_N = np.flatnonzero(np.ones(len(ids), np.bool_) if mask is None else mask != 0)
        ids = whole_numbers(ids[place_N], "input_ids", place)
        if not self.spelling.known(ids):
            return LeftOut(f"{place}.0", "an id that is no token", f"not one of {self.spelling.table.size}")
        taught = np.ones(len(ids), np.bool_) if labels is None else labels[place_N] != -100
        learn = (False, *taught[1:].tolist())
        chat = tokens_of(self.chats.model, TokenRow(tuple(ids.tolist()), learn))
        value = np.where((wanted != 0) & (logprob > _NO_LOGPROB), logprob.astype(np.float64), -np.inf)
        width = logprob.shape[1]
        all_rows = AnswerRows(
            np.arange(len(logprob) + 1) * width, whole_numbers(token, _PREPARED[2], place).ravel(), value.ravel()
        )
        learnt = np.flatnonzero(chat.learn)
        at_R = learnt - 1 - self.shift
        at_R = np.where((at_R >= 0) & (at_R < len(place_N)), place_N[np.clip(at_R, 0, len(place_N) - 1)], -1)
        return self._sample(f"{place}.0", chat, all_rows.taken(at_R), None)

    def _answer(self, batch: pa.RecordBatch, row: int, place: str) -> ImportedSample | LeftOut:
        assert self.field is not None
        assert self.messages is not None
        value = batch[self.field][row].as_py()
        if self.field == "logprobs" and "target_token_ids" in batch.schema.names:
            rows = parallel_lists(value, batch["target_token_ids"][row].as_py(), place)
        else:
            rows = token_objects(value, place)
        conversation, chat = self.chats.rendered(batch[self.messages][row].as_py())
        return self.aligned(f"{place}.0", conversation, chat, rows)

    def aligned(
        self, name: str, conversation: Conversation, chat: ChatTokens, rows: AnswerRows
    ) -> ImportedSample | LeftOut:
        """An answer's rows with its tokens, first to first: the template may write more behind the answer, or less."""
        learnt, count = np.flatnonzero(chat.learn), len(rows.offsets) - 1
        if count not in (len(learnt), len(learnt) - 1, len(learnt) + 1):
            return LeftOut(
                name,
                "an answer of other tokens",
                f"it has {count} rows, and as the template writes it {len(learnt)} tokens",
            )
        if len(chat.ids) > self.config.max_tokens:
            return LeftOut(name, "longer than --max-tokens", f"{len(chat.ids)} tokens")
        found = rows.taken(np.arange(len(learnt)) - self.shift)
        made = self._sample(name, chat, found, conversation)
        hits = max(_listed(found, chat.ids, learnt + shift) for shift in _NEAR)
        if hits < _PRESENT * min(count, len(learnt)):
            return LeftOut(name, "an answer of other tokens", f"{hits} of {count} rows list the token of their place")
        return made

    def _sample(
        self, name: str, chat: ChatTokens, rows: AnswerRows, conversation: Conversation | None
    ) -> ImportedSample:
        return ImportedSample(
            name=name,
            ids=chat.ids,
            first_row=1,
            offsets=rows.offsets,
            entry_ids=np.clip(rows.ids, -1, np.iinfo(np.int32).max).astype(np.int32),
            entry_logprob=rows.logprob,
            label_logprob=np.full(len(rows.offsets) - 1, np.nan),
            complete=True,
            chat=chat,
            conversation=conversation,
        )


def _listed(rows: AnswerRows, ids: NDArray[np.int32], at_R: NDArray[np.int64]) -> int:
    """How many rows list the token that stands at a place."""
    row_E = np.repeat(np.arange(len(at_R)), np.diff(rows.offsets))
    return len(np.unique(row_E[rows.ids == ids[np.clip(at_R, 0, len(ids) - 1)][row_E]]))


def open_reader(config: ImportConfig, spelling: Spelling, form: str) -> AxolotlReader:
    """Open the files; see ``xtoken.pipeline.imports.FORMATS``.

    Raises:
        XtokenError: there are none, or they are of another format.
    """
    del form  # the columns decide
    files = list_files(config.paths, (".parquet",))
    schema = ParquetRows(files, (), ()).schema()
    if set(schema.names) >= set(_PREPARED):
        source = Source(
            format="axolotl prepared",
            files=tuple(one.path for one in files),
            rest="unknown",
            config={},
            k=_MOST,
            chat=Chats.of_ids(config).info,
            notes=("Rows were renormalised over their entries, perhaps at another temperature than 1.",),
        )
        rows = ParquetRows(files, (*_PREPARED, "labels", "attention_mask"), _PREPARED)
        return AxolotlReader(source, config, spelling, rows, Chats.of_ids(config), None, None)
    field, messages = _field(config, schema, files[0].path)
    chats = Chats.of_messages(config, "last")
    source = Source(
        format="axolotl generated",
        files=tuple(one.path for one in files),
        rest="exact",
        config={"field": field, "messages": messages},
        k=_MOST,
        chat=chats.info,
        notes=("Log-probabilities are taken to be those at temperature 1, as vLLM gives them.",),
    )
    more = ("target_token_ids",) if field == "logprobs" and "target_token_ids" in schema.names else ()
    rows = ParquetRows(files, (field, messages, *more), (field, messages))
    return AxolotlReader(source, config, spelling, rows, chats, field, messages)


def guess_form(config: ImportConfig) -> str | None:
    """Its columns say what the rows are."""
    del config
    return "messages"


def _field(config: ImportConfig, schema: pa.Schema, path: str) -> tuple[str, str]:
    """Columns of log-probabilities and of conversations."""
    messages = next((name for name in _MESSAGES if name in schema.names), None)
    named = [config.field] if config.field else [name for name in schema.names if name.endswith("logprobs")]
    fields = [name for name in named if name in schema.names]
    if messages is None or len(fields) != 1:
        raise XtokenError(
            f"{path} is no set of axolotl's that can be told: its columns are {', '.join(schema.names[:12])}. Prepared "
            f"ones have {', '.join(_PREPARED)}; generated ones one of {', '.join(_MESSAGES)} and a column of "
            "log-probabilities, which --field names"
        )
    return fields[0], messages
