"""The top-k gap codec: a teacher's distributions (rows) as integers of 1/32 nat.

Kept are entries of at least ``min_p``, at least one and at most ``k``; the mass of all others is one
number, the tail mass. The value of a rank is quantised as a whole and stored as its distance to the
rank before, so errors never add up. Nothing is clipped and nothing renormalised.

Shapes: R rows, E entries the engine gave per row, K kept entries of all rows together, n temperatures other than 1.
What is computed of kept entries alone lies in the flat layout of the store, rows one after the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.base import Codec, Read, list_field, rounded_logprob
from xtoken.pipeline.store.codecs.row_stats import RowStats, quantile
from xtoken.pipeline.store.codecs.rows import Unpacked, WholeRows
from xtoken.pipeline.store.columns import any_per_sample, flat, list_lengths, refuse, sums_per_sample
from xtoken.pipeline.store.kernels import RULES, level_table, levels, row_faults, whole_rows
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.codecs import CodecSettings, TopK
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CodecInfo

STEP = 1 / 32
NO_TAIL, TAIL_UNKNOWN = 65535, 65534
NO_ODDS = -32768
_LARGEST_GAP = 65535
# Float32 log-probabilities of a whole head sum to one within this; more is not a distribution.
_SUM_SLACK = 1e-3
# Normalisers at other temperatures are float32 of up to 16 nats, below 1 of up to 1 / tau times as many: a complement
# below this is their rounding.
_TAU_NOISE = 2.0**-20
# Stored rows may sum to one within this beside the half step of rounding: encode refuses what is above 1 + 1e-3, and
# float32 rounding adds nothing of that size.
_CHECK_SLACK = 2e-3
_ALL_TAIL = np.iinfo(np.int16).max
_MEASURED_STEP, _MEASURED_KL = 1 / 32, "2.5e-5"  # of benchmarks/results/codec.md

# Stored in every part, as the columns' metadata: these words are frozen.
_DOC = {
    "topk_codes": "[K] kept teacher tokens by their code in vocab.parquet, rank order",
    "topk_gap": "[K] steps: rank 0 -logprob, later ranks distance to the rank before",
    "rest_gap": "[R] steps: -log of the mass not kept; 65535 = none",
    "tau_rest_odds": "[R * n] steps, a row's n values together: log(REST / kept mass) at each temperature of the "
    "manifest's codec above the first, p(v)^(1/tau) normalised over the whole vocabulary; -32768 = no REST",
}


@dataclass(frozen=True)
class Packed:
    """Encoded rows.

    Attributes:
        kept: uint8 [R], entries kept in each row.
        topk_ids: int32 [K], rows in order, rank order within.
        topk_gap: uint16 [K], steps: rank 0 -logprob, later ranks the distance to the rank before.
        rest_gap: uint16 [R], steps: -log of the mass not kept; 65535 = none.
        tau_rest_odds: int16 [R * n], a row's n values together: log(tail / kept mass) at other temperatures in steps,
            as exact where the tail is nearly everything as where it is nearly nothing; -32768 = none; None without any.
    """

    kept: NDArray[np.uint8]
    topk_ids: NDArray[np.int32]
    topk_gap: NDArray[np.uint16]
    rest_gap: NDArray[np.uint16]
    tau_rest_odds: NDArray[np.int16] | None = None


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
        vocab_size: ids from here on (a padded head) are never kept; their mass is in the tail.
        step: unit of the gaps in nats.
        temperatures: the n of ``rows.tau_lognorm`` (1 is not among them): what is kept at temperature 1 is kept at
            all, p_tau(v) = p(v)^(1/tau) / sum over the whole output head, and the tail is what the kept entries leave.

    Raises:
        XtokenError: the rows are not distributions (NaN, not sorted, sum above one), or a gap does not fit.
    """
    _check_rows(rows.logprob)
    keep_RE = _select(rows.ids, rows.logprob, k, min_p, vocab_size)
    kept_R = np.count_nonzero(keep_RE, axis=1)
    logprob_K = rows.logprob[keep_RE].astype(np.float64)
    packed = pack(kept_R, rows.ids[keep_RE], logprob_K, step)
    if not temperatures:
        return packed
    return replace(packed, tau_rest_odds=_tau_tail_odds(rows, logprob_K, kept_R, step, temperatures))


