"""Headers of Parquet pages, as far as they say how much a reader will allocate (Thrift's compact protocol)."""

from dataclasses import dataclass
from typing import Any

from schemas.errors import VerificationError

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_HEADER = 256  # bytes read at first: headers without long statistics are 20 to 60
_LONGEST_HEADER = 1 << 20
_DEPTH = 8
# PageHeader: field ids of the sizes, and of the structs whose field 1 counts values.
_UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8


@dataclass(frozen=True)
class Pages:
    """Of one column chunk: values in data pages (nulls and empty lists count), and bytes of the longest page."""

    values: int
    longest: int


def read_pages(file: Any, column: Any, where: str) -> Pages:
    """Walk the page headers of a column chunk.

    Args:
        file: open for reading bytes, seekable.
        column: pyarrow's ColumnChunkMetaData.
        where: names the column in messages.

    Raises:
        VerificationError: the chunk does not lie in the file, or a header is none.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset and column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    stop = start + column.total_compressed_size
    if not 0 <= start <= stop <= file.seek(0, 2):
        raise VerificationError(f"{where}: its bytes {start} to {stop} do not lie in the file")
    values = longest = 0
    while start < stop:
        header, size = _read_header(file, start, stop, where)
        uncompressed, compressed = header.get(_UNCOMPRESSED, -1), header.get(_COMPRESSED, -1)
        count = sum(header.get((kind, 1), 0) for kind in (_DATA, _DATA_V2))
        if min(uncompressed, compressed, count, header.get((_DICTIONARY, 1), 0)) < 0:
            raise VerificationError(f"{where}: a page at byte {start} has a negative size")
        values, longest = values + count, max(longest, uncompressed, compressed)
        start += size + compressed
    if start != stop:
        raise VerificationError(f"{where}: its pages end at byte {start}, the footer says {stop}")
    return Pages(values, longest)


def _read_header(file: Any, start: int, stop: int, where: str) -> tuple[dict[Any, int], int]:
    """Integers of a page header by field id, or by (struct's id, field id), and the header's size."""
    length = _HEADER
    while True:
        file.seek(start)
        data = file.read(min(length, stop - start))
        try:
            return _Header(data).parse()
        except IndexError as error:
            if len(data) == stop - start or length >= _LONGEST_HEADER:
                raise VerificationError(f"{where}: no page header at byte {start}") from error
            length *= 16


class _Header:
    """Parses one header; IndexError where the data ends before it does."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._found: dict[Any, int] = {}

    def parse(self) -> tuple[dict[Any, int], int]:
        self._struct((), 0)
        return self._found, self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
            if shift > 63:
                raise IndexError("no integer")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise IndexError("cut short")

    def _struct(self, outer: tuple[int, ...], depth: int) -> None:
        if depth > _DEPTH:
            raise IndexError("nested too deep")
        last = 0
        while byte := self._byte():
            last = last + (byte >> 4) if byte >> 4 else self._integer()
            self._value(byte & 15, (*outer, last), depth)

    def _value(self, kind: int, path: tuple[int, ...], depth: int) -> None:
        if kind in _INTEGERS:
            # of a repeated field the last counts, as in every reader
            self._found[path[0] if len(path) == 1 else path] = self._integer()
        elif kind in (_BYTE, _DOUBLE):
            self._skip(1 if kind == _BYTE else 8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind == _STRUCT:
            self._struct(path, depth + 1)
        elif kind not in (_TRUE, _FALSE):
            # lists and maps are in no page header
            raise IndexError("unknown type")
