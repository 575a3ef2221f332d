"""The codec of sampled tokens: how often each teacher id was sampled from a whole distribution (row), and the row's
exact entropy.

Shares of the sampled tokens are an unbiased estimate of the row's probabilities, and so is everything that is linear in
them; nothing else is: no logarithm, no ratio, no order by size. There is no tail: the tokens are of the whole row.

Shapes: R rows, K different ids sampled, all rows together; N samples of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.base import Codec, Read, list_field
from xtoken.pipeline.store.codecs.row_stats import RowStats, quantile
from xtoken.pipeline.store.codecs.rows import Unpacked, WholeRows
from xtoken.pipeline.store.columns import any_per_sample, check_ids, flat, list_lengths, refuse, sums_per_sample
from xtoken.pipeline.store.kernels import row_figures
from xtoken.pipeline.teachers.base import Draws, TeacherRows
from xtoken.pipeline.teachers.draws import join_draws
from xtoken.schemas.codecs import CodecSettings, Sampled
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CodecInfo

_ENTROPY_SLACK = 1e-3  # nats: float32, of at most 12 or so
_ROW = np.int64(1) << 32  # beside int32 ids
# Stored in every part, as the columns' metadata: these words are frozen.
_DOC = {
    "drawn": "[R] different tokens drawn in the row",
    "draw_codes": "[K] these tokens by their code in vocab.parquet, most draws first",
    "draw_count": "[K] draws of each; a row's add up to the manifest's codec.draws",
    "entropy": "[R] nats: entropy of the whole row",
}


@dataclass(frozen=True)
class PackedDraws:
    """Encoded rows.

    Attributes:
        drawn: uint16 [R], different tokens sampled in each row.
        draw_ids: int32 [K], rows in order, most often sampled first, then ascending.
        draw_count: uint16 [K], how often each was sampled.
        entropy: float32 [R], nats, of the whole row.
    """

    drawn: NDArray[np.uint16]
    draw_ids: NDArray[np.int32]
    draw_count: NDArray[np.uint16]
    entropy: NDArray[np.float32]

    @classmethod
    def empty(cls) -> "PackedDraws":
        """No rows."""
        few = np.zeros(0, np.uint16)
        return cls(few, np.zeros(0, np.int32), few, np.zeros(0, np.float32))


def encode_draws(sampled: Draws, *, draws: int, vocab_size: int) -> PackedDraws:
    """Sampled tokens of a sequence's rows as they are stored.

    Args:
        sampled: the engine's.
        draws: sampled tokens of each row, at most 65535.
        vocab_size: ids are below.

    Raises:
        XtokenError: an entropy is NaN, inf or negative, a row has another number of samples, or an id is not in the
            vocabulary.
    """
    if not (np.isfinite(sampled.entropy) & (sampled.entropy >= 0)).all():
        raise XtokenError("the teacher gave a row whose entropy is NaN, inf or negative; try --dtype float32")
    row_K = np.repeat(np.arange(len(sampled.drawn)), sampled.drawn)
    assert len(row_K) == len(sampled.ids) == len(sampled.count), "sampled tokens of other lengths"
    sum_R = np.bincount(row_K, weights=sampled.count, minlength=len(sampled.drawn))
    if (sum_R != draws).any() or (sampled.count < 1).any():
        raise XtokenError(
            f"a teacher row has {sum_R[(sum_R != draws).argmax()]:g} sampled tokens, not {draws}; the backend is broken"
        )
    if len(sampled.ids) and (sampled.ids.min() < 0 or sampled.ids.max() >= vocab_size):
        raise XtokenError(f"an id outside 0 to {vocab_size - 1} was sampled; the backend is broken")
    return PackedDraws(
        sampled.drawn.astype(np.uint16),
        sampled.ids.astype(np.int32),
        sampled.count.astype(np.uint16),
        sampled.entropy.astype(np.float32),
    )


def decode_draws(
    drawn: NDArray[Any], draw_ids: NDArray[np.int32], draw_count: NDArray[np.uint16], draws: int
) -> Unpacked:
    """Rows whose probabilities are shares of the sampled tokens (see ``PackedDraws`` for shapes); none has a tail."""
    offsets = np.zeros(len(drawn) + 1, np.int64)
    np.cumsum(drawn, out=offsets[1:])
    logprob_K = np.log(draw_count.astype(np.float64) / draws)
    return Unpacked(offsets, draw_ids, logprob_K, np.full(len(drawn), -np.inf))


def _check_counts(batch: pa.RecordBatch, rows_N: NDArray[np.int64], entries_N: NDArray[np.int64], draws: int) -> None:
    """Every id once in its row, sampled at least once, most often sampled first, and all sampled tokens there."""
    drawn_R, ids_K = flat(batch, "drawn"), flat(batch, "draw_ids").astype(np.int64)
    count_K = flat(batch, "draw_count").astype(np.int64)
    refuse(batch, any_per_sample(count_K < 1, entries_N), "an id was sampled less than once")
    row_K = np.repeat(np.arange(len(drawn_R), dtype=np.int64), drawn_R)
    sum_R = np.bincount(row_K, weights=count_K, minlength=len(drawn_R))
    bad_N = any_per_sample(sum_R != draws, rows_N)
    refuse(batch, bad_N, f"the sampled tokens of a row are not {draws}")
    key_K = np.sort(row_K * _ROW + ids_K)
    twice_R = np.zeros(len(drawn_R), np.bool_)
    twice_R[key_K[1:][np.diff(key_K) == 0] // _ROW] = True
    refuse(batch, any_per_sample(twice_R, rows_N), "an id stands twice in one row")
    same_K = np.diff(row_K) == 0
    fewer_K = np.diff(count_K) <= 0
    wrong_R = np.zeros(len(drawn_R), np.bool_)
    wrong_R[row_K[1:][same_K & ~fewer_K]] = True
    refuse(batch, any_per_sample(wrong_R, rows_N), "sampled tokens are not in falling order of their counts")


def _by_token(row: NDArray[Any], ids: NDArray[Any], count: NDArray[Any]) -> dict[tuple[int, int], int]:
    return dict(zip(zip(row.tolist(), ids.tolist(), strict=True), count.tolist(), strict=True))


class SampledCodec(Codec):
    """Sampled tokens with their counts, and the entropy of the whole row; see the module."""

    columns = ("drawn", "draw_ids", "draw_count")
    sql_types = ("USMALLINT[]", "INTEGER[]", "USMALLINT[]")
    entries_label = "different sampled tokens per row"
    plot_label = "different tokens sampled in a row"

    @classmethod
    def record(cls, settings: CodecSettings) -> CodecInfo:
        """See ``Codec.record``."""
        assert isinstance(settings, Sampled)
        return CodecInfo(name="sampled", draws=settings.draws, seed=settings.seed)

    @property
    def brief(self) -> str:
        """See ``Codec.brief``."""
        return f"{self.info.draws} sampled tokens"

    @property
    def fields(self) -> list[pa.Field]:
        """See ``Codec.fields``."""
        kinds = {"drawn": pa.uint16(), "draw_codes": pa.int32(), "draw_count": pa.uint16(), "entropy": pa.float32()}
        return [list_field(name, kind, _DOC[name]) for name, kind in kinds.items()]

    @property
    def whole_columns(self) -> tuple[str, ...]:
        """See ``Codec.whole_columns``."""
        return (*self.columns, "entropy")

    def encode(self, rows: TeacherRows, vocab_size: int) -> PackedDraws:
        """See ``Codec.encode``."""
        assert rows.draws is not None, "the backend was asked for sampled tokens"
        return encode_draws(rows.draws, draws=self.info.draws, vocab_size=vocab_size)

    def no_rows(self) -> PackedDraws:
        """See ``Codec.no_rows``."""
        return PackedDraws.empty()

    def decode(self, batch: pa.RecordBatch) -> Unpacked:
        """See ``Codec.decode``."""
        drawn, ids, count = (flat(batch, name) for name in self.columns)
        return decode_draws(drawn, ids, count, self.info.draws)

    def lengths(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> Mapping[str, NDArray[np.int64]]:
        """See ``Codec.lengths``."""
        entries_N = sums_per_sample(batch, "drawn")
        return {"drawn": rows_N, "entropy": rows_N, "draw_ids": entries_N, "draw_count": entries_N}

    def filled(self, name: str) -> tuple[int, float]:
        """See ``Codec.filled``."""
        return {"drawn": (1, 0), "entropy": (1, np.nan)}.get(name, (0, 0))

    def check(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
        """See ``Codec.check``."""
        draws = self.info.draws
        for name in ("drawn", "entropy"):
            refuse(batch, list_lengths(batch, name) != rows_N, f"{name} has another length than its tokens")
        drawn_R = flat(batch, "drawn")
        bad_R = (drawn_R < 1) | (drawn_R > draws)
        refuse(batch, any_per_sample(bad_R, rows_N), f"drawn is not between 1 and {draws}")
        entries_N = sums_per_sample(batch, "drawn")
        for name in ("draw_ids", "draw_count"):
            bad_N = list_lengths(batch, name) != entries_N
            refuse(batch, bad_N, f"{name} has not as many entries as drawn says")
        check_ids(batch, "draw_ids", entries_N, vocab_size)
        _check_counts(batch, rows_N, entries_N, draws)
        entropy_R, most = flat(batch, "entropy"), math.log(max(1, vocab_size))
        bad_R = ~((entropy_R >= -_ENTROPY_SLACK) & (entropy_R <= most + _ENTROPY_SLACK))
        refuse(batch, any_per_sample(bad_R, rows_N), f"entropy is not between 0 and {most:.3f} nats")
        return entries_N

    def whole(self, batch: pa.RecordBatch) -> WholeRows:
        """See ``Codec.whole``: shares sum to 1 and are right in the mean; the entropy is that of the whole row."""
        rows = self.decode(batch)
        _, top1_R = row_figures(rows.offsets, rows.logprob, rows.tail_logprob)
        entropy_R, p_K = flat(batch, "entropy").astype(np.float64), np.exp(rows.logprob)
        return WholeRows(rows.offsets, rows.ids, rows.logprob, p_K, rows.tail_logprob, entropy_R, top1_R)

    def differences(self, stored: pa.RecordBatch, others: Sequence[TeacherRows]) -> dict[str, float]:
        """See ``Codec.differences``: both ways sample with the same numbers, so that equal rows give equal tokens."""
        other = join_draws([one.draws for one in others])
        assert other is not None, "the other way was asked for sampled tokens"
        gap_R = np.abs(flat(stored, "entropy").astype(np.float64) - other.entropy)
        row_K = np.repeat(np.arange(len(gap_R)), flat(stored, "drawn"))
        row_O = np.repeat(np.arange(len(gap_R)), other.drawn)
        mine = _by_token(row_K, flat(stored, "draw_ids"), flat(stored, "draw_count"))
        theirs = _by_token(row_O, other.ids, other.count)
        common = sum(min(count, theirs.get(key, 0)) for key, count in mine.items())
        return {
            "entropy_mean": float(gap_R.mean()),
            "entropy_max": float(gap_R.max()),
            "ids_in_common": common / (self.info.draws * len(gap_R)),
        }

    def count(self, stats: RowStats, batch: pa.RecordBatch, labels_R: NDArray[np.int32]) -> None:
        """See ``Codec.count``."""
        stats.add_entries(flat(batch, "drawn"), flat(batch, "draw_ids"), labels_R)
        stats.add_entropy(flat(batch, "entropy").astype(np.float64))

    def estimate(self, read: Read) -> dict[str, Any]:
        """See ``Codec.estimate``."""
        rows = entries = 0
        for batch in read(("drawn",)):
            drawn_R = flat(batch, "drawn")
            rows, entries = rows + len(drawn_R), entries + int(drawn_R.sum())
        return {"draws": self.info.draws, "distinct_ids_per_row": entries / max(rows, 1)}

    @property
    def sentence(self) -> str:
        """See ``Codec.sentence``."""
        return (
            f"codec `sampled`: {self.info.draws:,} tokens by systematic sampling from the teacher's whole "
            "distribution (each as often as its expected number, rounded up or down at random), seed "
            f"{self.info.seed}, and its entropy"
        )

    def fidelity(self, stats: RowStats) -> tuple[list[tuple[str, object]], str]:
        """See ``Codec.fidelity``."""
        entries, draws = [quantile(stats.entries, share) for share in (0.5, 0.9, 0.99)], self.info.draws
        rows: list[tuple[str, object]] = [
            ("different sampled tokens per row, median, 90 %, 99 %", ", ".join(map(str, entries))),
            ("entropy of the whole rows, mean in nats", stats.entropy_nats / stats.rows),
            ("token of the text was sampled most (or first among equals)", f"{stats.share_within(1):.1%}"),
            ("token of the text was sampled", f"{stats.share_within(len(stats.rank)):.1%}"),
        ]
        # a count is D p rounded up with the probability of its fraction f: variance f (1 - f) of D p, at most 1/4
        note = (
            "Sampled frequencies are unbiased: on average they give every probability exactly, the tail's too. "
            f"Sampling is systematic, so one row's estimate of a probability is less than 1/{draws} off, with a "
            f"standard error of at most {0.5 / draws:.3g}."
        )
        return rows, note

    @property
    def limits(self) -> list[str]:
        """See ``Codec.limits``."""
        return [
            "Sampled tokens serve losses that are linear in the teacher's probabilities; others need `topk`.",
            "Tokens are sampled at temperature 1; other temperatures cannot be derived from them.",
        ]

    def sql_logprob(self, count_R: NDArray[np.int64], value_K: NDArray[np.int64]) -> NDArray[np.float64]:
        """See ``Codec.sql_logprob``."""
        return decode_draws(count_R, np.zeros(0, np.int32), value_K.astype(np.uint16), self.info.draws).logprob

    def page_data(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Codec.page_data``."""
        return {"draws": self.info.draws, "entropy": row["entropy"]}

    @property
    def remark(self) -> str:
        """See ``Codec.remark``."""
        return f"Rows are {self.info.draws} sampled tokens each."

    def described(self, row: Mapping[str, Any], rows: Unpacked, at: int) -> dict[str, Any]:
        """See ``Codec.described``: the entropy of the whole row."""
        del rows
        return {"entropy": round(float(row["entropy"][at]), 3)}


CODEC = SampledCodec
