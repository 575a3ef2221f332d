"""How far stored entries are from the same rows scored another way. Absolute differences, in nats.

Shapes: R rows of all samples, one after the other; E entries the other way gave per row; K entries stored, of all rows
together.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.rows import Unpacked
from xtoken.pipeline.teachers.base import TeacherRows

# Mass below this is float32 rounding of a sum of probabilities, not a distribution's tail.
_MASS_NOISE = 1e-6


def entry_differences(rows: Unpacked, others: Sequence[TeacherRows]) -> dict[str, float]:
    """Stored entries against those that another way gives of the same rows (``AuditRecord``'s figures of entries)."""
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
    return np.repeat(np.arange(len(rows.tail_logprob)), np.diff(rows.offsets))


def _find(row_K: NDArray[np.int64], ids_K: NDArray[np.int32], ids_RE: NDArray[np.int32]) -> NDArray[np.int64]:
    """[K] where each id stands in its row of ``ids_RE``, as an index into all of it; -1 = nowhere."""
    width = int(max(ids_K.max(), ids_RE.max())) + 1
    known = (np.arange(len(ids_RE))[:, None] * width + ids_RE).ravel()
    wanted_K = row_K * width + ids_K
    order = np.argsort(known, kind="stable")
    at_K = order[np.minimum(np.searchsorted(known[order], wanted_K), len(known) - 1)]
    place_K: NDArray[np.int64] = np.where(known[at_K] == wanted_K, at_K, -1)
    return place_K


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
    """[R] KL(other || stored) over the stored entries and the tail, what is stored made to sum to 1.

    ``p_K`` are the other way's probabilities of the stored entries.
    """
    size = len(rows.tail_logprob)
    log_total_R = np.log(np.bincount(row_K, np.exp(rows.logprob), minlength=size) + np.exp(rows.tail_logprob))
    some_K = p_K > 0
    log_p_K = np.log(np.where(some_K, p_K, 1.0))
    inside_K = np.where(some_K, p_K * (log_p_K - rows.logprob + log_total_R[row_K]), 0.0)
    p_tail_R = 1.0 - np.bincount(row_K, p_K, minlength=size)
    some_R = p_tail_R > _MASS_NOISE
    log_p_tail_R = np.log(np.where(some_R, p_tail_R, 1.0))
    log_q_tail_R = np.maximum(rows.tail_logprob - log_total_R, np.log(_MASS_NOISE))
    tail_R = np.where(some_R, p_tail_R * (log_p_tail_R - log_q_tail_R), 0.0)
    kl_R: NDArray[np.float64] = np.maximum(np.bincount(row_K, inside_K, minlength=size) + tail_R, 0.0)
    return kl_R
