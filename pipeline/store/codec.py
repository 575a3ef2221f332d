"""The top-k gap codec: a teacher's rows as integers of 1/32 nat.

Kept are entries of at least ``min_p``, at least one and at most ``k``; what is not kept is one
number, REST. The value of a rank is quantised as a whole and stored as its distance to the
rank before, so errors never add up. Nothing is clipped and nothing renormalised.

Shapes: R rows, E entries the engine gave per row, K kept entries of all rows together.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers.base import TeacherRows
from schemas.errors import XtokenError

STEP = 1 / 32
NO_REST = 65535
_LARGEST_GAP = 65535
# Float32 log-probabilities of a whole head sum to one within this; more is no distribution.
_SUM_SLACK = 1e-3


@dataclass(frozen=True)
class Packed:
    """Encoded rows.

    Attributes:
        kept: uint8 [R], entries kept in each row.
        topk_ids: int32 [K], rows in order, rank order within.
        topk_gap: uint16 [K], steps: rank 0 -logprob, later ranks the distance to the rank before.
        rest_gap: uint16 [R], steps: -log of the mass not kept; 65535 = none.
    """

    kept: NDArray[np.uint8]
    topk_ids: NDArray[np.int32]
    topk_gap: NDArray[np.uint16]
    rest_gap: NDArray[np.uint16]


@dataclass(frozen=True)
class Unpacked:
    """Decoded rows: row ``r`` has entries ``offsets[r]:offsets[r + 1]``.

    Attributes:
        offsets: int64 [R + 1].
        ids: int32 [K].
        logprob: float64 [K], nats, not renormalised.
        rest_logprob: float64 [R], nats; -inf = no mass left.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprob: NDArray[np.float64]
    rest_logprob: NDArray[np.float64]


def encode(rows: TeacherRows, *, k: int, min_p: float, vocab_size: int, step: float = STEP) -> Packed:
    """Quantise a sequence's rows.

    Args:
        rows: the engine's entries, most probable first.
        k: most entries kept per row, at most 255.
        min_p: smallest probability kept (one entry is always kept).
        vocab_size: ids from here on (a padded head) are never kept; their mass is REST.
        step: unit of the gaps in nats.

    Raises:
        XtokenError: the rows are no distributions (NaN, not sorted, sum above one), or a gap does not fit.
    """
    logprob_RE = rows.logprob.astype(np.float64)
    _check_rows(logprob_RE)
    keep_RE = _select(rows.ids, logprob_RE, k, min_p, vocab_size)
    kept_R = keep_RE.sum(axis=1)
    level_K = np.floor(-logprob_RE[keep_RE] / step + 0.5).astype(np.int64)
    gap_K = np.diff(level_K, prepend=0)
    starts_R = _starts(kept_R)
    gap_K[starts_R] = level_K[starts_R]
    return Packed(
        kept=kept_R.astype(np.uint8),
        topk_ids=rows.ids[keep_RE].astype(np.int32),
        topk_gap=_fit(gap_K, _LARGEST_GAP, "gap"),
        rest_gap=_rest_gap(logprob_RE, keep_RE, step),
    )


def decode(
    kept: NDArray[Any],
    topk_ids: NDArray[np.int32],
    topk_gap: NDArray[np.uint16],
    rest_gap: NDArray[np.uint16],
    step: float = STEP,
) -> Unpacked:
    """Restore ids and log-probabilities of rows (see ``Packed`` and ``Unpacked`` for shapes)."""
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=offsets[1:])
    running_K = np.cumsum(topk_gap, dtype=np.int64)
    before_R = np.concatenate([np.zeros(1, np.int64), running_K])[offsets[:-1]]
    level_K = running_K - np.repeat(before_R, np.diff(offsets))
    rest_R = np.where(rest_gap == NO_REST, -np.inf, -step * rest_gap.astype(np.float64))
    return Unpacked(offsets, topk_ids, -step * level_K.astype(np.float64), rest_R)


def _check_rows(logprob_RE: NDArray[np.float64]) -> None:
    if np.isnan(logprob_RE).any():
        raise XtokenError("the teacher gave NaN log-probabilities; try --dtype float32")
    if (logprob_RE[:, 1:] > logprob_RE[:, :-1]).any():
        raise XtokenError("the teacher's entries are not sorted by probability; the backend is broken")


def _select(
    ids_RE: NDArray[np.int32], logprob_RE: NDArray[np.float64], k: int, min_p: float, vocab_size: int
) -> NDArray[np.bool_]:
    """Which entries are kept, [R, E]."""
    eligible_RE = (ids_RE < vocab_size) & np.isfinite(logprob_RE)
    if not eligible_RE.any(axis=1).all():
        raise XtokenError(
            f"a teacher row has no entry among the tokenizer's {vocab_size} tokens; this tokenizer is not the teacher's"
        )
    floor = np.log(min_p) if min_p > 0 else -np.inf
    keep_RE: NDArray[np.bool_] = eligible_RE & (logprob_RE >= floor)
    keep_RE[np.arange(len(keep_RE)), eligible_RE.argmax(axis=1)] = True
    return keep_RE & (np.cumsum(keep_RE, axis=1) <= k)


def _starts(kept_R: NDArray[Any]) -> NDArray[np.int64]:
    starts_R: NDArray[np.int64] = np.cumsum(kept_R, dtype=np.int64) - kept_R
    return starts_R


def _rest_gap(logprob_RE: NDArray[np.float64], keep_RE: NDArray[np.bool_], step: float) -> NDArray[np.uint16]:
    """Steps of the complement of the kept mass, [R]."""
    first_R = keep_RE.argmax(axis=1)[:, None]
    top_R1 = np.take_along_axis(logprob_RE, first_R, axis=1)
    share_RE = np.exp(np.where(keep_RE, logprob_RE - top_R1, -np.inf))
    # the largest entry is the 1 inside log1p: nothing is lost where it carries nearly all the mass
    np.put_along_axis(share_RE, first_R, 0.0, axis=1)
    log_kept_R = top_R1[:, 0] + np.log1p(share_RE.sum(axis=1))
    if (log_kept_R > _SUM_SLACK).any():
        total = float(np.exp(log_kept_R.max()))
        raise XtokenError(f"the teacher's probabilities of a row sum to {total:.6f}, above 1; try --dtype float32")
    some_R = log_kept_R < 0.0
    safe_R = np.where(some_R, log_kept_R, -1.0)
    rest_R = np.where(safe_R > -np.log(2.0), np.log(-np.expm1(safe_R)), np.log1p(-np.exp(safe_R)))
    level_R = np.floor(-rest_R / step + 0.5).astype(np.int64)
    return np.where(some_R, _fit(level_R, NO_REST - 1, "REST"), np.uint16(NO_REST)).astype(np.uint16)


def _fit(steps: NDArray[np.int64], largest: int, what: str) -> NDArray[np.uint16]:
    if steps.size and (steps.max() > largest or steps.min() < 0):
        bad = int(steps.max() if steps.max() > largest else steps.min())
        raise XtokenError(f"a {what} of {bad} steps does not fit 0 to {largest}; use a larger step or a larger --min-p")
    return steps.astype(np.uint16)
