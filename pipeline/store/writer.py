"""Parquet as this project writes it: no dictionaries, zstd 1, small row groups, bytes of numbers split.

Splitting the bytes of integers and floats lets zstd see the empty high bytes as runs; Parquet
stores 8- and 16-bit integers as 32 bits, so for them it is not optional.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xtoken.pipeline.store.codes import Codes
from xtoken.schemas.io.remote import open_filesystem
from xtoken.schemas.tables import CAPTURE, SPAN_COLUMNS, holds_codes, read_as

ROW_GROUP = 32
_MOST_GROUPS = 1 << 11  # readers refuse more than twice as many (``xtoken.schemas.io.parquet_limits``)


@dataclass(frozen=True)
class Sample:
    """One row of the capture table (shapes as in ``xtoken.schemas.tables``); ``packed`` is what its codec encoded.

    ``spans`` are the columns ``span_*`` of a conversation, and ``messages`` is its JSON.
    """

    sample_id: str
    text: str | None
    teacher_ids: NDArray[np.int32]
    teacher_end: NDArray[np.int32]
    packed: object
    realised_logprob: NDArray[np.float32]
    space_logprob: NDArray[np.float32] | None
    first_row: int
    complete: bool
    snapped: bool
    spans: Mapping[str, Sequence[Any]] | None = None
    messages: str | None = None


def capture_batch(samples: Sequence[Sample], schema: pa.Schema, codes: Codes | None = None) -> pa.RecordBatch:
    """Samples as a record batch of ``schema``, whatever its codec.

    Args:
        samples: with teacher ids.
        schema: of ``xtoken.pipeline.store.codecs.base.Codec.schema``.
        codes: int32 [U], the code of each id; each id its own when left out.
    """
    columns: dict[str, Any] = {
        "sample_id": [sample.sample_id for sample in samples],
        "text": [sample.text for sample in samples],
        "first_row": [sample.first_row for sample in samples],
        "complete": [sample.complete for sample in samples],
        "snapped": [sample.snapped for sample in samples],
    }
    if "messages" in schema.names:
        columns["messages"] = [sample.messages for sample in samples]
        columns |= {name: [(sample.spans or {})[name] for sample in samples] for name in SPAN_COLUMNS}
    for name in schema.names:
        if name not in columns:
            columns[name] = list_column([_values(sample, name) for sample in samples], name, schema, codes)
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _values(sample: Sample, name: str) -> NDArray[Any] | None:
    """A sample's list in a column of the capture, as it came from the teacher."""
    name = read_as(name)
    values: NDArray[Any] | None = getattr(sample if hasattr(sample, name) else sample.packed, name)
    return values


def rounded(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest float32 of 16 significant bits: 1.5e-5 of a log-probability, and a byte of each is empty."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    near = (bits + np.uint32(0x7F) + ((bits >> np.uint32(8)) & np.uint32(1))) & np.uint32(0xFFFFFF00)
    return np.where(np.isnan(value), value, near.view(np.float32))


def list_column(
    rows: Sequence[NDArray[Any] | None], name: str, schema: pa.Schema = CAPTURE, codes: Codes | None = None
) -> pa.ListArray:
    """Rows of one list column of ``schema`` as Arrow: tokens by their codes, floats rounded; None is a null row.

    Args:
        codes: int32 [U], the code of each id, for columns that hold codes; each id its own when left out.
    """
    kind = schema.field(name).type
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    present = [row for row in rows if row is not None]
    values: NDArray[Any] = np.concatenate(present) if present else np.zeros(0)
    if holds_codes(name) and codes is not None:
        values = codes[values]
    elif values.dtype == np.float32:
        values = rounded(values)
    mask = pa.array([row is None for row in rows]) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind, mask=mask)


def group_rows(samples: int) -> int:
    """Rows of a row group in a file of so many samples: 32, and more where there would be too many groups."""
    return max(ROW_GROUP, -(-samples // _MOST_GROUPS))


def write_parquet(
    url: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    row_group: int = ROW_GROUP,
    *,
    rising: Collection[str] = (),
) -> None:
    """Write record batches as one Parquet file in the house's layout.

    Args:
        url: of the file.
        schema: of the batches.
        batches: any number.
        row_group: rows of a row group.
        rising: columns of whole numbers that rise in small steps, as ends do: their steps are what is packed.

    Raises:
        OSError: as the filesystem says (``ENOSPC`` when it is full).
    """
    # a reader that takes single row groups from a store checks the pages it gets
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_page_checksum": True}
    encodings = _encodings(schema, rising)
    fs, path = open_filesystem(url)
    with (
        fs.open(path, "wb") as file,
        pq.ParquetWriter(file, schema, column_encoding=encodings, write_statistics=["sample_id"], **options) as writer,
    ):
        for batch in regroup(batches, schema, row_group):
            writer.write_table(batch, row_group_size=row_group)


def regroup(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterable[pa.Table]:
    """The same rows in tables of exactly ``rows`` rows (the last may be shorter)."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += batch.num_rows
        while count >= rows:
            table = pa.Table.from_batches(held, schema)
            yield table.slice(0, rows)
            held = table.slice(rows).to_batches()
            count -= rows
    if count:
        yield pa.Table.from_batches(held, schema)


def _encodings(schema: pa.Schema, rising: Collection[str]) -> dict[str, str]:
    """Encoding of each leaf column that has numbers; the others are plain."""
    chosen = {}
    for field in schema:
        is_list = pa.types.is_list(field.type)
        leaf = field.type.value_type if is_list else field.type
        if pa.types.is_integer(leaf) or pa.types.is_floating(leaf):
            chosen[f"{field.name}.list.element" if is_list else field.name] = (
                "DELTA_BINARY_PACKED" if field.name in rising else "BYTE_STREAM_SPLIT"
            )
    return chosen
