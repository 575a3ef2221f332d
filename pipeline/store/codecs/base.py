"""What a codec says of itself. All that depends on how rows are stored is asked of this object, never of a name.

Shapes: N samples of a batch, R teacher distributions (rows), K entries of all rows together, U teacher vocabulary.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.differences import entry_differences
from xtoken.pipeline.store.codecs.row_stats import RowStats
from xtoken.pipeline.store.codecs.rows import Unpacked, WholeRows
from xtoken.pipeline.store.kernels import row_figures
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.codecs import CodecSettings
from xtoken.schemas.manifest import CodecInfo
from xtoken.schemas.tables import PARTS_SINCE, capture, read_as

Read = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
"""Reads the named columns of what was captured, batch by batch."""


@dataclass(frozen=True)
class Codec(ABC):
    """A codec with the settings of one capture.

    Abstract methods are what no codec can do without; the others have a default that fits a codec which stores entries
    as log-probabilities. Columns are named as readers know them, ids in the place of codes, except in ``fields``.
    """

    info: CodecInfo
    empty_rows: bool = False  # of an imported capture: a row may have no entry, and the tail mass is then everything
    # Columns that ``decode`` reads, and types of DuckDB: of the arguments of ``unpack_rows`` in ``rows_sql``.
    columns: ClassVar[tuple[str, ...]]
    sql_types: ClassVar[tuple[str, str, str]]
    # What the dataset card's counts and plot call a row's entries.
    entries_label: ClassVar[str] = "entries per row"
    plot_label: ClassVar[str] = "entries kept in a row"

    # -- identity -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def record(cls, settings: CodecSettings) -> CodecInfo:
        """What the manifest says of a run with these settings."""

    @property
    def identity(self) -> dict[str, Any]:
        """What of ``run.json`` must not differ between runs that fill one folder."""
        return {"codec": self.info.name, **self.info.settings.model_dump()}

    @property
    def brief(self) -> str:
        """The settings in a few words."""
        return ", ".join(f"{name} {value:g}" for name, value in self.info.settings) or self.info.name

    # -- columns ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def fields(self) -> list[pa.Field]:
        """Columns as they are stored, lists all; those that hold teacher tokens by code end in ``_codes``."""

    @property
    def last_fields(self) -> list[pa.Field]:
        """Columns that stand behind all others."""
        return []

    @property
    def own(self) -> tuple[str, ...]:
        """All columns of the codec."""
        return tuple(read_as(field.name) for field in (*self.fields, *self.last_fields))

    @property
    def id_columns(self) -> list[str]:
        """Those that hold teacher ids."""
        return [name for name in self.own if name.endswith("_ids")]

    def schema(self, left_out: Sequence[str] = (), *, version: int = PARTS_SINCE) -> pa.Schema:
        """Table of a capture (see ``xtoken.schemas.tables.capture``)."""
        return capture(self.fields, self.last_fields, left_out, version=version)

    # -- there and back -----------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, rows: TeacherRows, vocab_size: int) -> object:
        """A sequence's rows as an object with one flat array for each name of ``own``.

        Raises:
            XtokenError: the rows are not distributions, or do not fit the columns.
        """

    @abstractmethod
    def no_rows(self) -> object:
        """What ``encode`` gives of no row."""

    @abstractmethod
    def decode(self, batch: pa.RecordBatch) -> Unpacked:
        """Rows of all samples of a batch, one after the other, from ``columns``."""

    @abstractmethod
    def check(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
        """Check the codec's columns; returns the entries of each sample [N].

        Args:
            rows_N: rows of each sample.
            vocab_size: U.

        Raises:
            VerificationError: a sample breaks a rule; the message names it and the rule.
        """

    def lengths(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> Mapping[str, NDArray[np.int64]]:
        """How long lists must be before ``decode`` or ``whole`` may look at them, [N] by column."""
        del batch, rows_N
        return {}

    def filled(self, name: str) -> tuple[int, float]:
        """What stands in a column that a subset left out: values per row, and the value; rows have no entries."""
        del name
        return 0, 0

    # -- rows for targets and figures ---------------------------------------------------------------------------------

    @property
    def whole_columns(self) -> tuple[str, ...]:
        """Columns that ``whole``, ``differences`` and ``count`` read."""
        return self.columns

    def whole(self, batch: pa.RecordBatch) -> WholeRows:
        """Rows over what they add up to, which rounding moves from 1, with entropy and largest probability."""
        rows = self.decode(batch)
        count_R = np.diff(rows.offsets)
        row_K = np.repeat(np.arange(len(count_R)), count_R)
        total_R = np.bincount(row_K, np.exp(rows.logprob), len(count_R)) + np.exp(rows.tail_logprob)
        scale_R = np.log(np.where(total_R > 0, total_R, 1.0))  # rows that a subset left out have no mass at all
        logprob_K, tail_R = rows.logprob - scale_R[row_K], rows.tail_logprob - scale_R
        entropy_R, top1_R = row_figures(rows.offsets, logprob_K, tail_R)
        return WholeRows(rows.offsets, rows.ids, logprob_K, np.exp(logprob_K), tail_R, entropy_R, top1_R)

    def tail_at(self, batch: pa.RecordBatch, tau: float, rows: int) -> NDArray[np.float64]:
        """Log of the tail mass at another temperature than 1, [R] nats; NaN = not stored."""
        del batch, tau
        return np.full(rows, np.nan)

    def differences(self, stored: pa.RecordBatch, others: Sequence[TeacherRows]) -> dict[str, float]:
        """Stored rows against the same rows scored another way, as many of each sample: the figures of
        ``xtoken.schemas.manifest.AuditRecord`` that depend on the codec."""
        return entry_differences(self.decode(stored), others)

    def count(self, stats: RowStats, batch: pa.RecordBatch, labels_R: NDArray[np.int32]) -> None:
        """Add a batch's rows to the figures of a card; ``labels_R`` are the tokens in the text."""
        rows = self.decode(batch)
        stats.add_entries(np.diff(rows.offsets), rows.ids, labels_R)
        stats.add_entropy(row_figures(rows.offsets, rows.logprob, rows.tail_logprob)[0])

    def estimate(self, read: Read) -> dict[str, Any]:
        """Figures of a pilot's rows."""
        rows = entries = 0
        for batch in read(self.columns):
            decoded = self.decode(batch)
            rows, entries = rows + len(decoded.tail_logprob), entries + len(decoded.ids)
        return {"entries_per_row": entries / max(rows, 1)}

    # -- words of the dataset card ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def sentence(self) -> str:
        """What of each row the capture holds."""

    @abstractmethod
    def fidelity(self, stats: RowStats) -> tuple[list[tuple[str, object]], str]:
        """What the rows keep of the teacher's distribution: lines of a table, and a note."""

    @property
    @abstractmethod
    def limits(self) -> list[str]:
        """What cannot be had from the rows."""

    @property
    def recipe(self) -> str:
        """How to read the columns without xtoken: a template of Markdown, SQL and NumPy parted by ``===``.

        Fields of ``CodecInfo`` stand in it as ``$step``; ``$ids`` is the stored column of tokens, ``$key`` the column
        of vocab.parquet that it names, ``$code_note`` a sentence about that.
        """
        return self._beside(".card.md")

    # -- other places where rows are shown ----------------------------------------------------------------------------

    @property
    def rows_sql(self) -> str:
        """The view ``_rows`` of ``xtoken query``, over ``capture._samples``, whose columns it keeps beside its own."""
        return self._beside(".rows.sql")

    @abstractmethod
    def sql_logprob(self, count_R: NDArray[np.int64], value_K: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log-probabilities [K] from the first and the last argument of ``unpack_rows``, checked to fit each other."""

    @property
    def unit(self) -> float | None:
        """Log-probabilities are whole multiples of this, in nats; None = they are not."""
        return None

    def page_data(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a sample's page shows of its rows beside entries and tail mass."""
        del row
        return {}

    @property
    def remark(self) -> str | None:
        """What a reader of a sample's page must know of the rows."""
        return None

    def described(self, row: Mapping[str, Any], rows: Unpacked, at: int) -> dict[str, Any]:
        """What ``inspect`` shows of one row of a sample beside its best entries."""
        del row
        return {"rest_logprob": rounded_logprob(rows.tail_logprob[at])}

    def _beside(self, ending: str) -> str:
        file = sys.modules[type(self).__module__].__file__
        assert file is not None, "a codec is a file"
        return Path(file).with_suffix(ending).read_text(encoding="utf-8")


def list_field(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    """A column of lists; ``doc`` is stored with it, as its metadata."""
    return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False, metadata={"doc": doc})


def rounded_logprob(logprob: float) -> float | None:
    """For JSON, which has no -inf, and no NaN: what is unknown is null."""
    if math.isnan(logprob):
        return None
    return round(max(float(logprob), -1e4), 3)
