"""A row of a DistillKit file as ids and log-probabilities, whichever of its forms it has.

Shapes: N ids and M rows in a row of the file, K entries of each, B bytes of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.imports.compression import (
    MOST_ENTRIES,
    AnyCompression,
    Compression,
    LegacyCompression,
)
from xtoken.pipeline.imports.packed_bits import unpack_words
from xtoken.pipeline.imports.parquet_rows import (
    BadRow,
    byte_rows,
    matrix,
    numbers,
    whole_numbers,
)
from xtoken.schemas.errors import XtokenError

Variant = Literal["distillkit", "distillkit legacy", "raw top k"]
NEEDED: dict[Variant, tuple[str, ...]] = {
    "distillkit": ("compressed_logprobs", "bytepacked_indices"),
    "distillkit legacy": ("packed_indices", "exact_values", "coeffs"),
    "raw top k": ("token_ids", "top_values"),
}
_LOOKED = 1 << 14  # rows of the file whose step from head to tail is looked at
_LONGEST = 1 << 20  # rows in a row of the file


@dataclass(frozen=True, eq=False)
class FileRow:
    """A row of the file, decoded.

    Attributes:
        ids: int64 [N].
        mask: int64 [N], or None.
        entry_ids, logprob: [M, K]; float64, nats.
        listed: float64 [M], log of what all entries add up to, those that are not given included.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64] | None
    entry_ids: NDArray[np.int64]
    logprob: NDArray[np.float64]
    listed: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RowDecoder:
    """Decodes rows of one variant.

    Attributes:
        variant: what the columns are.
        compression: how rows are compressed; None of raw top k.
        whole: entries that a polynomial approximates are given, too.
        logits: values are logits, and become log-probabilities over the entries.
        normalised: of raw top k, probabilities over the vocabulary stand beside the logits.
        steps: nats from the last number to the first value of the polynomial, of some rows.
    """

    variant: Variant
    compression: AnyCompression | None
    whole: bool
    logits: bool = False
    normalised: bool = False
    steps: list[float] = field(default_factory=list)

    def decoded(self, batch: pa.RecordBatch, row: int, place: str) -> FileRow:
        """One row of the file.

        Raises:
            BadRow: its lists do not fit each other or the configuration.
        """
        ids, mask = (numbers(batch, name, row, place) for name in ("input_ids", "attention_mask"))
        if ids is None:
            raise BadRow(place, "no input_ids", "the list is null")
        entry_ids, logprob, listed = self._entries(batch, row, place)
        if len(entry_ids) > _LONGEST or len(ids) not in (len(entry_ids), len(entry_ids) + 1):
            raise BadRow(
                place,
                "ids and rows that do not fit",
                f"{len(ids)} ids and {len(entry_ids)} rows; sampled sets have one id more than rows, packed as many",
            )
        if mask is not None and len(mask) != len(ids):
            raise BadRow(place, "attention_mask of another length", f"{len(mask)}, where there are {len(ids)} ids")
        numbered = None if mask is None else whole_numbers(mask, "attention_mask", place)
        return FileRow(whole_numbers(ids, "input_ids", place), numbered, entry_ids, logprob, listed)

    def _entries(
        self, batch: pa.RecordBatch, row: int, place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        given = [matrix(batch, name, row, place) for name in NEEDED[self.variant]]
        if len({len(one) for one in given}) > 1:
            raise BadRow(place, "columns of unequal lengths", f"{[len(one) for one in given]} rows")
        if isinstance(self.compression, Compression):
            ids, values = self._bytes(self.compression, given, place)
        elif isinstance(self.compression, LegacyCompression):
            ids, values = self._words(self.compression, given, place)
        else:
            ids, values = whole_numbers(given[0], "token_ids", place), given[1].astype(np.float64)
            if self.normalised:
                with np.errstate(divide="ignore"):
                    values = np.log(matrix(batch, "normalized_logits", row, place).astype(np.float64))
            if ids.shape[1] > MOST_ENTRIES:
                raise BadRow(place, "rows that are too wide", f"{ids.shape[1]} entries, of at most {MOST_ENTRIES}")
            if ids.shape != values.shape:
                raise BadRow(place, "token_ids and top_values of unequal lengths", f"{ids.shape} and {values.shape}")
        if self.logits:
            values = values - _log_sum(values)[:, None]
        listed = _log_sum(values)
        most = self.head
        return ids[:, :most], values[:, :most], listed

    @property
    def head(self) -> int | None:
        """How many entries of a row are given; None = all."""
        if self.whole or self.compression is None or self.logits:
            return None
        return self.compression.exact_k

    def _bytes(
        self, how: Compression, given: Sequence[NDArray[Any]], place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        values = how.values(byte_rows(given[0], how.value_bytes, "compressed_logprobs", place))
        ids, whole = how.ids(byte_rows(given[1], how.index_bytes, "bytepacked_indices", place))
        if not whole:
            raise BadRow(
                place,
                "ids with something behind the last",
                f"by k {how.k} and d {how.d} the last bits must be 0",
                "give the configuration that the set was written with",
            )
        if 0 < how.exact_k < how.k and len(self.steps) < _LOOKED:
            step = values[:, how.exact_k - 1] - values[:, how.exact_k]
            self.steps.extend(step[np.isfinite(step)].tolist())
        return ids, values

    def _words(
        self, how: LegacyCompression, given: Sequence[NDArray[Any]], place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        words, exact, coefficient = given
        wanted = (how.words, how.exact_k, how.coefficients if how.tail else coefficient.shape[1])
        found = (words.shape[1], exact.shape[1], coefficient.shape[1])
        if wanted != found:
            raise BadRow(
                place,
                "rows of another length than --compression says",
                f"words, exact values and coefficients are {found}, and should be {wanted}",
                "give the configuration that the set was written with",
            )
        ids = unpack_words(words.astype(np.int64).view(np.uint64), how.k, how.bits)
        values = exact.astype(np.float64)
        if how.tail:
            values = np.concatenate([values, how.tail_values(coefficient.astype(np.float64))], axis=1)
        return ids, values

    def refuse_unsound(self, above_one: float, above_zero: bool) -> None:
        """Refuse the polynomial's tail of ``--entries all`` where it is noise.

        Args:
            above_one: share of rows whose entries add up to more than 1.01.
            above_zero: whether an entry is above a probability of 1.

        Raises:
            XtokenError: the message says by which figure.
        """
        how = self.compression
        if self.head is not None or not isinstance(how, Compression) or how.exact_k == how.k:
            return
        step = float(np.median(self.steps)) if self.steps else 0.0
        reasons = {
            f"{above_one:.1%} of the rows add up to more than 1.01 (at most 1 %)": above_one > 0.01,
            "an entry has a probability above 1": above_zero,
            f"from the last number to the first value of the polynomial it is {step:.2f} nats (at most .3)": (
                how.exact_k >= 8 and step > 0.3
            ),
        }
        if said := [reason for reason, wrong in reasons.items() if wrong]:
            raise XtokenError(
                f"--entries all: the tail of these rows is noise of their compression: {'; '.join(said)}. Take "
                "--entries head: the numbers, and the tail mass as what they leave"
            )


def _log_sum(value_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [R], log of the sum of what is finite; -inf = nothing."""
    value = np.where(np.isfinite(value_RK), value_RK, -np.inf)
    top = value.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total: NDArray[np.float64] = np.log(np.exp(value - safe[:, None]).sum(axis=1)) + safe
    return total
