"""What must hold in every row of a capture, checked on the file itself before it is published and by verify.

Shapes: N samples of one batch, T teacher tokens, R rows, K kept entries, all of the batch together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.store.codec import decode
from pipeline.store.publish import Figures
from pipeline.store.writer import ROW_GROUP
from schemas.errors import VerificationError
from schemas.manifest import CodecInfo
from schemas.tables import capture

# The codec refuses rows whose kept mass is above 1 + 1e-3; float32 rounding adds nothing of that size.
_SUM_SLACK = 2e-3


@dataclass(frozen=True)
class CaptureCheck:
    """Reads a capture part back and counts it; call with its path or URL."""

    vocab_size: int
    codec: CodecInfo

    def __call__(self, url: str) -> Figures:
        """Check every row.

        Raises:
            VerificationError: the file is no Parquet of the capture schema, or a sample breaks a rule.
        """
        total = np.zeros(5, np.int64)
        for batch in read_checked(url, capture(self.codec.temperatures)):
            total += _check_batch(batch, self.vocab_size, self.codec)
        samples, tokens, rows, entries, text_bytes = (int(value) for value in total)
        return Figures(samples, tokens, rows, entries, text_bytes)


def read_checked(url: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet file that must have exactly this schema.

    Raises:
        VerificationError: missing, torn, or of another schema.
    """
    try:
        with fsspec.open(url, "rb") as file:
            parquet = pq.ParquetFile(file)
            if not parquet.schema_arrow.equals(schema):
                raise VerificationError(f"columns are {parquet.schema_arrow.names}, not those of the format")
            yield from parquet.iter_batches(batch_size=ROW_GROUP)
    except (pa.ArrowException, OSError) as error:
        raise VerificationError(f"the file cannot be read ({error})") from error


