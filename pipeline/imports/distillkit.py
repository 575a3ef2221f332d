"""Reader of DistillKit's sets: its present form, its older one, raw top k; sampled by document, or packed.

A row of the file holds input ids and rows: row j predicts id j + 1. Sampled files have one id more than rows; the last
may be a pad token that the sampler appended. Packed ones have as many ids as rows: the last id of each document is
lost, and what its last row predicts is not in the file, so that row is dropped.

Shapes: N ids and M rows in a row of the file, K entries of each, T tokens and R rows of a document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.chats import Refused, TokenRow, tokens_of
from xtoken.pipeline.imports.compression import AnyCompression, Compression, LegacyCompression, beside, read_compression
from xtoken.pipeline.imports.conversations import Chats, has_template
from xtoken.pipeline.imports.documents import Border, Spelling, by_mask, by_token
from xtoken.pipeline.imports.packed_bits import unpack_words
from xtoken.pipeline.imports.parquet_rows import (
    BadRow,
    ParquetRows,
    byte_rows,
    list_files,
    matrix,
    numbers,
)
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice, Source
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.imported import RestClass
from xtoken.schemas.io.remote import open_filesystem

Variant = Literal["distillkit", "distillkit legacy", "raw top k"]
_NEEDED: dict[Variant, tuple[str, ...]] = {
    "distillkit": ("compressed_logprobs", "bytepacked_indices"),
    "distillkit legacy": ("packed_indices", "exact_values", "coeffs"),
    "raw top k": ("token_ids", "top_values"),
}
_ALWAYS, _PERHAPS = ("input_ids",), ("attention_mask", "normalized_logits", "messages")
_LOOKED = 1 << 14  # rows of the file whose step from head to tail is looked at
_LONGEST = 1 << 20  # rows in a row of the file
_HINT = "is --compression that of the set (delta_encoding is true where it does not say)?"
_PART_OF_ALL = 1e-3  # nats: a softmax over what is listed adds up to 1 far closer
_CENTRED = 1.0  # nats: log-probabilities never add up to e, logits do


@dataclass(frozen=True, eq=False)
class FileRow:
    """A row of the file, decoded.

    Attributes:
        ids: int64 [N].
        mask: int64 [N], or None.
        entry_ids, logprob: [M, K]; float64, nats.
        listed: float64 [M], log of what all entries add up to, those that are not given included.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64] | None
    entry_ids: NDArray[np.int64]
    logprob: NDArray[np.float64]
    listed: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DistillKitReader:
    """See ``xtoken.pipeline.imports.samples.Reader``."""

    source: Source
    config: ImportConfig
    spelling: Spelling
    rows: ParquetRows
    variant: Variant
    compression: AnyCompression | None
    logits: bool = False
    chats: Chats | None = None
    normalised: bool = False
    shift: int = 0
    steps: list[float] = field(default_factory=list)

    def slices(self) -> Sequence[Slice]:
        """See ``Reader``."""
        return self.rows.slices(self.config.part_bytes)

    def moved(self, by: int) -> Reader | None:
        """See ``Reader``: nothing but raw top k leaves doubt."""
        return replace(self, shift=self.shift + by) if self.variant == "raw top k" else None

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

    def decoded(self, batch: pa.RecordBatch, row: int, place: str) -> FileRow:
        """One row of the file.

        Raises:
            BadRow: its lists do not fit each other or the configuration.
        """
        ids, mask = (numbers(batch, name, row, place) for name in ("input_ids", "attention_mask"))
        if ids is None:
            raise BadRow(place, "no input_ids", "the list is null")
        entry_ids, logprob, listed = self._entries(batch, row, place)
        if len(entry_ids) > _LONGEST or len(ids) not in (len(entry_ids), len(entry_ids) + 1):
            raise BadRow(
                place,
                "ids and rows that do not fit",
                f"{len(ids)} ids and {len(entry_ids)} rows; sampled sets have one id more than rows, packed as many",
            )
        if mask is not None and len(mask) != len(ids):
            raise BadRow(place, "attention_mask of another length", f"{len(mask)}, where there are {len(ids)} ids")
        whole = ids.astype(np.int64)
        return FileRow(whole, None if mask is None else mask.astype(np.int64), entry_ids, logprob, listed)

    def _entries(
        self, batch: pa.RecordBatch, row: int, place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        given = [matrix(batch, name, row, place) for name in _NEEDED[self.variant]]
        if len({len(one) for one in given}) > 1:
            raise BadRow(place, "columns of unequal lengths", f"{[len(one) for one in given]} rows")
        if isinstance(self.compression, Compression):
            ids, values = self._bytes(self.compression, given, place)
        elif isinstance(self.compression, LegacyCompression):
            ids, values = self._words(self.compression, given, place)
        else:
            ids, values = given[0].astype(np.int64), given[1].astype(np.float64)
            if self.normalised:
                with np.errstate(divide="ignore"):
                    values = np.log(matrix(batch, "normalized_logits", row, place).astype(np.float64))
            if ids.shape != values.shape:
                raise BadRow(place, "token_ids and top_values of unequal lengths", f"{ids.shape} and {values.shape}")
        if self.logits:
            values = values - _log_sum(values)[:, None]
        listed = _log_sum(values)
        most = self.head
        return ids[:, :most], values[:, :most], listed

    @property
    def head(self) -> int | None:
        """How many entries of a row are given; None = all."""
        if self.config.entries == "all" or self.compression is None or self.source.rest == "unknown":
            return None
        return self.compression.exact_k

    def _bytes(
        self, how: Compression, given: Sequence[NDArray[Any]], place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        values = how.values(byte_rows(given[0], how.value_bytes, "compressed_logprobs", place))
        ids, whole = how.ids(byte_rows(given[1], how.index_bytes, "bytepacked_indices", place))
        if not whole:
            raise BadRow(
                place,
                "ids with something behind the last",
                f"by k {how.k} and d {how.d} the last bits must be 0",
                "give the configuration that the set was written with",
            )
        if 0 < how.exact_k < how.k and len(self.steps) < _LOOKED:
            step = values[:, how.exact_k - 1] - values[:, how.exact_k]
            self.steps.extend(step[np.isfinite(step)].tolist())
        return ids, values

    def _words(
        self, how: LegacyCompression, given: Sequence[NDArray[Any]], place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        words, exact, coefficient = given
        wanted = (how.words, how.exact_k, how.coefficients if how.tail else coefficient.shape[1])
        found = (words.shape[1], exact.shape[1], coefficient.shape[1])
        if wanted != found:
            raise BadRow(
                place,
                "rows of another length than --compression says",
                f"words, exact values and coefficients are {found}, and should be {wanted}",
                "give the configuration that the set was written with",
            )
        ids = unpack_words(words.astype(np.int64).view(np.uint64), how.k, how.bits)
        values = exact.astype(np.float64)
        if how.tail:
            values = np.concatenate([values, how.tail_values(coefficient.astype(np.float64))], axis=1)
        return ids, values

    def _documents(self, place: str, row: FileRow) -> Iterator[ImportedSample | LeftOut]:
        cut = len(row.ids) == len(row.logprob)
        for number, border in enumerate(self._borders(place, row)):
            name = f"{place}.{number}"
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
                "say what parts them: --documents bos or --documents eos",
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

    def refuse_unsound(self, above_one: float, above_zero: bool) -> None:
        """Refuse the polynomial's tail of ``--entries all`` where it is noise.

        Args:
            above_one: share of rows whose entries add up to more than 1.01.
            above_zero: whether an entry is above a probability of 1.

        Raises:
            XtokenError: the message says by which figure.
        """
        how = self.compression
        if self.head is not None or not isinstance(how, Compression) or how.exact_k == how.k:
            return
        step = float(np.median(self.steps)) if self.steps else 0.0
        reasons = {
            f"{above_one:.1%} of the rows add up to more than 1.01 (at most 1 %)": above_one > 0.01,
            "an entry has a probability above 1": above_zero,
            f"from the last number to the first value of the polynomial it is {step:.2f} nats (at most .3)": (
                how.exact_k >= 8 and step > 0.3
            ),
        }
        if said := [reason for reason, wrong in reasons.items() if wrong]:
            raise XtokenError(
                f"--entries all: the tail of these rows is noise of their compression: {'; '.join(said)}. Take "
                "--entries head: the numbers, and the tail mass as what they leave"
            )


def _log_sum(value_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [R], log of the sum of what is finite; -inf = nothing."""
    value = np.where(np.isfinite(value_RK), value_RK, -np.inf)
    top = value.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: NDArray[np.float64] = np.log(np.exp(value - safe[:, None]).sum(axis=1)) + safe
    return total


def open_reader(config: ImportConfig, spelling: Spelling, form: str) -> DistillKitReader:
    """Open the files; see ``xtoken.pipeline.imports.FORMATS``.

    Raises:
        XtokenError: there are none, they are of another format, or nobody says how they are compressed.
    """
    files = list_files(config.paths, (".parquet",))
    rows = ParquetRows(files, (*_ALWAYS, *_PERHAPS), _ALWAYS)
    variant = _variant(rows)
    needed = (*_ALWAYS, *_NEEDED[variant])
    rows = ParquetRows(files, (*needed, *_PERHAPS), needed)
    compression = None if variant == "raw top k" else _compression(config, files[0].path, variant)
    chats = None
    if form != "text":
        chats = Chats.of_ids(config) if form == "ids" else Chats.of_messages(config, "all")
    source = Source(
        format=variant,
        files=tuple(one.path for one in files),
        rest=_rest(config, compression),
        config={} if compression is None else compression.model_dump(mode="json"),
        k=MOST_K if compression is None else compression.k,
        chat=None if chats is None else chats.info,
        notes=_notes(config, compression),
        hint=_HINT if compression is not None else Source.hint,
    )
    reader = DistillKitReader(source, config, spelling, rows, variant, compression, chats=chats)
    if variant == "distillkit":
        return reader
    if variant == "raw top k" and "normalized_logits" in rows.schema().names:
        over_all = replace(reader, normalised=True)
        if _first_sum(over_all) < -_PART_OF_ALL:  # over the vocabulary: what is listed is a part of 1
            return replace(over_all, source=replace(source, rest="rounded"))
    if _first_sum(reader) > _CENTRED:
        notes = (*source.notes, "The rows hold logits: what is not listed is not known.")
        reader = replace(reader, logits=True, source=replace(source, rest="unknown", notes=notes))
    return reader


MOST_K = 4096


def guess_form(config: ImportConfig) -> str | None:
    """messages where rows have their conversation and the tokenizer has a template; else the ids must say."""
    rows = ParquetRows(list_files(config.paths, (".parquet",)), ("messages",), ())
    if "messages" not in rows.schema().names:
        return None
    for wanted in rows.slices(config.part_bytes)[:1]:
        for _, batch in rows.read(wanted):
            rows.close()
            given = any(batch["messages"].to_pylist())
            return "messages" if given and has_template(config.tokenizer) else None
    return None


def _variant(rows: ParquetRows) -> Variant:
    names = set(rows.schema().names)
    for variant, needed in _NEEDED.items():
        if names >= {*needed, *_ALWAYS}:
            return variant
    raise XtokenError(
        f"{rows.files[0].path} is no DistillKit set: its columns are {', '.join(sorted(names)[:12])}, and such sets "
        "have input_ids with compressed_logprobs and bytepacked_indices, with packed_indices, exact_values and coeffs, "
        "or with token_ids and top_values; for axolotl's say 'xtoken import axolotl'"
    )


def _compression(config: ImportConfig, file: str, variant: Variant) -> AnyCompression:
    path = config.compression
    if path is None:
        fs, inner = open_filesystem(beside(file))
        if not fs.exists(inner):
            raise XtokenError(
                f"{beside(file)} does not exist, and the rows do not say how they are compressed; give the settings "
                "with --compression FILE: they are in the set's compression_config.yaml, its card or a training example"
            )
        path = beside(file)
    found = read_compression(path)
    if isinstance(found, Compression) != (variant == "distillkit"):
        wanted = "d, k, exact_k" if variant == "distillkit" else "vocab_size, k, polynomial_degree"
        raise XtokenError(f"{path} is of another form than {file}, which needs {wanted}; give that set's own")
    if config.entries == "head" and found.exact_k == 0:
        raise XtokenError(
            f"{path}: exact_k is 0, so no entry is stored as a number and --entries head keeps none; say --entries all"
        )
    return found


def _rest(config: ImportConfig, how: AnyCompression | None) -> RestClass:
    if how is None:
        return "unknown"
    if isinstance(how, LegacyCompression):
        return "rounded"
    whole = config.entries == "head" or how.exact_k == how.k
    return "exact" if whole and how.exact_dtype in ("float32", "float64") else "rounded"


def _notes(config: ImportConfig, how: AnyCompression | None) -> tuple[str, ...]:
    if how is not None and config.entries == "head" and how.exact_k <= 4:
        return (
            f"Only {how.exact_k} of {how.k} entries of each row are numbers, the others a polynomial's: what is left "
            "is honest, and there is little to learn from it.",
        )
    return ()


def _first_sum(reader: DistillKitReader) -> float:
    """Median of the log of what the first rows' entries add up to; of logits far above 0."""
    for wanted in reader.slices():
        for first, batch in reader.rows.read(wanted):
            place = f"{reader.rows.files[wanted.file].name}:{first}"
            listed = reader.decoded(batch, 0, place).listed
            if len(listed):
                reader.rows.close()
                return float(np.median(listed))
    return 0.0
