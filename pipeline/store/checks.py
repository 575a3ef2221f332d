"""What must hold in every row of a capture, checked on the file itself before it is published and by verify.

Shapes: N samples of one batch, T teacher tokens, R rows, K kept entries, all of the batch together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.store.checks_sampled import check_draws
from xtoken.pipeline.store.columns import any_per_sample, check_ids, refuse
from xtoken.pipeline.store.columns import flat as flat
from xtoken.pipeline.store.columns import list_lengths as list_lengths
from xtoken.pipeline.store.left_out import fill_left_out, without_rows
from xtoken.pipeline.store.publish import Figures
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_limits import batches, check_file, open_parquet, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import CaptureManifest, CodecInfo
from xtoken.schemas.tables import CODED, SCHEMA_VERSIONS, capture

# The codec refuses rows whose kept mass is above 1 + 1e-3; float32 rounding adds nothing of that size.
_SUM_SLACK = 2e-3
_RowsCheck = Callable[[pa.RecordBatch, NDArray[np.int64], int, CodecInfo], NDArray[np.int64]]


@dataclass(frozen=True)
class CaptureCheck:
    """Reads a capture part back and counts it; call with its path or URL."""

    vocab_size: int
    codec: CodecInfo
    left_out: Sequence[str] = ()
    version: int = SCHEMA_VERSIONS["capture"]

    @classmethod
    def of(cls, manifest: CaptureManifest) -> "CaptureCheck":
        """The check of a finished capture's parts."""
        return cls(manifest.tokenizer.size, manifest.codec, manifest.left_out, manifest.schema_version)

    def __call__(self, url: str) -> Figures:
        """Check every row.

        Raises:
            VerificationError: the file is no Parquet of the capture schema, or a sample breaks a rule.
        """
        total = np.zeros(5, np.int64)
        for batch in read_checked(url, self.schema):
            total += self.batch(batch)
        samples, tokens, rows, entries, text_bytes = (int(value) for value in total)
        return Figures(samples, tokens, rows, entries, text_bytes)

    @property
    def schema(self) -> pa.Schema:
        """What a part's columns must be."""
        return capture(self.codec.temperatures, self.codec.name, self.left_out, version=self.version)

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
        rows_checked = _no_entries if without_rows(self.left_out) else _ROWS[self.codec.name]
        # codes are 0 to V-1 as ids are: what holds of the ones holds of the others
        renamed = batch.rename_columns([CODED.get(name, name) for name in batch.schema.names])
        whole = fill_left_out(renamed, self.left_out, self.codec)
        return _check_batch(whole, self.vocab_size, self.codec, rows_checked)


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


def _check_batch(batch: pa.RecordBatch, vocab_size: int, codec: CodecInfo, rows_checked: _RowsCheck) -> list[int]:
    tokens_N = list_lengths(batch, "teacher_ids")
    first_N = batch["first_row"].to_numpy()
    rows_N = tokens_N - first_N
    refuse(batch, (tokens_N == 0) | ~np.isin(first_N, (0, 1)), "no tokens, or first_row is not 0 or 1")
    refuse(batch, list_lengths(batch, "teacher_end") != tokens_N, "teacher_end has another length than its tokens")
    _check_ends(batch, tokens_N)
    check_ids(batch, "teacher_ids", tokens_N, vocab_size)
    entries_N = rows_checked(batch, rows_N, vocab_size, codec)
    _check_realised(batch, rows_N)
    last = int(flat(batch, "teacher_end")[np.cumsum(tokens_N) - 1].sum())
    return [batch.num_rows, int(tokens_N.sum()), int(rows_N.sum()), int(entries_N.sum()), last]


def _check_topk(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, codec: CodecInfo
) -> NDArray[np.int64]:
    """Check the columns of codec ``topk``; returns the entries of each sample, [N]."""
    for name in ("kept", "rest_gap"):
        refuse(batch, list_lengths(batch, name) != rows_N, f"{name} has another length than its tokens")
    _check_temperatures(batch, rows_N, codec)
    return _check_entries(batch, rows_N, vocab_size, codec)


