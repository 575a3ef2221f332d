"""What a capture's rows are like: counts of one pass over its parts, in memory that does not grow with it.

Shapes: N samples of a batch, T their tokens, R their rows, K kept entries or different draws of these rows.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codec import NO_REST, Unpacked
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import ids_of_codes, iter_parquet, stored_columns
from xtoken.pipeline.store.unpack import row_columns, unpack
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CaptureManifest, CodecInfo
from xtoken.schemas.ui.progress import Progress

ENTROPY_BIN = 0.25  # nats
_ENTROPY_BINS = 80  # up to 20 nats, above the log of any vocabulary
_LEVELS = 1 << 16  # all there are in 16 bits: every quantile of a quantised value is exact
# Columns that are counted, beside those of the codec.
_COLUMNS = ("sample_id", "teacher_ids", "teacher_end", "first_row", "realised_logprob")


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(_LEVELS, np.int64)


def _no_entropies() -> NDArray[np.int64]:
    return np.zeros(_ENTROPY_BINS, np.int64)


@dataclass
class RowStats:
    """Sums over all rows.

    Attributes:
        step: unit of ``rest`` in nats.
        rows: R.
        nats: sum of -log of the probability of the tokens in the text.
        text_bytes: bytes of the tokens that have a row.
        entropy_nats: sum of the rows' entropies; REST counts as one cell where draws did not give the whole row's.
        entries: int64 [65536], rows by how many entries they keep (different draws they have).
        rest: int64 [65536], rows by ``rest_gap``.
        entropy: int64 [80], rows by entropy, in bins of ``ENTROPY_BIN``.
        rank: int64 [65536], rows by rank of the text's token among the kept entries; other rows do not count.
    """

    step: float
    rows: int = 0
    nats: float = 0.0
    text_bytes: int = 0
    entropy_nats: float = 0.0
    entries: NDArray[np.int64] = field(default_factory=_no_counts)
    rest: NDArray[np.int64] = field(default_factory=_no_counts)
    entropy: NDArray[np.int64] = field(default_factory=_no_entropies)
    rank: NDArray[np.int64] = field(default_factory=_no_counts)

    @property
    def bits_per_byte(self) -> float:
        """What the teacher needs to write a byte of the text; NaN without bytes."""
        return self.nats / np.log(2) / self.text_bytes if self.text_bytes else float("nan")

    def rest_moment(self, power: int) -> float:
        """Mean over rows of the mass not kept, to a power."""
        return float((self.rest * rest_mass(self.step) ** power).sum() / max(self.rows, 1))

    def rest_quantile(self, share: float) -> float:
        """The mass not kept that ``share`` of the rows do not exceed."""
        ascending = self.rest[::-1]
        return float(rest_mass(self.step)[::-1][quantile(ascending, share)])

    def share_within(self, ranks: int) -> float:
        """Share of the rows whose token in the text is among their first ``ranks`` entries."""
        return float(self.rank[:ranks].sum() / max(self.rows, 1))


def rest_mass(step: float) -> NDArray[np.float64]:
    """[65536] the mass that each ``rest_gap`` says, falling."""
    mass = np.exp(-step * np.arange(_LEVELS, dtype=np.float64))
    mass[NO_REST] = 0.0
    return mass


def quantile(counts: NDArray[np.int64], share: float) -> int:
    """First index up to which ``share`` of what is counted lies; 0 for no counts."""
    return int(np.searchsorted(np.cumsum(counts), share * counts.sum()))


def read_stats(root: str, manifest: CaptureManifest, progress: Progress) -> RowStats:
    """Read all parts once, in the order of the manifest.

    Raises:
        VerificationError: a part is missing, torn, or its columns contradict each other.
    """
    folder, codec, columns = Folder(root), manifest.codec, list(_COLUMNS)
    if not without_rows(manifest.left_out):
        columns += [*row_columns(codec), *(["entropy"] if codec.name == "sampled" else [])]
    id_of_code = ids_of_codes(root)
    stats = RowStats(codec.step)
    for part in manifest.parts:
        url = folder.url(data_name(part.index))
        for stored in iter_parquet(url, stored_columns(columns, id_of_code)):
            batch = restore_ids(stored, id_of_code)
            if not _consistent(batch, columns, codec):
                raise VerificationError(f"{url} breaks a rule of the format; 'xtoken verify' says which")
            _add(stats, batch, codec)
        progress.advance(part.file_bytes)
    return stats


def _consistent(batch: pa.RecordBatch, columns: list[str], codec: CodecInfo) -> bool:
    """Whether the columns are there and have the lengths that the sums rely on."""
    if not set(columns) <= set(batch.schema.names):
        return False
    rows_N = list_lengths(batch, "teacher_ids") - batch["first_row"].to_numpy()
    count, *others = row_columns(codec)
    per_row = {"realised_logprob", count, "rest_gap", "entropy"} & set(columns)
    per_entry = {*others} - per_row if count in columns else set()
    entries = int(flat(batch, count).sum(dtype=np.int64)) if per_entry else 0
    return bool(
        all((list_lengths(batch, name) == rows_N).all() for name in per_row)
        and all(len(flat(batch, name)) == entries for name in per_entry)
        and (list_lengths(batch, "teacher_end") == list_lengths(batch, "teacher_ids")).all()
        and (list_lengths(batch, "teacher_end") > 0).all()
    )


def _add(stats: RowStats, batch: pa.RecordBatch, codec: CodecInfo) -> None:
    lengths_N, first_N = list_lengths(batch, "teacher_ids"), batch["first_row"].to_numpy()
    starts_N = np.cumsum(lengths_N) - lengths_N
    ends = flat(batch, "teacher_end").astype(np.int64)
    stats.rows += int((lengths_N - first_N).sum())
    stats.nats -= float(flat(batch, "realised_logprob").astype(np.float64).sum())
    # a first token without a row is no prediction, so its bytes do not count
    stats.text_bytes += int((ends[starts_N + lengths_N - 1] - ends[starts_N] * first_N).sum())
    count, ids, *_ = row_columns(codec)
    if count not in batch.schema.names:
        return
    predicted_T = np.ones(int(lengths_N.sum()), np.bool_)
    predicted_T[starts_N[first_N == 1]] = False
    _add_entries(stats, flat(batch, count), flat(batch, ids), flat(batch, "teacher_ids")[predicted_T])
    if codec.name == "sampled":
        _add_entropy(stats, flat(batch, "entropy").astype(np.float64))
    else:
        stats.rest += np.bincount(flat(batch, "rest_gap"), minlength=_LEVELS)
        _add_entropy(stats, _entropy(unpack(batch, codec)))


def _entropy(rows: Unpacked) -> NDArray[np.float64]:
    """[R] nats, REST as one cell."""
    rest_R, some_R = np.exp(rows.rest_logprob), rows.rest_logprob > -np.inf
    row_K = np.repeat(np.arange(len(rest_R)), np.diff(rows.offsets))
    entropy_R = np.bincount(row_K, -np.exp(rows.logprob) * rows.logprob, minlength=len(rest_R)).astype(np.float64)
    entropy_R[some_R] -= rest_R[some_R] * rows.rest_logprob[some_R]
    return entropy_R


def _add_entries(
    stats: RowStats, count_R: NDArray[Any], ids_K: NDArray[np.int32], realised_R: NDArray[np.int32]
) -> None:
    count_R = count_R.astype(np.int64)
    row_K = np.repeat(np.arange(len(count_R)), count_R)
    rank_K = np.arange(len(ids_K)) - (np.cumsum(count_R) - count_R)[row_K]
    stats.entries += np.bincount(count_R, minlength=_LEVELS)
    stats.rank += np.bincount(rank_K[ids_K == realised_R[row_K]], minlength=_LEVELS)


def _add_entropy(stats: RowStats, entropy_R: NDArray[np.float64]) -> None:
    if not np.isfinite(entropy_R).all():
        raise VerificationError("a row's entropy is no number; 'xtoken verify' says where, fetch the capture again")
    bins_R = np.clip(entropy_R / ENTROPY_BIN, 0, _ENTROPY_BINS - 1).astype(np.int64)
    stats.entropy += np.bincount(bins_R, minlength=_ENTROPY_BINS)
    stats.entropy_nats += float(entropy_R.sum())
