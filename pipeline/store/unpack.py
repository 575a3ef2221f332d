"""Rows of a capture as log-probabilities, whatever codec stored them."""

import pyarrow as pa

from xtoken.pipeline.store.codec import Unpacked, decode
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.sampled import decode_draws
from xtoken.schemas.manifest import CodecInfo

# How many entries each row has stands in the first column, their ids in the second.
_COLUMNS = {"topk": ("kept", "topk_ids", "topk_gap", "rest_gap"), "sampled": ("drawn", "draw_ids", "draw_count")}


def row_columns(codec: CodecInfo) -> tuple[str, ...]:
    """Columns that ``unpack`` reads: first entries per row, then their ids, then the others."""
    return _COLUMNS[codec.name]


def unpack(batch: pa.RecordBatch, codec: CodecInfo) -> Unpacked:
    """Decode the rows of all samples of a batch, one after the other."""
    columns = [flat(batch, name) for name in row_columns(codec)]
    if codec.name == "sampled":
        drawn, ids, count = columns
        return decode_draws(drawn, ids, count, codec.draws)
    kept, ids, gap, rest_gap = columns
    return decode(kept, ids, gap, rest_gap, codec.step)
