"""What a Parquet footer and page headers say, as far as they tell how much a reader will allocate.

Read by a small parser of our own (Thrift's compact protocol): pyarrow decodes what page headers ask for whatever the
footer says, and ends the whole process on some footers when it is asked for a column's metadata.
"""

import zlib
from dataclasses import dataclass
from typing import Any

from xtoken.schemas.errors import VerificationError

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_HEADER = 256  # bytes read at first: headers without long statistics are 20 to 60
_LONGEST_HEADER = 1 << 20
_DEPTH = 12
_TAIL = 8
# Field ids: of PageHeader its sizes and the structs whose field 1 counts values; of FileMetaData, RowGroup and
# ColumnChunk the lists and structs on the way to ColumnMetaData.
_UNCOMPRESSED, _COMPRESSED, _CRC, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 4, 5, 7, 8
_GROUPS, _CHUNKS, _META = 4, 1, 3
_TYPE, _PATH, _VALUES, _CHUNK_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 1, 3, 5, 7, 9, 11
_MOST = 1 << 62
Struct = dict[int, Any]


@dataclass(frozen=True)
class Chunk:
    """One column of one row group, as the footer has it.

    Attributes:
        column: name of its top-level column.
        physical: number of its physical type.
        values: with nulls and empty lists.
        start, size: bytes in the file, of its first page and of all.
    """

    column: str
    physical: int
    values: int
    start: int
    size: int


@dataclass(frozen=True)
class Pages:
    """Of one column chunk: values in data pages (nulls and empty lists count), and bytes of the longest page."""

    values: int
    longest: int


def read_chunks(file: Any, name: str) -> list[list[Chunk]]:
    """Column chunks of each row group.

    Args:
        file: open for reading bytes, seekable; its footer's length was checked.
        name: names the file in messages.

    Raises:
        VerificationError: the footer cannot be read.
    """
    size = int(file.seek(0, 2))
    file.seek(max(0, size - _TAIL))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - _TAIL - length))
    try:
        footer, _ = Compact(file.read(length)).parse()
        return [[_chunk(chunk) for chunk in group.get(_CHUNKS, [])] for group in footer.get(_GROUPS, [])]
    except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise VerificationError(f"{name}: its footer is damaged ({error}); fetch it again") from error


def _chunk(struct: Struct) -> Chunk:
    meta = struct[_META]
    start, first = _number(meta, _DATA_OFFSET), _number(meta, _DICTIONARY_OFFSET, 0)
    return Chunk(
        column=meta[_PATH][0].decode(),
        physical=_number(meta, _TYPE),
        values=_number(meta, _VALUES),
        start=first if 0 < first < start else start,
        size=_number(meta, _CHUNK_BYTES),
    )


def _number(struct: Struct, field: int, default: int | None = None) -> int:
    value = struct.get(field, default)
    if not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError(f"a number is {value!r}")
    return value


def read_pages(file: Any, chunk: Chunk, where: str, *, checksums: bool = False) -> Pages:
    """Walk the page headers of a column chunk.

    Args:
        file: open for reading bytes, seekable.
        where: names the column in messages.
        checksums: read the pages too; each must have a checksum and be what it says.

    Raises:
        VerificationError: the chunk does not lie in the file, a header cannot be read, or a page is another.
    """
    start, stop = chunk.start, chunk.start + chunk.size
    if stop > file.seek(0, 2):
        raise VerificationError(f"{where}: its bytes {start} to {stop} do not lie in the file")
    values = longest = 0
    while start < stop:
        header, size = _read_header(file, start, stop, where)
        try:
            uncompressed, compressed = _number(header, _UNCOMPRESSED), _number(header, _COMPRESSED)
            counts = {kind: _number(header.get(kind, {}), 1, 0) for kind in (_DATA, _DICTIONARY, _DATA_V2)}
        except (ValueError, AttributeError) as error:
            raise VerificationError(f"{where}: the page at byte {start} has no size ({error})") from error
        values, longest = values + counts[_DATA] + counts[_DATA_V2], max(longest, uncompressed, compressed)
        if checksums:
            _check_crc(file.read(compressed) if file.seek(start + size) else b"", header.get(_CRC), where)
        start += size + compressed
    if start != stop:
        raise VerificationError(f"{where}: its pages end at byte {start}, the footer says {stop}")
    return Pages(values, longest)


def _check_crc(page: bytes, recorded: Any, where: str) -> None:
    """The checksum is a signed number of 32 bits over the page as it lies there."""
    if not isinstance(recorded, int) or zlib.crc32(page) != recorded & 0xFFFFFFFF:
        raise VerificationError(f"{where}: a page is not what its checksum says")


def _read_header(file: Any, start: int, stop: int, where: str) -> tuple[Struct, int]:
    """A page header and its size."""
    length = _HEADER
    while True:
        file.seek(start)
        data = file.read(min(length, stop - start))
        try:
            return Compact(data).parse()
        except IndexError as error:
            if len(data) == stop - start or length >= _LONGEST_HEADER:
                raise VerificationError(f"{where}: no page header at byte {start}") from error
            length *= 16


class Compact:
    """Parses one struct into a dictionary by field id; IndexError where the data is cut short or no struct."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def parse(self) -> tuple[Struct, int]:
        """The struct and the bytes it takes."""
        return self._struct(0), self._at

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

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise IndexError("cut short")
        return self._data[self._at - size : self._at]

    def _struct(self, depth: int) -> Struct:
        if depth > _DEPTH:
            raise IndexError("nested too deep")
        fields: Struct = {}
        last = 0
        while byte := self._byte():
            last = last + (byte >> 4) if byte >> 4 else self._integer()
            kind = byte & 15
            # of a repeated field the last counts, as in every reader; a field's boolean stands in its type
            fields[last] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self._struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        raise IndexError("unknown type")  # maps are in no Parquet structure

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if depth > _DEPTH or size > len(self._data) - self._at:
            raise IndexError("a list that is longer than the data")
        return [self._value(head & 15, depth) for _ in range(size)]
