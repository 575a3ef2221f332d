"""What must hold in every row of a capture, checked on the file itself before it is published and by verify.

Shapes: N samples of one batch, T teacher tokens, R rows, all of the batch together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.columns import any_per_sample, check_ids, flat, list_lengths, refuse
from xtoken.pipeline.store.left_out import fill_left_out, refuse_partly_left_out, without_rows
from xtoken.pipeline.store.publish import Figures
from xtoken.pipeline.store.span_checks import check_spans
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_limits import batches, check_file, open_parquet, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import CaptureManifest, CodecInfo
from xtoken.schemas.spans import rows_per_sample
from xtoken.schemas.tables import PARTS_SINCE, read_as

_ABOVE_0 = 2e-3  # of a log-probability: what rounding adds, and more


@dataclass(frozen=True)
class CaptureCheck:
    """Reads a capture part back and counts it; call with its path or URL."""

    vocab_size: int
    codec: CodecInfo
    left_out: Sequence[str] = ()
    version: int = PARTS_SINCE
    imported: bool = False

    @classmethod
    def of(cls, manifest: CaptureManifest) -> "CaptureCheck":
        """The check of a finished capture's parts.

        Raises:
            VerificationError: the manifest leaves out what no subset does.
        """
        refuse_partly_left_out(manifest)
        return cls(
            manifest.tokenizer.size,
            manifest.codec,
            manifest.left_out,
            manifest.parts_version,
            manifest.imported is not None,
        )

    def __call__(self, url: str) -> Figures:
        """Check every row.

        Raises:
            VerificationError: the file is not Parquet of the capture schema, or a sample breaks a rule.
        """
        total = np.zeros(5, np.int64)
        for batch in read_checked(url, self.schema):
            total += self.batch(batch)
        samples, tokens, rows, entries, text_bytes = (int(value) for value in total)
        return Figures(samples, tokens, rows, entries, text_bytes)

    @property
    def schema(self) -> pa.Schema:
        """What a part's columns must be."""
        return open_codec(self.codec).schema(self.left_out, version=self.version)

    def file(self, path: str) -> None:
        """Check columns, footer and page headers of a local part, for a reader that is not ours (then ``batch``).

        Raises:
            VerificationError: another schema, or it asks for more than ``xtoken.schemas.io.parquet_limits`` allows.
        """
        with reading(path, "'xtoken verify' lists what is damaged"), open_url(path) as file:
            refuse_other_columns(check_file(file, path), self.schema)

    def batch(self, batch: pa.RecordBatch) -> list[int]:
        """Check rows as they are stored; returns samples, tokens, rows, entries and bytes of text.

        Raises:
            VerificationError: a sample breaks a rule.
        """
        # codes are 0 to V-1 as ids are: what holds of the ones holds of the others
        renamed = batch.rename_columns([read_as(name) for name in batch.schema.names])
        return self.as_read(fill_left_out(renamed, self.left_out, open_codec(self.codec)))

    def as_read(self, batch: pa.RecordBatch) -> list[int]:
        """``batch`` for rows as readers see them: ids in the place of codes, columns that were left out filled in."""
        codec = None if without_rows(self.left_out) else replace(open_codec(self.codec), empty_rows=self.imported)
        return _check_batch(batch, self.vocab_size, codec, unknown=self.imported)


def read_checked(url: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet file that must have exactly this schema.

    Raises:
        VerificationError: missing, torn, or of another schema.
    """
    with reading("the file", "fetch or build it again"), open_url(url) as file:
        parquet = open_parquet(file, "the file")
        refuse_other_columns(parquet, schema)
        yield from batches(parquet, file, "the file", rows=ROW_GROUP)


def refuse_other_columns(parquet: Any, schema: pa.Schema) -> None:
    """Raise VerificationError unless an open Parquet file has exactly these columns."""
    if not parquet.schema_arrow.equals(schema):
        raise VerificationError(f"columns are {parquet.schema_arrow.names[:50]}, not those of the format")


def _check_batch(batch: pa.RecordBatch, vocab_size: int, codec: Codec | None, *, unknown: bool) -> list[int]:
    """Check all columns, the codec's unless a subset left them out; ``unknown``: labels may be."""
    tokens_N = list_lengths(batch, "teacher_ids")
    first_N = batch["first_row"].to_numpy()
    refuse(batch, (tokens_N == 0) | ~np.isin(first_N, (0, 1)), "no tokens, or first_row is not 0 or 1")
    refuse(batch, list_lengths(batch, "teacher_end") != tokens_N, "teacher_end has another length than its tokens")
    _check_ends(batch, tokens_N)
    if "span_learn" in batch.schema.names:
        check_spans(batch, tokens_N)
    rows_N = rows_per_sample(batch)
    check_ids(batch, "teacher_ids", tokens_N, vocab_size)
    entries_N = np.zeros_like(rows_N) if codec is None else codec.check(batch, rows_N, vocab_size)
    _check_labels(batch, rows_N, unknown=unknown)
    last = int(flat(batch, "teacher_end")[np.cumsum(tokens_N) - 1].sum())
    return [batch.num_rows, int(tokens_N.sum()), int(rows_N.sum()), int(entries_N.sum()), last]


def _check_ends(batch: pa.RecordBatch, tokens_N: NDArray[np.int64]) -> None:
    end_T = flat(batch, "teacher_end")
    stops_N = np.cumsum(tokens_N)
    step_T = np.diff(end_T.astype(np.int64), prepend=0)
    step_T[(stops_N - tokens_N)] = end_T[stops_N - tokens_N]
    refuse(batch, any_per_sample(step_T < 0, tokens_N), "teacher_end decreases")
    has_text_N = batch["text"].is_valid().to_numpy(zero_copy_only=False)
    bytes_N = pc.fill_null(pc.binary_length(batch["text"]), 0).to_numpy()
    refuse(batch, has_text_N & (end_T[stops_N - 1] != bytes_N), "the last teacher_end is not the length of the text")


def _check_labels(batch: pa.RecordBatch, rows_N: NDArray[np.int64], *, unknown: bool) -> None:
    refuse(
        batch, list_lengths(batch, "realised_logprob") != rows_N, "realised_logprob has another length than its rows"
    )
    label_R = flat(batch, "realised_logprob")
    bad_N = any_per_sample((np.isnan(label_R) & (not unknown)) | (label_R > _ABOVE_0), rows_N)
    refuse(batch, bad_N, "realised_logprob is not a log-probability")
    has_space_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
    bad_N = has_space_N & (list_lengths(batch, "space_logprob") != rows_N)
    refuse(batch, bad_N, "space_logprob has another length than its rows")
    space = flat(batch, "space_logprob")
    bad_N = any_per_sample(np.isnan(space) | (space > _ABOVE_0), np.where(has_space_N, rows_N, 0))
    refuse(batch, bad_N, "space_logprob is not a log-probability")
