"""Readers of Parquet files and of the Arrow streams of a saved Hugging Face dataset."""

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xtoken.pipeline.chats import columns_of
from xtoken.pipeline.corpus.chat import has_message_keys
from xtoken.pipeline.corpus.damage import check_head
from xtoken.pipeline.corpus.readers import Fields, FileProblem, Problem, Row, make_row, missing_field, no_text

_BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"  # what Arrow's file format begins with; a stream begins with a length


def read_parquet(file: IO[bytes], fields: Fields, start: int) -> Iterator[Row]:
    """Row groups are read one after another; those before ``start`` are not read at all."""
    try:
        source = pq.ParquetFile(file)
    except pa.ArrowInvalid:
        file.seek(0)
        check_head(file, ".parquet")
        raise
    columns = _columns(source.schema_arrow, fields)
    first = 0
    for group in range(source.num_row_groups):
        rows = source.metadata.row_group(group).num_rows
        if first + rows > start:
            number = first
            for batch in source.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
                yield from _rows(batch, number, fields, start)
                number += batch.num_rows
        first += rows


def read_arrow(file: IO[bytes], fields: Fields, start: int) -> Iterator[Row]:
    """Arrow's stream, as of a saved dataset, or its file format (Feather V2), batch by batch."""
    number = 0
    for batch in _batches(file, fields):
        if number + batch.num_rows > start:
            yield from _rows(batch, number, fields, start)
        number += batch.num_rows


def _batches(file: IO[bytes], fields: Fields) -> Iterator[pa.RecordBatch]:
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as source:
        _columns(source.schema, fields)
        yield from map(source.get_batch, range(source.num_record_batches)) if is_file else source


def _columns(schema: pa.Schema, fields: Fields) -> list[str]:
    """The columns to read.

    Raises:
        FileProblem: a column is missing, or the text column holds no text.
    """
    ids = [] if fields.id is None else [fields.id]
    wanted = [fields.text, *ids] if fields.form is None else [*columns_of(fields.form, schema.names), *ids]
    for name in wanted:
        if name not in schema.names:
            raise FileProblem(missing_field(name, schema.names, fields))
    if fields.form is None:
        kind = schema.field(fields.text).type
        if not _is_text(kind):
            raise FileProblem(no_text(fields.text, f"values of type {kind}", chat=_is_conversation(kind)))
    return list(dict.fromkeys(wanted))


def _is_conversation(kind: pa.DataType) -> bool:
    """Whether values are messages, or lists of messages."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and has_message_keys([kind.field(at).name for at in range(kind.num_fields)])


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _rows(batch: pa.RecordBatch, first: int, fields: Fields, start: int) -> Iterator[Row]:
    begin = max(0, start - first)
    ids = [None] * batch.num_rows if fields.id is None else batch.column(fields.id).to_pylist()
    if fields.form is not None:
        for at in range(begin, batch.num_rows):
            yield _chat(first + at, batch.slice(at, 1), ids[at], fields)
        return
    for at, text in enumerate(_as_bytes(batch.column(fields.text))):
        if at >= begin:
            yield _row(first + at, text.as_py(), ids[at], fields)


def _chat(number: int, row: pa.RecordBatch, document_id: Any, fields: Fields) -> Row:
    try:
        record = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Row(number, problem=_not_utf8(error))
    return make_row(number, {name: _as_given(value) for name, value in record.items()}, document_id, fields)


def _as_given(value: Any) -> Any:
    """A value without the fields that are null: a table gives every object those of all others, so that a call would
    have arguments that nobody wrote."""
    if isinstance(value, dict):
        return {name: _as_given(one) for name, one in value.items() if one is not None}
    return [_as_given(one) for one in value] if isinstance(value, list) else value


def _as_bytes(column: Any) -> Any:
    """Strings as bytes: Arrow does not check that they are UTF-8, so we do, row by row."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    return column.cast(pa.large_binary())


def _row(number: int, text: bytes | None, document_id: Any, fields: Fields) -> Row:
    try:
        value = None if text is None else text.decode()
    except UnicodeDecodeError as error:
        return Row(number, problem=_not_utf8(error))
    return make_row(number, value, document_id, fields)


def _not_utf8(error: UnicodeDecodeError) -> Problem:
    fix = "write the file again from valid text"
    return Problem("invalid UTF-8", f"the text is not UTF-8 at byte {error.start}", fix)


def column_names(file: IO[bytes], *, parquet: bool) -> list[str]:
    """Names of a table's columns."""
    if parquet:
        return list(pq.ParquetFile(file).schema_arrow.names)
    is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    file.seek(0)
    with pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file) as source:
        return list(source.schema.names)
