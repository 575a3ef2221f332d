"""The top-k gap codec: a teacher's rows as integers of 1/32 nat.

Kept are entries of at least ``min_p``, at least one and at most ``k``; what is not kept is one
number, REST. The value of a rank is quantised as a whole and stored as its distance to the
rank before, so errors never add up. Nothing is clipped and nothing renormalised.

Shapes: R rows, E entries the engine gave per row, K kept entries of all rows together, n temperatures other than 1.
What is computed of kept entries alone lies in the flat layout of the store, rows one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.errors import XtokenError

STEP = 1 / 32
NO_REST = 65535
NO_ODDS = -32768
_LARGEST_GAP = 65535
# Float32 log-probabilities of a whole head sum to one within this; more is no distribution.
_SUM_SLACK = 1e-3
# Normalisers at other temperatures are float32 of up to 16 nats, below 1 of up to 1 / tau times as many: a complement
# below this is their rounding.
_TAU_NOISE = 2.0**-20


@dataclass(frozen=True)
class Packed:
    """Encoded rows.

    Attributes:
        kept: uint8 [R], entries kept in each row.
        topk_ids: int32 [K], rows in order, rank order within.
        topk_gap: uint16 [K], steps: rank 0 -logprob, later ranks the distance to the rank before.
        rest_gap: uint16 [R], steps: -log of the mass not kept; 65535 = none.
        tau_rest_odds: int16 [R * n], a row's n values together: log(REST / kept mass) at other temperatures in steps,
            as exact where REST is nearly everything as where it is nearly nothing; -32768 = none; None without any.
    """

    kept: NDArray[np.uint8]
    topk_ids: NDArray[np.int32]
    topk_gap: NDArray[np.uint16]
    rest_gap: NDArray[np.uint16]
    tau_rest_odds: NDArray[np.int16] | None = None


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


def encode(
    rows: TeacherRows,
    *,
    k: int,
    min_p: float,
    vocab_size: int,
    step: float = STEP,
    temperatures: Sequence[float] = (),
) -> Packed:
    """Quantise a sequence's rows.

    Args:
        rows: the engine's entries, most probable first.
        k: most entries kept per row, at most 255.
        min_p: smallest probability kept (one entry is always kept).
        vocab_size: ids from here on (a padded head) are never kept; their mass is REST.
        step: unit of the gaps in nats.
        temperatures: the n of ``rows.tau_lognorm`` (1 is not among them): what is kept at temperature 1 is kept at
            all, p_tau(v) = p(v)^(1/tau) / sum over the whole output head, and REST is what the kept entries leave.

    Raises:
        XtokenError: the rows are no distributions (NaN, not sorted, sum above one), or a gap does not fit.
    """
    _check_rows(rows.logprob)
    keep_RE = _select(rows.ids, rows.logprob, k, min_p, vocab_size)
    kept_R = np.count_nonzero(keep_RE, axis=1)
    starts_R = _starts(kept_R)
    logprob_K = rows.logprob[keep_RE].astype(np.float64)
    level_K = np.floor(logprob_K / -step + 0.5).astype(np.int64)
    gap_K = level_K.copy()
    gap_K[1:] -= level_K[:-1]
    gap_K[starts_R] = level_K[starts_R]
    return Packed(
        kept=kept_R.astype(np.uint8),
        topk_ids=rows.ids[keep_RE].astype(np.int32, copy=False),
        topk_gap=_fit(gap_K, _LARGEST_GAP, "gap"),
        rest_gap=_rest_gap(_log_kept(logprob_K, kept_R, starts_R), step),
        tau_rest_odds=_tau_rest_odds(rows, logprob_K, kept_R, step, temperatures) if temperatures else None,
    )


def decode(
    kept: NDArray[Any],
    topk_ids: NDArray[np.int32],
    topk_gap: NDArray[np.uint16],
    rest_gap: NDArray[np.uint16],
    step: float = STEP,
) -> Unpacked:
    """Restore ids and log-probabilities of rows (see ``Packed`` and ``Unpacked`` for shapes)."""
    from xtoken.pipeline.store.kernels import levels

    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=offsets[1:])
    level_K = levels(kept, topk_gap)
    rest_R = np.where(rest_gap == NO_REST, -np.inf, -step * rest_gap.astype(np.float64))
    logprob_K: NDArray[np.float64] = level_K * np.float64(-step)
    return Unpacked(offsets, topk_ids, logprob_K, rest_R)


def decode_tau_rest(
    odds: NDArray[np.int16], temperatures: Sequence[float], tau: float, step: float
) -> NDArray[np.float64]:
    """REST of rows at another temperature than 1, as captured.

    Args:
        odds: int16 [R * n], ``tau_rest_odds`` of any number of rows.
        temperatures: the list of the manifest's codec: 1, then the n temperatures of ``odds``.
        tau: the wanted one of these n.
        step: unit of the odds in nats.

    Returns:
        float64 [R], nats: log of the mass not kept at ``tau``; -inf = none.

    Raises:
        XtokenError: the capture holds nothing at ``tau``.
    """
    others = list(temperatures[1:])
    if tau not in others:
        held = ", ".join(f"{value:g}" for value in others) or "none but 1"
        raise XtokenError(
            f"REST at temperature {tau:g} is not in this capture (it holds {held}); "
            f"capture again with --temperatures {tau:g}"
        )
    odds_R = odds.reshape(-1, len(others))[:, others.index(tau)]
    return np.where(odds_R == NO_ODDS, -np.inf, -np.logaddexp(0.0, -step * odds_R.astype(np.float64)))


def _check_rows(logprob_RE: NDArray[np.float32]) -> None:
    # NaN is no more and no less than anything: beyond the first column this finds it, too
    if (logprob_RE[:, 1:] <= logprob_RE[:, :-1]).all() and not np.isnan(logprob_RE[:, :1]).any():
        return
    if np.isnan(logprob_RE).any():
        raise XtokenError("the teacher gave NaN log-probabilities; try --dtype float32")
    raise XtokenError("the teacher's entries are not sorted by probability; the backend is broken")


def _select(
    ids_RE: NDArray[np.int32], logprob_RE: NDArray[np.float32], k: int, min_p: float, vocab_size: int
) -> NDArray[np.bool_]:
    """Which entries are kept, [R, E]."""
    floor = np.log(min_p) if min_p > 0 else -np.inf
    above_RE: NDArray[np.bool_] = logprob_RE >= floor
    eligible_RE = (ids_RE < vocab_size) & np.isfinite(logprob_RE)
    if eligible_RE.all():  # nearly always: what is kept is then the beginning of each row
        kept_R = np.minimum(np.maximum(np.count_nonzero(above_RE, axis=1), 1), k)
        first_RE: NDArray[np.bool_] = np.arange(ids_RE.shape[1]) < kept_R[:, None]
        return first_RE
    if not eligible_RE.any(axis=1).all():
        raise XtokenError(
            f"a teacher row has no entry among the tokenizer's {vocab_size} tokens; this tokenizer is not the teacher's"
        )
    keep_RE: NDArray[np.bool_] = eligible_RE & above_RE
    keep_RE[np.arange(len(keep_RE)), eligible_RE.argmax(axis=1)] = True
    keep_RE &= np.cumsum(keep_RE, axis=1) <= k
    return keep_RE


def _starts(kept_R: NDArray[Any]) -> NDArray[np.int64]:
    starts_R: NDArray[np.int64] = np.cumsum(kept_R, dtype=np.int64) - kept_R
    return starts_R


def _tau_rest_odds(
    rows: TeacherRows,
    logprob_K: NDArray[np.float64],
    kept_R: NDArray[np.int64],
    step: float,
    temperatures: Sequence[float],
) -> NDArray[np.int16]:
    """``tau_rest_odds``, flat [R * n]."""
    assert rows.tau_lognorm is not None, "the backend was asked for normalisers"
    assert rows.tau_lognorm.shape == (len(rows.ids), len(temperatures))
    lognorm_Rn = rows.tau_lognorm.astype(np.float64)
    if not np.isfinite(lognorm_Rn).all():
        raise XtokenError("the teacher gave normalisers that are no numbers; try --dtype float32")
    odds = []
    for tau, lognorm_R in zip(temperatures, lognorm_Rn.T, strict=True):
        log_kept_R = _log_kept(logprob_K / tau - np.repeat(lognorm_R, kept_R), kept_R, _starts(kept_R))
        some_R, rest_R = _complement(log_kept_R, _TAU_NOISE * max(1.0, 1.0 / tau))
        level_R = np.floor((rest_R - log_kept_R) / step + 0.5).astype(np.int64)
        if (np.abs(level_R[some_R]) > -NO_ODDS - 1).any():
            raise XtokenError(
                f"REST at temperature {tau:g} does not fit 15 bits of {step:g} nats; use a lower temperature"
            )
        odds.append(np.where(some_R, level_R, NO_ODDS).astype(np.int16))
    return np.stack(odds, axis=1).ravel()


def _rest_gap(log_kept_R: NDArray[np.float64], step: float) -> NDArray[np.uint16]:
    """Steps of the complement of the kept mass, [R]."""
    some_R, rest_R = _complement(log_kept_R, 0.0)
    level_R = np.floor(-rest_R / step + 0.5).astype(np.int64)
    return np.where(some_R, _fit(level_R, NO_REST - 1, "REST"), np.uint16(NO_REST)).astype(np.uint16)


def _log_kept(
    logprob_K: NDArray[np.float64], kept_R: NDArray[np.int64], starts_R: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Log of the kept mass, [R] nats."""
    top_R = logprob_K[starts_R]
    share_K = np.exp(logprob_K - np.repeat(top_R, kept_R))
    # the largest entry is the 1 inside log1p: nothing is lost where it carries nearly all the mass
    share_K[starts_R] = 0.0
    log_kept_R: NDArray[np.float64] = top_R + np.log1p(np.add.reduceat(share_K, starts_R))
    if (log_kept_R > _SUM_SLACK).any():
        total = float(np.exp(log_kept_R.max()))
        raise XtokenError(f"the teacher's probabilities of a row sum to {total:.6f}, above 1; try --dtype float32")
    return log_kept_R


def _complement(log_kept_R: NDArray[np.float64], noise: float) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether more than ``noise`` is left to 1, and the log of what is, [R] each."""
    some_R = log_kept_R < -noise
    safe_R = np.where(some_R, log_kept_R, -1.0)
    return some_R, np.where(safe_R > -np.log(2.0), np.log(-np.expm1(safe_R)), np.log1p(-np.exp(safe_R)))


def _fit(steps: NDArray[np.int64], largest: int, what: str) -> NDArray[np.uint16]:
    if steps.size and (steps.max() > largest or steps.min() < 0):
        bad = int(steps.max() if steps.max() > largest else steps.min())
        raise XtokenError(f"a {what} of {bad} steps does not fit 0 to {largest}; use a larger step or a larger --min-p")
    return steps.astype(np.uint16)
