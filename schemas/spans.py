"""Which tokens of a capture have a row, the teacher's distribution for them.

Of plain text all have, but for the first where nothing stood before it; of conversations those that are taught. Nothing
else in the package works it out; SQL has the macro ``row_of_token`` (``pipeline/query/sql/macros.sql``).

Shapes: N samples of one batch, T tokens and G spans of all of them.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Columns that ``tokens_with_row`` reads; captures of plain text have not the last two.
ROW_COLUMNS = ("teacher_ids", "first_row")
CHAT_ROW_COLUMNS = ("span_token_end", "span_learn")


def tokens_with_row(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Whether each token has a row, bool [T].

    Args:
        batch: of a capture, with ``ROW_COLUMNS`` and, of conversations, ``CHAT_ROW_COLUMNS``, whose ends are known to
            rise to the number of tokens.
    """
    tokens_N = _lengths(batch, "teacher_ids")
    start_N = np.cumsum(tokens_N) - tokens_N
    has_T = np.ones(int(tokens_N.sum()), np.bool_)
    if "span_learn" in batch.schema.names:
        end_G = batch["span_token_end"].flatten().to_numpy().astype(np.int64)
        end_G += np.repeat(start_N, _lengths(batch, "span_learn"))
        has_T = np.repeat(batch["span_learn"].flatten().to_numpy(zero_copy_only=False), np.diff(end_G, prepend=0))
    first_N = batch["first_row"].to_numpy()
    has_T[start_N[(first_N > 0) & (tokens_N > 0)]] = False
    return has_T


def rows_per_sample(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """How many rows each sample has, [N]; see ``tokens_with_row``."""
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens_with_row(batch))])
    stop_N = np.cumsum(_lengths(batch, "teacher_ids"))
    rows_N: NDArray[np.int64] = np.diff(running[stop_N], prepend=0)
    return rows_N


def row_of_token(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """The row of each token, counted over the batch, [T]; -1 = none. See ``tokens_with_row``."""
    has_T = tokens_with_row(batch)
    return np.where(has_T, np.cumsum(has_T) - 1, -1)


def _lengths(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    lengths_N: NDArray[np.int64] = pc.list_value_length(batch[name]).to_numpy().astype(np.int64)
    return lengths_N
