"""What a capture's rows are like: counts of one pass over its parts, in memory that does not grow with it.

Shapes: N samples of a batch, T their tokens, R their rows.
"""

import numpy as np
import pyarrow as pa

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.codecs.row_stats import RowStats
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import ids_of_codes, iter_parquet, stored_columns
from xtoken.pipeline.store.span_checks import token_ends_fit
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.spans import CHAT_ROW_COLUMNS, ROW_COLUMNS, rows_per_sample, tokens_with_row
from xtoken.schemas.ui.progress import Progress

# Columns that are counted, beside those of the codec.
_COLUMNS = ("sample_id", "teacher_end", *ROW_COLUMNS, "realised_logprob")


def read_stats(root: str, manifest: CaptureManifest, progress: Progress) -> RowStats:
    """Read all parts once, in the order of the manifest.

    Raises:
        VerificationError: a part is missing, torn, or its columns contradict each other.
    """
    folder, codec, columns = Folder(root), open_codec(manifest.codec), list(_COLUMNS)
    columns += CHAT_ROW_COLUMNS if manifest.chat is not None else ()
    if not without_rows(manifest.left_out):
        columns += [name for name in codec.whole_columns if name not in columns]
    id_of_code = ids_of_codes(root)
    stats = RowStats(manifest.codec.step)
    for part in manifest.parts:
        url = folder.url(data_name(part.index))
        for stored in iter_parquet(url, stored_columns(columns, id_of_code)):
            batch = restore_ids(stored, id_of_code)
            if not _consistent(batch, columns, codec):
                raise VerificationError(f"{url} breaks a rule of the format; 'xtoken verify' says which")
            _add(stats, batch, codec)
        progress.advance(part.file_bytes)
    return stats


def _consistent(batch: pa.RecordBatch, columns: list[str], codec: Codec) -> bool:
    """Whether the columns are there and have the lengths that the sums rely on."""
    if not set(columns) <= set(batch.schema.names):
        return False
    tokens_N = list_lengths(batch, "teacher_ids")
    if "span_learn" in columns and not token_ends_fit(batch, tokens_N):
        return False
    rows_N = rows_per_sample(batch)
    wanted = {"realised_logprob": rows_N, "teacher_end": tokens_N}
    if set(codec.whole_columns) <= set(columns):
        wanted |= codec.lengths(batch, rows_N)
    fits = all((list_lengths(batch, name) == wanted[name]).all() for name in wanted if name in columns)
    return bool(fits and (tokens_N > 0).all())


def _add(stats: RowStats, batch: pa.RecordBatch, codec: Codec) -> None:
    lengths_N, predicted_T = list_lengths(batch, "teacher_ids"), tokens_with_row(batch)
    end_T = flat(batch, "teacher_end").astype(np.int64)
    width_T = np.diff(end_T, prepend=0)
    starts_N = np.cumsum(lengths_N) - lengths_N
    width_T[starts_N] = end_T[starts_N]
    stats.rows += int(predicted_T.sum())
    stats.nats -= float(flat(batch, "realised_logprob").astype(np.float64).sum())
    # what is not predicted, a first token or what is not taught, does not count
    stats.text_bytes += int(width_T[predicted_T].sum())
    if not set(codec.whole_columns) <= set(batch.schema.names):
        return
    codec.count(stats, batch, flat(batch, "teacher_ids")[predicted_T])
