"""What a capture's rows are like: sums over them, in memory that does not grow with their number.

Shapes: R rows, K entries of these rows.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError

ENTROPY_BIN = 0.25  # nats
_ENTROPY_BINS = 80  # up to 20 nats, above the log of any vocabulary
_LEVELS = 1 << 16  # all there are in 16 bits: every quantile of a quantised value is exact
_NO_TAIL = _LEVELS - 1


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(_LEVELS, np.int64)


def _no_entropies() -> NDArray[np.int64]:
    return np.zeros(_ENTROPY_BINS, np.int64)


@dataclass
class RowStats:
    """Sums over all rows.

    Attributes:
        step: unit of ``tail`` in nats; 0 where the codec stores none.
        rows: R.
        nats: sum of -log of the probability of the tokens in the text.
        text_bytes: bytes of the tokens that have a row.
        entropy_nats: sum of the rows' entropies; the tail counts as one cell where that of the whole row is not stored.
        entries: int64 [65536], rows by how many entries they have.
        tail: int64 [65536], rows by tail mass in steps; 65535 = none.
        entropy: int64 [80], rows by entropy, in bins of ``ENTROPY_BIN``.
        rank: int64 [65536], rows by rank of the label (the token in the text) among the entries, where it is one.
    """

    step: float
    rows: int = 0
    nats: float = 0.0
    text_bytes: int = 0
    entropy_nats: float = 0.0
    entries: NDArray[np.int64] = field(default_factory=_no_counts)
    tail: NDArray[np.int64] = field(default_factory=_no_counts)
    entropy: NDArray[np.int64] = field(default_factory=_no_entropies)
    rank: NDArray[np.int64] = field(default_factory=_no_counts)

    @property
    def bits_per_byte(self) -> float:
        """What the teacher needs to write a byte of the text; NaN without bytes."""
        return self.nats / np.log(2) / self.text_bytes if self.text_bytes else float("nan")

    def tail_moment(self, power: int) -> float:
        """Mean over rows of the tail mass, to a power."""
        return float((self.tail * tail_mass(self.step) ** power).sum() / max(self.rows, 1))

    def tail_quantile(self, share: float) -> float:
        """The tail mass that ``share`` of the rows do not exceed."""
        ascending = self.tail[::-1]
        return float(tail_mass(self.step)[::-1][quantile(ascending, share)])

    def share_within(self, ranks: int) -> float:
        """Share of the rows whose label is among their first ``ranks`` entries."""
        return float(self.rank[:ranks].sum() / max(self.rows, 1))

    def add_entries(self, count_R: NDArray[Any], ids_K: NDArray[np.int32], labels_R: NDArray[np.int32]) -> None:
        """Count entries per row, and where the label stands among them.

        Args:
            count_R: entries of each row.
            ids_K: their ids, in rank order.
            labels_R: the token in the text that each row predicts.
        """
        count_R = count_R.astype(np.int64)
        row_K = np.repeat(np.arange(len(count_R)), count_R)
        rank_K = np.arange(len(ids_K)) - (np.cumsum(count_R) - count_R)[row_K]
        self.entries += _histogram(count_R)
        self.rank += _histogram(rank_K[ids_K == labels_R[row_K]])

    def add_tail(self, steps_R: NDArray[np.uint16]) -> None:
        """Count rows by tail mass, in steps."""
        self.tail += _histogram(steps_R)

    def add_entropy(self, entropy_R: NDArray[np.float64]) -> None:
        """Count rows by entropy in nats.

        Raises:
            VerificationError: one is NaN or inf.
        """
        if not np.isfinite(entropy_R).all():
            raise VerificationError(
                "a row's entropy is NaN or inf; 'xtoken verify' says where, fetch the capture again"
            )
        bins_R = np.clip(entropy_R / ENTROPY_BIN, 0, _ENTROPY_BINS - 1).astype(np.int64)
        self.entropy += np.bincount(bins_R, minlength=_ENTROPY_BINS)
        self.entropy_nats += float(entropy_R.sum())


def _histogram(values: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [65536]; the last one counts all above it, too."""
    return np.bincount(np.minimum(values, _LEVELS - 1), minlength=_LEVELS)


def tail_mass(step: float) -> NDArray[np.float64]:
    """[65536] the mass that each step says, falling."""
    mass = np.exp(-step * np.arange(_LEVELS, dtype=np.float64))
    mass[_NO_TAIL] = 0.0
    return mass


def quantile(counts: NDArray[np.int64], share: float) -> int:
    """First index up to which ``share`` of what is counted lies; 0 for no counts."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