def _check_temperatures(batch: pa.RecordBatch, rows_N: NDArray[np.int64], codec: CodecInfo) -> None:
    others = len(codec.temperatures) - 1
    if others:
        bad_N = list_lengths(batch, "tau_rest_odds") != rows_N * others
        refuse(batch, bad_N, f"tau_rest_odds has not {others} values for each row")


def _check_ends(batch: pa.RecordBatch, tokens_N: NDArray[np.int64]) -> None:
    end_T = flat(batch, "teacher_end")
    stops_N = np.cumsum(tokens_N)
    step_T = np.diff(end_T.astype(np.int64), prepend=0)
    step_T[(stops_N - tokens_N)] = end_T[stops_N - tokens_N]
    refuse(batch, any_per_sample(step_T < 0, tokens_N), "teacher_end decreases")
    has_text_N = batch["text"].is_valid().to_numpy(zero_copy_only=False)
    bytes_N = pc.fill_null(pc.binary_length(batch["text"]), 0).to_numpy()
    refuse(batch, has_text_N & (end_T[stops_N - 1] != bytes_N), "the last teacher_end is not the length of the text")


def _check_entries(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, codec: CodecInfo
) -> NDArray[np.int64]:
    kept_R = flat(batch, "kept")
    bad_N = any_per_sample((kept_R < 1) | (kept_R > codec.k), rows_N)
    refuse(batch, bad_N, f"kept is not between 1 and {codec.k}")
    running_R = np.concatenate([[0], np.cumsum(kept_R, dtype=np.int64)])
    stops_N = np.cumsum(rows_N)
    entries_N: NDArray[np.int64] = running_R[stops_N] - running_R[stops_N - rows_N]
    for name in ("topk_ids", "topk_gap"):
        refuse(batch, list_lengths(batch, name) != entries_N, f"{name} has not as many entries as kept says")
    _check_rows(batch, rows_N, vocab_size, codec.step)
    return entries_N


def _check_rows(batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, step: float) -> None:
    """Ids lie in the vocabulary, none twice in a row, and a row sums to one within half a step of quantisation."""
    from xtoken.pipeline.store.kernels import RULES, level_table, row_faults

    kept, ids, gap, rest = (flat(batch, name) for name in ("kept", "topk_ids", "topk_gap", "rest_gap"))
    fault_R = row_faults(kept, ids, gap, rest, vocab_size, step, _SUM_SLACK, level_table(step))
    for fault, rule in enumerate(RULES[1:], 1):
        refuse(batch, any_per_sample(fault_R == fault, rows_N), rule.format(vocab_size - 1))


def _check_realised(batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> None:
    refuse(
        batch, list_lengths(batch, "realised_logprob") != rows_N, "realised_logprob has another length than its rows"
    )
    realised_R = flat(batch, "realised_logprob")
    bad_N = any_per_sample(np.isnan(realised_R) | (realised_R > _SUM_SLACK), rows_N)
    refuse(batch, bad_N, "realised_logprob is no log-probability")
    has_space_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
    bad_N = has_space_N & (list_lengths(batch, "space_logprob") != rows_N)
    refuse(batch, bad_N, "space_logprob has another length than its rows")
    space = flat(batch, "space_logprob")
    bad_N = any_per_sample(np.isnan(space) | (space > _SUM_SLACK), np.where(has_space_N, rows_N, 0))
    refuse(batch, bad_N, "space_logprob is no log-probability")


def _no_entries(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, codec: CodecInfo
) -> NDArray[np.int64]:
    """Of a subset without the teacher's distributions there is nothing to check, and no sample has entries, [N]."""
    del batch, vocab_size, codec
    return np.zeros_like(rows_N)


_ROWS: dict[str, _RowsCheck] = {"topk": _check_topk, "sampled": check_draws}
