"""List columns of a record batch as arrays, and how checks of them refuse.

Shapes: N samples of one batch.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError


def list_lengths(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    """[N] length of each row's list; 0 for null."""
    lengths: NDArray[np.int64] = pc.fill_null(pc.list_value_length(batch[name]), 0).to_numpy().astype(np.int64)
    return lengths


def flat(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """All values of a list column, rows one after the other."""
    values: NDArray[Any] = batch[name].flatten().to_numpy(zero_copy_only=False)
    return values


def sums_per_sample(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    """[N] sum of each sample's counts."""
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(flat(batch, name), dtype=np.int64)])
    lengths_N = list_lengths(batch, name)
    stops_N = np.cumsum(lengths_N)
    sums_N: NDArray[np.int64] = running[stops_N] - running[stops_N - lengths_N]
    return sums_N


def refuse(batch: pa.RecordBatch, bad_N: NDArray[np.bool_], rule: str) -> None:
    """Raise VerificationError for the first sample that breaks a rule."""
    if bad_N.any():
        sample = batch["sample_id"][int(bad_N.argmax())].as_py()
        raise VerificationError(f"sample {sample!r}: {rule}")


def any_per_sample(bad: NDArray[np.bool_], lengths_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether a sample has a bad value among its ``lengths_N`` consecutive ones."""
    hits_N = np.zeros(len(lengths_N), np.bool_)
    if bad.any():
        hits_N[np.searchsorted(np.cumsum(lengths_N), np.flatnonzero(bad), side="right")] = True
    return hits_N


def check_ids(batch: pa.RecordBatch, name: str, lengths_N: NDArray[np.int64], vocab_size: int) -> None:
    """Raise VerificationError for an id outside the vocabulary; samples have ``lengths_N`` ids each."""
    ids = flat(batch, name)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        bad_N = any_per_sample((ids < 0) | (ids >= vocab_size), lengths_N)
        refuse(batch, bad_N, f"{name} has an id outside 0 to {vocab_size - 1}")