def pack(
    kept_R: NDArray[np.int64],
    ids_K: NDArray[np.int32],
    logprob_K: NDArray[np.float64],
    step: float = STEP,
    *,
    tail_known: bool = True,
    tailless_R: NDArray[np.bool_] | None = None,
) -> Packed:
    """Quantise rows of which is known what is kept.

    Args:
        kept_R: entries of each row, at most 255; of a row without any the tail is everything.
        ids_K, logprob_K: in rank order; nats.
        step: unit of the gaps in nats.
        tail_known: the tail mass is what the entries leave; else it is unknown.
        tailless_R: rows whose entries are everything, whatever rounding leaves of 1.

    Raises:
        XtokenError: a row sums to more than one, or a gap does not fit.
    """
    starts_R = _starts(kept_R)[kept_R > 0]
    level_K = np.floor(logprob_K / -step + 0.5).astype(np.int64)
    gap_K = level_K.copy()
    gap_K[1:] -= level_K[:-1]
    gap_K[starts_R] = level_K[starts_R]
    tail_R = np.zeros(len(kept_R), np.uint16)
    if len(starts_R):
        tail_F = _tail_gap(_log_kept(logprob_K, kept_R[kept_R > 0], starts_R), step)
        tail_R[kept_R > 0] = tail_F if tail_known else TAIL_UNKNOWN
    if tailless_R is not None:
        tail_R[tailless_R] = NO_TAIL
    return Packed(
        kept=kept_R.astype(np.uint8),
        topk_ids=ids_K.astype(np.int32, copy=False),
        topk_gap=_fit(gap_K, _LARGEST_GAP, "gap"),
        rest_gap=tail_R,
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
    level_K = levels(kept, topk_gap)
    tail_R = np.where(rest_gap == NO_TAIL, -np.inf, -step * rest_gap.astype(np.float64))
    tail_R[rest_gap == TAIL_UNKNOWN] = np.nan
    logprob_K: NDArray[np.float64] = level_K * np.float64(-step)
    return Unpacked(offsets, topk_ids, logprob_K, tail_R)


def decode_tau_tail(
    odds: NDArray[np.int16], temperatures: Sequence[float], tau: float, step: float
) -> NDArray[np.float64]:
    """Tail mass of rows at another temperature than 1, as captured.

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
            f"the tail mass at temperature {tau:g} is not in this capture (it holds {held}); "
            f"capture again with --temperatures {tau:g}"
        )
    odds_R = odds.reshape(-1, len(others))[:, others.index(tau)]
    return np.where(odds_R == NO_ODDS, -np.inf, -np.logaddexp(0.0, -step * odds_R.astype(np.float64)))


def _check_rows(logprob_RE: NDArray[np.float32]) -> None:
    # NaN is neither more nor less than anything: beyond the first column this finds it, too
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


def _tau_tail_odds(
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
        raise XtokenError("the teacher gave normalisers that are NaN or inf; try --dtype float32")
    odds = []
    for tau, lognorm_R in zip(temperatures, lognorm_Rn.T, strict=True):
        log_kept_R = _log_kept(logprob_K / tau - np.repeat(lognorm_R, kept_R), kept_R, _starts(kept_R))
        some_R, tail_R = _complement(log_kept_R, _TAU_NOISE * max(1.0, 1.0 / tau))
        level_R = np.floor((tail_R - log_kept_R) / step + 0.5).astype(np.int64)
        if (np.abs(level_R[some_R]) > -NO_ODDS - 1).any():
            raise XtokenError(
                f"a tail mass at temperature {tau:g} does not fit 15 bits of {step:g} nats; use a lower temperature"
            )
        odds.append(np.where(some_R, level_R, NO_ODDS).astype(np.int16))
    return np.stack(odds, axis=1).ravel()


def _tail_gap(log_kept_R: NDArray[np.float64], step: float) -> NDArray[np.uint16]:
    """Steps of the complement of the kept mass, [R]."""
    some_R, tail_R = _complement(log_kept_R, 0.0)
    level_R = np.floor(-tail_R / step + 0.5).astype(np.int64)
    return np.where(some_R, _fit(level_R, NO_TAIL - 1, "tail mass"), np.uint16(NO_TAIL)).astype(np.uint16)


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
    with np.errstate(divide="ignore"):  # of the branch that is not taken
        return some_R, np.where(safe_R > -np.log(2.0), np.log(-np.expm1(safe_R)), np.log1p(-np.exp(safe_R)))


def _fit(steps: NDArray[np.int64], largest: int, what: str) -> NDArray[np.uint16]:
    if steps.size and (steps.max() > largest or steps.min() < 0):
        bad = int(steps.max() if steps.max() > largest else steps.min())
        raise XtokenError(f"a {what} of {bad} steps does not fit 0 to {largest}; use a larger step or a larger --min-p")
    return steps.astype(np.uint16)


class TopKCodec(Codec):
    """The most probable entries in steps of their log-probability, and the tail mass; see the module."""

    columns = ("kept", "topk_ids", "topk_gap", "rest_gap")
    sql_types = ("UTINYINT[]", "INTEGER[]", "USMALLINT[]")

    @classmethod
    def record(cls, settings: CodecSettings) -> CodecInfo:
        """See ``Codec.record``."""
        assert isinstance(settings, TopK)
        others = [1.0, *settings.temperatures]
        return CodecInfo(name="topk", k=settings.k, min_p=settings.min_p, step=STEP, temperatures=others)

    @property
    def identity(self) -> dict[str, Any]:
        """See ``Codec.identity``; the run.json of a release that had no other codec does not name it."""
        return {"k": self.info.k, "min_p": self.info.min_p, "step": self.info.step}

    @property
    def brief(self) -> str:
        """See ``Codec.brief``."""
        return f"k {self.info.k}, min_p {self.info.min_p:g}"

    @property
    def others(self) -> list[float]:
        """Temperatures other than 1 at which the tail mass is stored."""
        return self.info.temperatures[1:]

    @property
    def fields(self) -> list[pa.Field]:
        """See ``Codec.fields``."""
        return [
            list_field("kept", pa.uint8(), "[R] entries kept in the row, 1 to k"),
            list_field("topk_codes", pa.int32(), _DOC["topk_codes"]),
            list_field("topk_gap", pa.uint16(), _DOC["topk_gap"]),
            list_field("rest_gap", pa.uint16(), _DOC["rest_gap"]),
        ]

    @property
    def last_fields(self) -> list[pa.Field]:
        """See ``Codec.last_fields``."""
        return [list_field("tau_rest_odds", pa.int16(), _DOC["tau_rest_odds"])] if self.others else []

    def encode(self, rows: TeacherRows, vocab_size: int) -> Packed:
        """See ``Codec.encode``."""
        info = self.info
        return encode(rows, k=info.k, min_p=info.min_p, vocab_size=vocab_size, step=info.step, temperatures=self.others)

    def no_rows(self) -> Packed:
        """See ``Codec.no_rows``."""
        none = np.zeros(0, np.uint16)
        return Packed(np.zeros(0, np.uint8), np.zeros(0, np.int32), none, none, np.zeros(0, np.int16))

    def decode(self, batch: pa.RecordBatch) -> Unpacked:
        """See ``Codec.decode``."""
        kept, ids, gap, tail = (flat(batch, name) for name in self.columns)
        return decode(kept, ids, gap, tail, self.info.step)

    def lengths(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> Mapping[str, NDArray[np.int64]]:
        """See ``Codec.lengths``."""
        entries_N = sums_per_sample(batch, "kept")
        wanted = {"kept": rows_N, "rest_gap": rows_N, "topk_ids": entries_N, "topk_gap": entries_N}
        return wanted | ({"tau_rest_odds": rows_N * len(self.others)} if self.others else {})

    def filled(self, name: str) -> tuple[int, float]:
        """See ``Codec.filled``: no entry is kept, and the tail is everything."""
        per_row = {"kept": (1, 0), "rest_gap": (1, 0), "tau_rest_odds": (len(self.others), _ALL_TAIL)}
        return per_row.get(name, (0, 0))

    def check(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
        """See ``Codec.check``."""
        for name in ("kept", "rest_gap"):
            refuse(batch, list_lengths(batch, name) != rows_N, f"{name} has another length than its tokens")
        if self.others:
            bad_N = list_lengths(batch, "tau_rest_odds") != rows_N * len(self.others)
            refuse(batch, bad_N, f"tau_rest_odds has not {len(self.others)} values for each row")
        kept_R = flat(batch, "kept")
        least = 0 if self.empty_rows else 1
        bad_N = any_per_sample((kept_R < least) | (kept_R > self.info.k), rows_N)
        refuse(batch, bad_N, f"kept is not between {least} and {self.info.k}")
        entries_N = sums_per_sample(batch, "kept")
        for name in ("topk_ids", "topk_gap"):
            refuse(batch, list_lengths(batch, name) != entries_N, f"{name} has not as many entries as kept says")
        self._check_rows(batch, rows_N, vocab_size)
        return entries_N

    def _check_rows(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int) -> None:
        """Ids lie in the vocabulary, none twice in a row, and a row sums to one within half a step of quantisation."""
        step = self.info.step
        kept, ids, gap, tail = (flat(batch, name) for name in self.columns)
        fault_R = row_faults(kept, ids, gap, tail, vocab_size, step, _CHECK_SLACK, level_table(step))
        for fault, rule in enumerate(RULES[1:], 1):
            refuse(batch, any_per_sample(fault_R == fault, rows_N), rule.format(vocab_size - 1))

    def whole(self, batch: pa.RecordBatch) -> WholeRows:
        """See ``Codec.whole``: rows over what they add up to, which rounding moves from 1."""
        kept, ids, gap, tail_gap = (flat(batch, name) for name in self.columns)
        step = self.info.step
        offsets, logprob_K, p_K, tail_R, entropy_R, top1_R = whole_rows(kept, gap, tail_gap, step, level_table(step))
        return WholeRows(offsets, ids, logprob_K, p_K, tail_R, entropy_R, top1_R)

    def tail_at(self, batch: pa.RecordBatch, tau: float, rows: int) -> NDArray[np.float64]:
        """See ``Codec.tail_at``."""
        if tau not in self.others:
            return super().tail_at(batch, tau, rows)
        return decode_tau_tail(flat(batch, "tau_rest_odds"), self.info.temperatures, tau, self.info.step)

    def count(self, stats: RowStats, batch: pa.RecordBatch, labels_R: NDArray[np.int32]) -> None:
        """See ``Codec.count``."""
        super().count(stats, batch, labels_R)
        stats.add_tail(flat(batch, "rest_gap"))

    def estimate(self, read: Read) -> dict[str, Any]:
        """See ``Codec.estimate``."""
        rows, entries, tails = 0, 0, [np.zeros(0)]
        for batch in read(("kept", "rest_gap")):
            kept_R, steps_R = flat(batch, "kept"), flat(batch, "rest_gap")
            rows, entries = rows + len(kept_R), entries + int(kept_R.sum())
            tails.append(np.where(steps_R == NO_TAIL, 0.0, np.exp(-self.info.step * steps_R.astype(np.float64))))
        tail_R = np.concatenate(tails)
        return {
            "entries_per_row": entries / max(rows, 1),
            "mass_not_kept_mean": float(tail_R.mean()) if rows else 0.0,
            "mass_not_kept_rms": float(np.sqrt((tail_R**2).mean())) if rows else 0.0,
        }

    @property
    def sentence(self) -> str:
        """See ``Codec.sentence``."""
        others = ", ".join(f"{tau:g}" for tau in self.others)
        return (
            f"codec `topk`: the entries of probability {self.info.min_p:g} and more, at least 1 and at most "
            f"{self.info.k}, and the tail mass (of all others together), in steps of {self.info.step:g} nats"
            + (f"; the tail mass also at temperatures {others}" if others else "")
        )

    def fidelity(self, stats: RowStats) -> tuple[list[tuple[str, object]], str]:
        """See ``Codec.fidelity``."""
        quantiles = [f"{stats.tail_quantile(share):.4f}" for share in (0.5, 0.9, 0.99)]
        entries = [quantile(stats.entries, share) for share in (0.5, 0.9, 0.99)]
        rows: list[tuple[str, object]] = [
            ("tail mass, mean", f"{stats.tail_moment(1):.4f}"),
            ("tail mass, root mean square", f"{stats.tail_moment(2) ** 0.5:.4f}"),
            ("tail mass, median, 90 %, 99 %", ", ".join(quantiles)),
            ("entries per row, median, 90 %, 99 %", ", ".join(map(str, entries))),
            ("entropy, the tail as one cell, mean in nats", stats.entropy_nats / stats.rows),
            ("token of the text is the first entry", f"{stats.share_within(1):.1%}"),
            ("token of the text is among the first 5", f"{stats.share_within(5):.1%}"),
            ("token of the text is kept", f"{stats.share_within(len(stats.rank)):.1%}"),
        ]
        step = self.info.step
        note = (
            "The tail mass is one stored number and never renormalised away, so the entries kept are exact up to "
            f"rounding to {step:g} nats. That rounding costs a KL of at most {step * step / 8:.1e} nats per row once a "
            "row is made to sum to 1 (Hoeffding's lemma: every logarithm is within half a step)"
        )
        measured = f"; on real rows xtoken's `benchmarks/results/codec.md` has {_MEASURED_KL} on average"
        return rows, note + (measured if step == _MEASURED_STEP else "") + "."

    @property
    def limits(self) -> list[str]:
        """See ``Codec.limits``."""
        taus = ", ".join(f"{tau:g}" for tau in self.info.temperatures)
        return [
            "Which tokens share the tail mass is not known, only how much they have together.",
            f"The tail mass is stored at temperature {taus}; at others it cannot be derived exactly.",
        ]

    def sql_logprob(self, count_R: NDArray[np.int64], value_K: NDArray[np.int64]) -> NDArray[np.float64]:
        """See ``Codec.sql_logprob``."""
        none = np.zeros(0, np.uint16)
        return decode(count_R, none.astype(np.int32), value_K.astype(np.uint16), none, self.info.step).logprob

    @property
    def unit(self) -> float:
        """See ``Codec.unit``."""
        return self.info.step

    def described(self, row: Mapping[str, Any], rows: Unpacked, at: int) -> dict[str, Any]:
        """See ``Codec.described``; the tail mass at each temperature."""
        shown = super().described(row, rows, at)
        if not self.others:
            return shown
        odds, info = np.asarray(row["tau_rest_odds"]), self.info
        tail = {f"{tau:g}": decode_tau_tail(odds, info.temperatures, tau, info.step)[at] for tau in self.others}
        return {**shown, "tau_rest_logprob": {tau: rounded_logprob(value) for tau, value in tail.items()}}


CODEC = TopKCodec
