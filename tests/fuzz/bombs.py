"""Small Parquet files that ask for much memory, or whose footers and page headers lie; see mutations.py."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import thrift
from .mutations import Rng, pick, tables, with_page, write


def zeros(root: Path, rng: Rng) -> None:
    """A list column of 10**8 to 2**31 - 1 zeros in some hundred bytes, with a true footer or one that says 2."""
    path = pick(rng, tables(root)[:2])
    table = pq.read_table(path).slice(0, 1)
    lists = [field for field in table.schema if pa.types.is_list(field.type)]
    # flags have no dictionary
    name = pick(rng, [field.name for field in lists if not pa.types.is_boolean(field.type.value_type)])
    at = table.column_names.index(name)
    field = table.schema.field(name)
    zero = "0" if pa.types.is_string(field.type.value_type) else 0
    two = pa.array([[zero, zero]], pa.list_(field.type.value_type))
    sink = io.BytesIO()
    options = {"use_dictionary": [f"{name}.list.element"], "compression": "none", "write_statistics": False}
    pq.write_table(table.set_column(at, field, two.cast(field.type)), sink, **options)
    size = int(pick(rng, [10**7, 10**8, 10**9, 2**31 - 1]))
    path.write_bytes(_swollen(sink.getvalue(), at, size, true_footer=bool(rng.integers(2))))


def _swollen(data: bytes, number: int, size: int, *, true_footer: bool) -> bytes:
    """The file with ``size`` entries in the one list of a dictionary-encoded column of two zeros."""
    footer = thrift.footer(data)
    chunk = thrift.chunks(footer)[number]
    start, first = thrift.get(chunk, 11), thrift.get(chunk, 9)
    reader = thrift.Reader(data, first)
    header = reader.struct()
    depth = 2 if len(_optional(footer, thrift.get(chunk, 3)[1])) > 1 else 1
    # run-length encoded: the list begins once, goes on for the rest, and every element is entry 0 of the dictionary
    begins = thrift.varint(2) + b"\0" + thrift.varint((size - 1) << 1) + b"\1"
    present = thrift.varint(size << 1) + bytes([depth])
    page = b"".join(len(part).to_bytes(4, "little") + part for part in (begins, present))
    page += b"\1" + thrift.varint(size << 1) + b"\0"
    thrift.put(header, 2, len(page))
    thrift.put(header, 3, len(page))
    thrift.get(header, 5)[0][2] = size
    new = data[start:first] + thrift.struct_bytes(header) + page
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    thrift.put(chunk, 11, end)
    thrift.put(chunk, 9, end + first - start)
    thrift.put(chunk, 7, len(new))
    if true_footer:
        thrift.put(chunk, 5, size)
        thrift.put(chunk, 6, len(new))
    return thrift.with_footer(data[:end] + new + data[end:], footer)


def _optional(footer: list[Any], path: list[bytes]) -> list[bytes]:
    """Levels of a column's path that count as defined: the repeated one, and those that may be null."""
    elements = {thrift.get(e, 4): thrift.get(e, 3) for e in thrift.get(footer, 2)[1]}
    return [name for name in path if elements.get(name)]


def strings(root: Path, rng: Rng) -> None:
    """A string of 8 MiB in a dictionary, 10**4 to 10**6 rows that all name it."""
    path = pick(rng, tables(root)[:2])
    table = pq.read_table(path).slice(0, 1)
    rows = int(pick(rng, [10**3, 10**4, 10**5, 10**6]))
    name = pick(rng, [n for n in ("sample_id", "text") if n in table.column_names])
    indices = pa.array(np.zeros(rows, np.int32))
    long = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * (8 << 20)]))
    columns: dict[str, Any] = {}
    for field in table.schema:
        if field.name == name:
            columns[field.name] = long
        elif pa.types.is_list(field.type):
            offsets = pa.array(np.zeros(rows + 1, np.int32))
            empty = pa.array([], field.type.value_type)
            columns[field.name] = pa.ListArray.from_arrays(offsets, empty, type=field.type)
        else:
            first = table.column(field.name)[0].as_py()
            columns[field.name] = pa.repeat(pa.scalar(first, field.type), rows)
    write(path, pa.table(columns), use_dictionary=[name], dictionary_pagesize_limit=1 << 30, store_schema=False)


def claims(root: Path, rng: Rng) -> None:
    """A page header that claims up to 2**31 bytes or values."""
    path = pick(rng, tables(root))
    data = path.read_bytes()
    huge = int(pick(rng, [2**31 - 1, 2**30, 10**9, 10**8, -1, 2**31 - 2]))

    def change(header: list[Any], content: bytes) -> tuple[list[Any], bytes]:
        number = pick(rng, [2, 3, 5, 7])
        for field in header:
            if field[0] == number:
                field[2] = huge if number < 5 else [[1, thrift.I32, huge], *field[2][1:]]
        return header, content

    chunk = int(rng.integers(len(thrift.chunks(thrift.footer(data)))))
    data = with_page(data, chunk, change)
    if rng.integers(2):
        footer = thrift.footer(data)
        thrift.put(thrift.chunks(footer)[chunk], int(pick(rng, [5, 6])), huge)
        data = thrift.with_footer(data, footer)
    path.write_bytes(data)


def groups(root: Path, rng: Rng) -> None:
    """Row groups without rows, with a million, or a hundred thousand of them."""
    path = pick(rng, tables(root))
    data = path.read_bytes()
    footer = thrift.footer(data)
    kind, found = thrift.get(footer, 4)
    action = rng.integers(4)
    if action == 0:
        for group in found:
            thrift.put(group, 3, 0)
    elif action == 1:
        for group in found:
            thrift.put(group, 3, int(pick(rng, [10**6, 10**9, 2**62, -5])))
        thrift.put(footer, 3, int(pick(rng, [10**6, 10**9, 2**62, -5])))
    elif action == 2:
        many = int(pick(rng, [2000, 70_000]))
        thrift.put(footer, 4, (kind, [[[1, thrift.LIST, (thrift.STRUCT, [])], [2, 6, 0], [3, 6, 0]]] * many + found))
    else:
        many = int(pick(rng, [200, 3000]))
        thrift.put(footer, 3, thrift.get(footer, 3) * many)
        thrift.put(footer, 4, (kind, found * many))
    path.write_bytes(thrift.with_footer(data, footer))