def list_lengths(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    """[N] length of each row's list; 0 for null."""
    lengths: NDArray[np.int64] = pc.fill_null(pc.list_value_length(batch[name]), 0).to_numpy().astype(np.int64)
    return lengths


def flat(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """All values of a list column, rows one after the other."""
    values: NDArray[Any] = batch[name].flatten().to_numpy(zero_copy_only=False)
    return values


def _refuse(batch: pa.RecordBatch, bad_N: NDArray[np.bool_], rule: str) -> None:
    if bad_N.any():
        sample = batch["sample_id"][int(bad_N.argmax())].as_py()
        raise VerificationError(f"sample {sample!r}: {rule}")


def _any_per_sample(bad: NDArray[np.bool_], lengths_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether a sample has a bad value among its ``lengths_N`` consecutive ones."""
    sample = np.repeat(np.arange(len(lengths_N)), lengths_N)
    hits: NDArray[np.bool_] = np.bincount(sample[bad], minlength=len(lengths_N)) > 0
    return hits


def _check_batch(batch: pa.RecordBatch, vocab_size: int, codec: CodecInfo) -> list[int]:
    tokens_N = list_lengths(batch, "teacher_ids")
    first_N = batch["first_row"].to_numpy()
    rows_N = tokens_N - first_N
    _refuse(batch, (tokens_N == 0) | ~np.isin(first_N, (0, 1)), "no tokens, or first_row is not 0 or 1")
    for name, expected_N in (("teacher_end", tokens_N), ("kept", rows_N), ("rest_gap", rows_N)):
        _refuse(batch, list_lengths(batch, name) != expected_N, f"{name} has another length than its tokens")
    _check_temperatures(batch, rows_N, codec)
    _check_ends(batch, tokens_N)
    _check_ids(batch, "teacher_ids", tokens_N, vocab_size)
    entries_N = _check_entries(batch, rows_N, vocab_size, codec)
    _check_mass(batch, rows_N, codec.step)
    _check_realised(batch, rows_N)
    last = int(flat(batch, "teacher_end")[np.cumsum(tokens_N) - 1].sum())
    return [batch.num_rows, int(tokens_N.sum()), int(rows_N.sum()), int(entries_N.sum()), last]


def _check_temperatures(batch: pa.RecordBatch, rows_N: NDArray[np.int64], codec: CodecInfo) -> None:
    others = len(codec.temperatures) - 1
    if others:
        bad_N = list_lengths(batch, "tau_rest_odds") != rows_N * others
        _refuse(batch, bad_N, f"tau_rest_odds has not {others} values for each row")


def _check_ends(batch: pa.RecordBatch, tokens_N: NDArray[np.int64]) -> None:
    end_T = flat(batch, "teacher_end")
    stops_N = np.cumsum(tokens_N)
    step_T = np.diff(end_T, prepend=0)
    step_T[(stops_N - tokens_N)] = end_T[stops_N - tokens_N]
    _refuse(batch, _any_per_sample(step_T < 0, tokens_N), "teacher_end decreases")
    has_text_N = batch["text"].is_valid().to_numpy(zero_copy_only=False)
    bytes_N = pc.fill_null(pc.binary_length(batch["text"]), 0).to_numpy()
    _refuse(batch, has_text_N & (end_T[stops_N - 1] != bytes_N), "the last teacher_end is not the length of the text")


def _check_ids(batch: pa.RecordBatch, name: str, lengths_N: NDArray[np.int64], vocab_size: int) -> None:
    ids = flat(batch, name)
    bad_N = _any_per_sample((ids < 0) | (ids >= vocab_size), lengths_N)
    _refuse(batch, bad_N, f"{name} has an id outside 0 to {vocab_size - 1}")


def _check_entries(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, codec: CodecInfo
) -> NDArray[np.int64]:
    kept_R = flat(batch, "kept")
    bad_N = _any_per_sample((kept_R < 1) | (kept_R > codec.k), rows_N)
    _refuse(batch, bad_N, f"kept is not between 1 and {codec.k}")
    running_R = np.concatenate([[0], np.cumsum(kept_R, dtype=np.int64)])
    stops_N = np.cumsum(rows_N)
    entries_N: NDArray[np.int64] = running_R[stops_N] - running_R[stops_N - rows_N]
    for name in ("topk_ids", "topk_gap"):
        _refuse(batch, list_lengths(batch, name) != entries_N, f"{name} has not as many entries as kept says")
    _check_ids(batch, "topk_ids", entries_N, vocab_size)
    row_K = np.repeat(np.arange(len(kept_R)), kept_R)
    key_K = np.sort(row_K * np.int64(vocab_size) + flat(batch, "topk_ids"))
    twice_R = np.zeros(len(kept_R), np.bool_)
    twice_R[key_K[1:][np.diff(key_K) == 0] // vocab_size] = True
    _refuse(batch, _any_per_sample(twice_R, rows_N), "an id stands twice in one row")
    return entries_N


def _check_mass(batch: pa.RecordBatch, rows_N: NDArray[np.int64], step: float) -> None:
    """Kept mass and REST add to one within half a step of quantisation."""
    kept_R, rest_R = flat(batch, "kept"), flat(batch, "rest_gap")
    rows = decode(kept_R, flat(batch, "topk_ids"), flat(batch, "topk_gap"), rest_R, step)
    if not len(kept_R):
        return
    sum_R = np.add.reduceat(np.exp(rows.logprob), rows.offsets[:-1]) + np.exp(rows.rest_logprob)
    low, high = np.exp(-step / 2) - _SUM_SLACK, np.exp(step / 2) + _SUM_SLACK
    bad_R = (sum_R > high) | (sum_R < low)
    _refuse(batch, _any_per_sample(bad_R, rows_N), "a row's kept probabilities and REST do not sum to 1")


def _check_realised(batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> None:
    _refuse(batch, list_lengths(batch, "realised_logprob") != rows_N, "realised_logprob has another length than kept")
    realised_R = flat(batch, "realised_logprob")
    bad_N = _any_per_sample(np.isnan(realised_R) | (realised_R > _SUM_SLACK), rows_N)
    _refuse(batch, bad_N, "realised_logprob is no log-probability")
    has_space_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
    bad_N = has_space_N & (list_lengths(batch, "space_logprob") != rows_N)
    _refuse(batch, bad_N, "space_logprob has another length than kept")
