"""What must hold in every row of a capture of draws.

Shapes: N samples of one batch, R rows, K different ids drawn, all of the batch together.
"""

import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.columns import any_per_sample, check_ids, flat, list_lengths, refuse
from xtoken.schemas.manifest import CodecInfo

_ENTROPY_SLACK = 1e-3  # nats: float32, of at most 12 or so
_ROW = np.int64(1) << 32  # beside int32 ids


def check_draws(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int, codec: CodecInfo
) -> NDArray[np.int64]:
    """Check the columns of codec ``sampled``; ``rows_N`` is how many rows each sample has.

    Returns:
        int64 [N], entries of each sample.

    Raises:
        VerificationError: a sample breaks a rule; the message names it and the rule.
    """
    for name in ("drawn", "entropy"):
        refuse(batch, list_lengths(batch, name) != rows_N, f"{name} has another length than its tokens")
    drawn_R = flat(batch, "drawn")
    bad_R = (drawn_R < 1) | (drawn_R > codec.draws)
    refuse(batch, any_per_sample(bad_R, rows_N), f"drawn is not between 1 and {codec.draws}")
    running_R = np.concatenate([[0], np.cumsum(drawn_R, dtype=np.int64)])
    stops_N = np.cumsum(rows_N)
    entries_N: NDArray[np.int64] = running_R[stops_N] - running_R[stops_N - rows_N]
    for name in ("draw_ids", "draw_count"):
        bad_N = list_lengths(batch, name) != entries_N
        refuse(batch, bad_N, f"{name} has not as many entries as drawn says")
    check_ids(batch, "draw_ids", entries_N, vocab_size)
    _check_counts(batch, rows_N, entries_N, codec.draws)
    entropy_R, most = flat(batch, "entropy"), math.log(max(1, vocab_size))
    bad_R = ~((entropy_R >= -_ENTROPY_SLACK) & (entropy_R <= most + _ENTROPY_SLACK))
    refuse(batch, any_per_sample(bad_R, rows_N), f"entropy is not between 0 and {most:.3f} nats")
    return entries_N


def _check_counts(batch: pa.RecordBatch, rows_N: NDArray[np.int64], entries_N: NDArray[np.int64], draws: int) -> None:
    """Every id once in its row, drawn at least once, most draws first, and all draws there."""
    drawn_R, ids_K = flat(batch, "drawn"), flat(batch, "draw_ids").astype(np.int64)
    count_K = flat(batch, "draw_count").astype(np.int64)
    refuse(batch, any_per_sample(count_K < 1, entries_N), "an id was drawn less than once")
    row_K = np.repeat(np.arange(len(drawn_R), dtype=np.int64), drawn_R)
    sum_R = np.bincount(row_K, weights=count_K, minlength=len(drawn_R))
    bad_N = any_per_sample(sum_R != draws, rows_N)
    refuse(batch, bad_N, f"the draws of a row are not {draws}")
    key_K = np.sort(row_K * _ROW + ids_K)
    twice_R = np.zeros(len(drawn_R), np.bool_)
    twice_R[key_K[1:][np.diff(key_K) == 0] // _ROW] = True
    refuse(batch, any_per_sample(twice_R, rows_N), "an id stands twice in one row")
    same_K = np.diff(row_K) == 0
    fewer_K = np.diff(count_K) <= 0
    wrong_R = np.zeros(len(drawn_R), np.bool_)
    wrong_R[row_K[1:][same_K & ~fewer_K]] = True
    refuse(batch, any_per_sample(wrong_R, rows_N), "draws are not in falling order of their counts")
