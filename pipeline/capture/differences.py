"""How far stored rows are from the same rows scored another way. Absolute differences, in nats.

Shapes: R rows of all samples, one after the other; E entries the other way gave per row; K entries kept, or different
ids drawn, of all rows together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codec import Unpacked
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.unpack import unpack
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.draws import join_draws
from xtoken.schemas.manifest import CodecInfo

# Mass below this is float32 rounding of a sum of probabilities, not a distribution's tail.
_MASS_NOISE = 1e-6


def differences(stored: pa.RecordBatch, codec: CodecInfo, others: Sequence[TeacherRows]) -> dict[str, float]:
    """The figures of ``xtoken.schemas.manifest.AuditRecord``.

    Args:
        stored: samples as readers see them (``topk_ids``, not codes); every one has rows.
        codec: of the capture.
        others: the rows of each sample by the other way, as many as the sample has.
    """
    realised_R = np.concatenate([rows.target_logprob for rows in others]).astype(np.float64)
    gap_R = np.abs(flat(stored, "realised_logprob").astype(np.float64) - realised_R)
    found = {
        "realised_mean": float(gap_R.mean()),
        "realised_p99": float(np.quantile(gap_R, 0.99, method="higher")),
        "realised_max": float(gap_R.max()),
    }
    of_codec = _of_draws if codec.name == "sampled" else _of_entries
    return found | of_codec(stored, codec, others)


def _of_entries(stored: pa.RecordBatch, codec: CodecInfo, others: Sequence[TeacherRows]) -> dict[str, float]:
    rows = unpack(stored, codec)
    ids_RE = np.concatenate([one.ids for one in others])
    logprob_RE = np.concatenate([one.logprob for one in others]).astype(np.float64)
    row_K = _row_of_entry(rows)
    at_K = _find(row_K, rows.ids, ids_RE)
    shared_K = at_K >= 0
    other_K = logprob_RE.ravel()[at_K]
    gap_K = np.abs(rows.logprob - other_K)[shared_K]
    same_R = rows.ids[rows.offsets[:-1]] == ids_RE[:, 0]
    p_K = np.where(shared_K, np.exp(other_K), _most_unseen(row_K[~shared_K], logprob_RE)[row_K])
    kl_R = _kl(rows, row_K, p_K)
    return {
        "entries_mean": float(gap_K.mean()) if len(gap_K) else 0.0,
        "entries_max": float(gap_K.max()) if len(gap_K) else 0.0,
        "same_top1": float(same_R.mean()),
        "ids_in_common": float(shared_K.mean()),
        "kl_mean": float(kl_R.mean()),
    }


def _row_of_entry(rows: Unpacked) -> NDArray[np.int64]:
    """[K] the row that each entry is of."""
    return np.repeat(np.arange(len(rows.rest_logprob)), np.diff(rows.offsets))


def _find(row_K: NDArray[np.int64], ids_K: NDArray[np.int32], ids_RE: NDArray[np.int32]) -> NDArray[np.int64]:
    """[K] where each id stands in its row of ``ids_RE``, as an index into all of it; -1 = nowhere."""
    width = int(max(ids_K.max(), ids_RE.max())) + 1
    known = (np.arange(len(ids_RE))[:, None] * width + ids_RE).ravel()
    wanted_K = row_K * width + ids_K
    order = np.argsort(known, kind="stable")
    at_K = order[np.minimum(np.searchsorted(known[order], wanted_K), len(known) - 1)]
    found_K: NDArray[np.int64] = np.where(known[at_K] == wanted_K, at_K, -1)
    return found_K


def _most_unseen(row_N: NDArray[np.int64], logprob_RE: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] what an entry that a row does not give can weigh: no more than its last, nor than what all share.

    ``row_N`` has the row of each such entry.
    """
    p_RE = np.exp(logprob_RE)
    left_R = np.maximum(1.0 - p_RE.sum(axis=1), 0.0)
    share_R = left_R / np.maximum(np.bincount(row_N, minlength=len(p_RE)), 1)
    most_R: NDArray[np.float64] = np.minimum(p_RE.min(axis=1), share_R)
    return most_R


def _kl(rows: Unpacked, row_K: NDArray[np.int64], p_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] KL(other || stored) over the stored entries and REST, what is stored made to sum to 1.

    ``p_K`` are the other way's probabilities of the stored entries.
    """
    size = len(rows.rest_logprob)
    log_total_R = np.log(np.bincount(row_K, np.exp(rows.logprob), minlength=size) + np.exp(rows.rest_logprob))
    some_K = p_K > 0
    log_p_K = np.log(np.where(some_K, p_K, 1.0))
    inside_K = np.where(some_K, p_K * (log_p_K - rows.logprob + log_total_R[row_K]), 0.0)
    p_rest_R = 1.0 - np.bincount(row_K, p_K, minlength=size)
    some_R = p_rest_R > _MASS_NOISE
    log_p_rest_R = np.log(np.where(some_R, p_rest_R, 1.0))
    log_q_rest_R = np.maximum(rows.rest_logprob - log_total_R, np.log(_MASS_NOISE))
    rest_R = np.where(some_R, p_rest_R * (log_p_rest_R - log_q_rest_R), 0.0)
    kl_R: NDArray[np.float64] = np.maximum(np.bincount(row_K, inside_K, minlength=size) + rest_R, 0.0)
    return kl_R


def _of_draws(stored: pa.RecordBatch, codec: CodecInfo, others: Sequence[TeacherRows]) -> dict[str, float]:
    """Both ways draw with the same numbers, so that equal rows give equal draws."""
    other = join_draws([one.draws for one in others])
    assert other is not None, "the other way was asked for draws"
    gap_R = np.abs(flat(stored, "entropy").astype(np.float64) - other.entropy)
    row_K = np.repeat(np.arange(len(gap_R)), flat(stored, "drawn"))
    row_O = np.repeat(np.arange(len(gap_R)), other.drawn)
    found: dict[str, float] = {"entropy_mean": float(gap_R.mean()), "entropy_max": float(gap_R.max())}
    mine = _counts(row_K, flat(stored, "draw_ids"), flat(stored, "draw_count"))
    theirs = _counts(row_O, other.ids, other.count)
    common = sum(min(count, theirs.get(key, 0)) for key, count in mine.items())
    return {**found, "ids_in_common": common / (codec.draws * len(gap_R))}


def _counts(row: NDArray[Any], ids: NDArray[Any], count: NDArray[Any]) -> dict[tuple[int, int], int]:
    return dict(zip(zip(row.tolist(), ids.tolist(), strict=True), count.tolist(), strict=True))
