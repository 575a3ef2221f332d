"""What of a row is kept: known tokens, each once, most probable first, and the mass that they leave.

The same for all formats. Shapes: T tokens and R rows of a sample, E entries as they came, K entries kept, U vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.imports.samples import ImportedSample
from xtoken.pipeline.store.codecs.topk import Packed, pack
from xtoken.schemas.codecs import TopK

_LEAST = -1000.0  # nats: below it stands what servers and padding write for none
ABOVE_ONE = 1e-4  # nats by which a row's sum passes 1 before it counts: float32 rounding stays far below


@dataclass(frozen=True, eq=False)
class CleanRows:
    """Rows of a sample, sorted and without what is no token.

    Attributes:
        row: int64 [E], the row of each entry; rising.
        rank: int64 [E], place in its row, from 0.
        ids: int32 [E], each once in a row, all tokens of text or control.
        logprob: float64 [E], nats, falling in each row; may add up to more than 1.
        rows: R.
        label: int32 [R], the token in the text that each row predicts.
        label_logprob: float64 [R], nats; NaN = unknown.
        label_rank: int64 [R], 1 = the most probable; 0 = not among the entries, and not known otherwise.
        counts: entries dropped.
    """

    row: NDArray[np.int64]
    rank: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprob: NDArray[np.float64]
    rows: int
    label: NDArray[np.int32]
    label_logprob: NDArray[np.float64]
    label_rank: NDArray[np.int64]
    counts: Counter[str]

    def log_sums(self) -> NDArray[np.float64]:
        """float64 [R], log of what the entries of a row add up to; -inf = no entry."""
        return log_sums(self.row, self.logprob, self.rows)


def places(sample: ImportedSample) -> NDArray[np.int64]:
    """int64 [R], the token that each row predicts."""
    if sample.chat is None:
        return np.arange(sample.first_row, len(sample.ids))
    return np.flatnonzero(sample.chat.learn)


def clean(sample: ImportedSample, valid_U: NDArray[np.bool_]) -> CleanRows:
    """Sort the rows of a sample and drop what is no token.

    Args:
        sample: as a reader gave it.
        valid_U: ids that are tokens.
    """
    rows = len(sample.offsets) - 1
    row_E = np.repeat(np.arange(rows), np.diff(sample.offsets))
    ids_E, logprob_E = sample.entry_ids.astype(np.int64), sample.entry_logprob
    finite_E = np.isfinite(logprob_E) & (logprob_E > _LEAST)
    inside_E = (ids_E >= 0) & (ids_E < len(valid_U))
    inside_E[inside_E] = valid_U[ids_E[inside_E]]
    counts = Counter(
        entries_not_finite=int((~finite_E).sum()), entries_outside=int((finite_E & ~inside_E).sum()), entries_twice=0
    )
    kept = finite_E & inside_E
    row_E, ids_E, logprob_E = row_E[kept], ids_E[kept], logprob_E[kept]
    # of the same id in one row the most probable stays
    order = np.lexsort((-logprob_E, ids_E, row_E))
    row_E, ids_E, logprob_E = row_E[order], ids_E[order], logprob_E[order]
    first_E = np.ones(len(row_E), np.bool_)
    first_E[1:] = (row_E[1:] != row_E[:-1]) | (ids_E[1:] != ids_E[:-1])
    counts["entries_twice"] = int((~first_E).sum())
    row_E, ids_E, logprob_E = row_E[first_E], ids_E[first_E], logprob_E[first_E]
    order = np.lexsort((ids_E, -logprob_E, row_E))
    row_E, ids_E, logprob_E = row_E[order], ids_E[order], logprob_E[order]
    count_R = np.bincount(row_E, minlength=rows)
    rank_E = np.arange(len(row_E)) - (np.cumsum(count_R) - count_R)[row_E]
    label_R = sample.ids[places(sample)].astype(np.int32)
    label_logprob, label_rank = sample.label_logprob.copy(), np.zeros(rows, np.int64)
    if sample.label_rank is not None:
        label_rank[:] = sample.label_rank
    hit = np.flatnonzero(ids_E == label_R[row_E])
    unsaid = np.isnan(label_logprob[row_E[hit]])
    label_logprob[row_E[hit][unsaid]] = logprob_E[hit][unsaid]
    label_rank[row_E[hit]] = np.where(label_rank[row_E[hit]] > 0, label_rank[row_E[hit]], rank_E[hit] + 1)
    return CleanRows(
        row_E, rank_E, ids_E.astype(np.int32), logprob_E, rows, label_R, label_logprob, label_rank, +counts
    )


def log_sums(row_E: NDArray[np.int64], logprob_E: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """float64 [R], log of what entries of each row add up to; -inf = none. ``row_E`` rises, its first are largest."""
    found = np.full(rows, -np.inf)
    if not len(row_E):
        return found
    count_R = np.bincount(row_E, minlength=rows)
    filled, start = count_R > 0, (np.cumsum(count_R) - count_R)[count_R > 0]
    top = logprob_E[start]
    share = np.exp(logprob_E - np.repeat(top, count_R[filled]))
    found[filled] = top + np.log(np.add.reduceat(share, start))
    return found


def packed(found: CleanRows, codec: TopK, step: float, *, rest_known: bool) -> tuple[Packed, NDArray[np.float32]]:
    """Rows as they are stored, and float32 [R] labels, NaN = unknown; ``found.counts`` is added to.

    Where REST is unknown, what is kept is made to sum to 1, and no label is known: what the source says of it is
    larger than the truth by a factor that nobody knows.
    """
    floor = np.log(codec.min_p) if codec.min_p > 0 else -np.inf
    keep = (found.rank < codec.k) & ((found.logprob >= floor) | (found.rank == 0))
    row_K, logprob_K = found.row[keep], found.logprob[keep]
    total_R = log_sums(row_K, logprob_K, found.rows)
    count_R = np.bincount(row_K, minlength=found.rows)
    labels_R = np.minimum(found.label_logprob, 0.0)
    if rest_known:
        found.counts["rows_above_one"] += int((total_R > ABOVE_ONE).sum())
        over_R = np.maximum(total_R, 0.0)
        labels_R = np.minimum(labels_R, labels_R - np.where(np.isfinite(over_R), over_R, 0.0))
    else:
        over_R, labels_R = total_R, np.full(found.rows, np.nan)
    found.counts["rows_empty"] += int((count_R == 0).sum())
    found.counts["labels_unknown"] += int(np.isnan(labels_R).sum())
    logprob_K = np.minimum(logprob_K - over_R[row_K], 0.0)
    tailless_R = (total_R >= 0) & rest_known
    kept = pack(count_R, found.ids[keep], logprob_K, step, tail_known=rest_known, tailless_R=tailless_R)
    return kept, labels_R.astype(np.float32)
