"""Thrift's compact protocol, generically: a Parquet footer or page header as nested lists, and back.

A struct is a list of [field id, type, value]; a list is (element type, values); other values are Python's.
"""

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
_INTEGERS = (I16, I32, I64)
Fields = list[list[Any]]


class Reader:
    """Reads values from ``data`` on from ``at``."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> Fields:
        """A struct up to its stop byte."""
        fields: Fields = []
        last = 0
        while byte := self._byte():
            last = last + (byte >> 4) if byte >> 4 else self._integer()
            fields.append([last, byte & 15, self._value(byte & 15)])
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind == BYTE:
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind == DOUBLE:
            return self._take(8)
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (LIST, SET):
            return self._list()
        assert kind == STRUCT, "Parquet has no maps"
        return self.struct()

    def _take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def _list(self) -> tuple[int, list[Any]]:
        byte = self._byte()
        size = byte >> 4 if byte >> 4 < 15 else self._varint()
        kind = byte & 15
        return kind, [self._byte() == TRUE if kind in (TRUE, FALSE) else self._value(kind) for _ in range(size)]


def varint(value: int) -> bytes:
    """Seven bits a byte, low ones first; negative numbers as 64-bit."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(value: int) -> bytes:
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def struct_bytes(fields: Fields) -> bytes:
    """The inverse of ``Reader.struct``; field ids may come in any order."""
    out, last = bytearray(), 0
    for number, kind, value in fields:
        head = (TRUE if value else FALSE) if kind in (TRUE, FALSE) else kind
        step = number - last
        out += bytes([step << 4 | head]) if 0 < step < 16 else bytes([head]) + _integer(number)
        out += b"" if kind in (TRUE, FALSE) else value_bytes(kind, value)
        last = number
    return bytes(out) + b"\0"


def value_bytes(kind: int, value: Any) -> bytes:
    """One value of a type."""
    if kind == BYTE:
        return bytes([value & 255])
    if kind in _INTEGERS:
        return _integer(value)
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind in (LIST, SET):
        inner, values = value
        head = bytes([len(values) << 4 | inner]) if len(values) < 15 else bytes([0xF0 | inner]) + varint(len(values))
        flags = inner in (TRUE, FALSE)
        return head + b"".join(bytes([TRUE if v else FALSE]) if flags else value_bytes(inner, v) for v in values)
    return struct_bytes(value)


def get(fields: Fields, number: int) -> Any:
    """Value of a field, None when absent."""
    return next((field[2] for field in fields if field[0] == number), None)


def put(fields: Fields, number: int, value: Any) -> None:
    """Change the value of a field that is there."""
    for field in fields:
        if field[0] == number:
            field[2] = value


def footer(data: bytes) -> Fields:
    """The footer of a Parquet file: FileMetaData."""
    size = int.from_bytes(data[-8:-4], "little")
    return Reader(data, len(data) - 8 - size).struct()


def with_footer(data: bytes, fields: Fields) -> bytes:
    """The file with another footer."""
    size, new = int.from_bytes(data[-8:-4], "little"), struct_bytes(fields)
    return data[: len(data) - 8 - size] + new + len(new).to_bytes(4, "little") + b"PAR1"


def chunks(fields: Fields) -> list[Fields]:
    """ColumnMetaData of every column of every row group."""
    return [get(column, 3) for group in get(fields, 4)[1] for column in get(group, 1)[1]]


def page(data: bytes, chunk: Fields) -> tuple[Fields, int, int]:
    """A column chunk's first page: header, where that starts, and where the page's bytes start."""
    start = get(chunk, 11) or get(chunk, 9)
    reader = Reader(data, start)
    return reader.struct(), start, reader.at
