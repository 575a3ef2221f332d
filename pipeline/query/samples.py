"""A capture as arrays, for programs of others: ``xtoken.open_capture``.

Shapes: T teacher tokens, R rows (a teacher distribution each), K entries of all rows, all of one sample.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.chats import Span, spans_of
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.rows import Unpacked
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.spans import row_of_token, rows_per_sample
from xtoken.schemas.tables import SPAN_COLUMNS, read_as

_LISTS = ("teacher_ids", "teacher_end", "realised_logprob")


@dataclass(frozen=True)
class CaptureSample:
    """One sample of a capture. Logarithms are natural.

    Attributes:
        sample_id: document id, '#', window number.
        text: what was tokenized; None where the capture holds no text.
        conversation: as it was captured: ``messages``, and ``tools`` where it has some; None of plain text.
        token_ids: int32 [T], the teacher's tokens.
        token_end: int32 [T], the byte of the text (UTF-8) at which each token ends.
        row_of_token: int64 [T], the row that predicts each token; -1: it has none.
        label_logprob: float32 [R], log-probability of the token in the text; NaN: an import does not know it.
        space_logprob: float32 [R], log P(the token starts with a space); None where it was not stored.
        offsets: int64 [R + 1]; row r has the entries ``offsets[r]:offsets[r + 1]``.
        entry_ids: int32 [K], teacher tokens.
        entry_logprob: float64 [K].
        tail_logprob: float64 [R], log of the mass that is in no entry; -inf: none; NaN: an import does not know it.
        complete: the sample ends where its document ends.
        spans: of a conversation, in order; none of plain text.
    """

    sample_id: str
    text: str | None
    conversation: dict[str, Any] | None
    token_ids: NDArray[np.int32]
    token_end: NDArray[np.int32]
    row_of_token: NDArray[np.int64]
    label_logprob: NDArray[np.float32]
    space_logprob: NDArray[np.float32] | None
    offsets: NDArray[np.int64]
    entry_ids: NDArray[np.int32]
    entry_logprob: NDArray[np.float64]
    tail_logprob: NDArray[np.float64]
    complete: bool
    spans: tuple[Span, ...] = ()

    def row(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float64], float]:
        """Ids and log-probabilities of a row's entries, most probable first, and the log of its tail mass."""
        place = slice(self.offsets[row], self.offsets[row + 1])
        return self.entry_ids[place], self.entry_logprob[place], float(self.tail_logprob[row])


class Capture:
    """A finished capture, opened: iterate over it for ``CaptureSample`` in order; ``len`` counts them.

    What is read is checked as ``xtoken verify`` checks it, but for the sha256 of local files.

    Attributes:
        url: folder or URL.
        manifest: manifest.json as a dictionary; its fields are described in ``xtoken.schemas.manifest``.
        parts: numbers of its parts.
    """

    def __init__(self, url: str) -> None:
        self.url, found = url, read_manifest(url, CaptureManifest)
        self._manifest, self._codec = found, open_codec(found.codec)
        self.manifest: dict[str, Any] = found.model_dump(mode="json")
        self.parts = tuple(part.index for part in found.parts)

    def __len__(self) -> int:
        return sum(part.samples for part in self._manifest.parts)

    def __iter__(self) -> Iterator[CaptureSample]:
        return self._samples(None)

    def part(self, number: int) -> list[CaptureSample]:
        """All samples of a part.

        Raises:
            XtokenError: there is no such part.
            VerificationError: it is damaged.
        """
        if number not in self.parts:
            raise XtokenError(f"{self.url} has no part {number}; its parts are {_few(self.parts)}")
        return list(self._samples([number]))

    def batches(
        self, columns: Sequence[str] | None = None, parts: Collection[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The table as it is stored (``xtoken.schemas.tables``), teacher ids in the place of codes.

        Args:
            columns: names; all when left out.
            parts: numbers; all when left out.

        Raises:
            XtokenError: no such column or part.
        """
        known = [read_as(name) for name in self._codec.schema(version=self._manifest.parts_version).names]
        if unknown := [name for name in columns or () if name not in known]:
            raise XtokenError(f"{self.url} has no column {unknown[0]!r}; it has {', '.join(known)}")
        return iter_capture(self.url, columns, parts)

    def to_pandas(self, columns: Sequence[str] | None = None, parts: Collection[int] | None = None) -> Any:
        """``batches`` as one data frame, a row per sample; needs pandas."""
        return pa.Table.from_batches(self.batches(columns, parts)).to_pandas()

    def _samples(self, parts: Collection[int] | None) -> Iterator[CaptureSample]:
        check = CaptureCheck.of(self._manifest)
        for batch in iter_capture(self.url, None, parts):
            check.as_read(batch)
            yield from self._of_batch(batch)

    def _of_batch(self, batch: pa.RecordBatch) -> Iterator[CaptureSample]:
        rows = None if without_rows(self._manifest.left_out) else self._codec.decode(batch)
        at_T, rows_N = row_of_token(batch), rows_per_sample(batch)
        first_row = first_token = 0
        for number, count in enumerate(rows_N.tolist()):
            row = {name: batch[name][number] for name in batch.schema.names}
            ids, ends, labels = (row[name].values.to_numpy() for name in _LISTS)
            here_T = at_T[first_token : first_token + len(ids)]
            spaces = row["space_logprob"]
            yield CaptureSample(
                row["sample_id"].as_py(),
                row["text"].as_py(),
                json.loads(row["messages"].as_py()) if "messages" in row and row["messages"].is_valid else None,
                ids,
                ends,
                np.where(here_T < 0, -1, here_T - first_row),
                labels,
                spaces.values.to_numpy() if spaces.is_valid else None,
                *_entries(rows, first_row, count),
                row["complete"].as_py(),
                spans_of({name: row[name].as_py() for name in SPAN_COLUMNS}) if "span_kind" in row else (),
            )
            first_row, first_token = first_row + count, first_token + len(ids)


def _entries(rows: Unpacked | None, first: int, count: int) -> tuple[Any, Any, Any, Any]:
    """Offsets, ids, log-probabilities and tails of some rows; without entries where a subset left these out."""
    if rows is None:
        return np.zeros(count + 1, np.int64), np.zeros(0, np.int32), np.zeros(0), np.zeros(count)
    offsets = rows.offsets[first : first + count + 1]
    place = slice(offsets[0], offsets[-1])
    return offsets - offsets[0], rows.ids[place], rows.logprob[place], rows.tail_logprob[first : first + count]


def _few(parts: Sequence[int]) -> str:
    return f"0 to {parts[-1]}" if list(parts) == list(range(len(parts))) and parts else ", ".join(map(str, parts[:10]))


def open_capture(url: str) -> Capture:
    """Open a finished capture.

    Args:
        url: folder, or URL that fsspec knows.

    Raises:
        XtokenError: there is none.
    """
    return Capture(url.rstrip("/"))
