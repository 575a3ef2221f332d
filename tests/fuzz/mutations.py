"""What a hostile or broken copy of a capture or of targets may look like; used by store.py and its test.

A mutation is ``mutate(root, rng)`` on a folder that may be changed at will. Most are sealed again afterwards, as an
attacker would: every hash and size in the manifest is then true of the changed files.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import thrift

Rng = np.random.Generator
Mutate = Callable[[Path, Rng], None]
DEEP = 100_000
# JSON text, not values: what no serialiser would write is wanted too.
_WORDS = "null true false 0 -1 1 1.5 -0.0 1e308 -1e308 1e999 NaN Infinity -Infinity [] {} [[]] [null] [{}]"
HOSTILE_JSON = [
    *_WORDS.split(),
    *(str(value) for value in (2**31 - 1, 2**31, 2**53 + 1, 2**63, 10**18, 10**30, -(10**18))),
    "9" * 5000,
    '""',
    '"x"',
    '"0"',
    '"1"',
    '"topk"',
    '"sampled"',
    '"capture"',
    '"../../../../outside"',
    '"/etc/passwd"',
    '"\'; DROP TABLE samples; --"',
    '"[/bold][red]<script>alert(1)</script>"',
    '"\\u001b[2J\\u0000\\r\\n"',
    '"\\ud800"',
    '"' + "x" * 300_000 + '"',
    "[" * 200 + "]" * 200,
    "[1.0, 0.5, 0.5]",
    "[1.0, 1e-300]",
    "[1.0, " + ", ".join(f"{tau / 7}" for tau in range(8, 3000)) + "]",
    '{"\\u0000": 1, "../x": 2, "x": {"y": [1]}}',
    '["' + "0" * 64 + '"]',
    '"' + "0" * 64 + '"',
]
INTEGERS = [0, 1, -1, 2, 7, 100, 2**15, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63), 10**9, 10**18]


def pick(rng: Rng, items: Any) -> Any:
    """One of a sequence."""
    items = list(items)
    return items[int(rng.integers(len(items)))]


# --- JSON files -------------------------------------------------------------------------------------------------------


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


_MARK = "\u2603hostile\u2603"


def _replace_in(data: Any, rng: Rng) -> str:
    """JSON text of ``data`` with one or two places changed."""
    replaced = []
    for _ in range(int(rng.integers(1, 3))):
        path = pick(rng, _paths(data))
        where = data
        for key in path[:-1]:
            where = where[key]
        action = rng.integers(8)
        if action == 0:
            del where[path[-1]]
        elif action == 1 and isinstance(where, dict):
            where["extra" if rng.integers(2) else "__class__"] = _MARK
        elif action == 2 and isinstance(where, list):
            where.append(json.loads(json.dumps(where[path[-1]])))
        else:
            where[path[-1]] = _MARK
    text = json.dumps(data)
    while f'"{json.dumps(_MARK)[1:-1]}"' in text:
        replaced.append(pick(rng, HOSTILE_JSON))
        text = text.replace(json.dumps(_MARK), replaced[-1], 1)
    return text


def manifest_values(root: Path, rng: Rng) -> None:
    """Other values, missing and additional keys in manifest.json."""
    path = root / "manifest.json"
    path.write_text(_replace_in(json.loads(path.read_text()), rng))


def _broken_text(data: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(data)))
    half = data[: len(data) // 2]
    return pick(
        rng,
        [
            data[:at],
            data[:at] + bytes(rng.integers(0, 256, 4, dtype=np.uint8)) + data[at + 4 :],
            data[:at] + b"\xff\xfe\xed\xa0\x80" + data[at:],
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            b"",
            b"\0" * 4096,
            b"[" * DEEP,
            b'{"a":' * DEEP + b"1" + b"}" * DEEP,
            b"[" + data + b"]",
            data.replace(b"{", b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b",", 1),
            data.replace(b"{", b'{"schema_version": 1, "kind": "projection", "xtoken_version": "0",', 1),
            data.rstrip().rstrip(b"}") + b', "parts": [], "schema_version": 2}',
            data.replace(b": 0", b": -0e0"),
            data.replace(b"1", b"9" * 5000, 1),
            b" " * (80 << 20) + data,
            half + b'"' + b"x" * (70 << 20) + b'"' + half,
        ],
    )


def manifest_bytes(root: Path, rng: Rng) -> None:
    """A manifest that is no JSON, or deep, or enormous."""
    path = root / "manifest.json"
    path.write_bytes(_broken_text(path.read_bytes(), rng))


def commit_records(root: Path, rng: Rng) -> None:
    """Commit records with other values, broken, under strange names, or as folders."""
    path = pick(rng, sorted((root / "commits").iterdir()))
    action = rng.integers(6)
    if action <= 1:
        path.write_text(_replace_in(json.loads(path.read_text()), rng))
    elif action == 2:
        path.write_bytes(_broken_text(path.read_bytes(), rng))
    elif action == 3:
        names = ["part-00007.json", "part-99999999999999999999.json", "part-00000.json.tmp", "part-٠٠٠٠٠.json"]
        shutil.copy(path, path.parent / pick(rng, names))
    elif action == 4:
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
        path.symlink_to(root.parent / "secret.json")


def links(root: Path, rng: Rng) -> None:
    """Links in place of files and folders; the target lies outside."""
    name = pick(rng, sorted(p.relative_to(root).as_posix() for p in root.rglob("*")))
    path, outside = root / name, root.parent / "secret-copy"
    action = rng.integers(5)
    if action == 0:
        os.rename(path, outside)
        path.symlink_to(outside)
    elif action == 1 and path.is_file():
        path.unlink()
        path.symlink_to(path.parent / path.name)  # to itself
    elif action == 2 and path.is_file():
        path.unlink()
        os.mkfifo(path) if rng.integers(2) else path.mkdir()
    elif action == 3 and path.is_file():
        path.unlink()
        path.symlink_to("/dev/zero" if rng.integers(2) else root.parent / "secret.json")
    else:
        (root / "data" / "extra").symlink_to(root.parent)


# --- Parquet files ----------------------------------------------------------------------------------------------------


def tables(root: Path) -> list[Path]:
    """All Parquet files that hold something; parts count twice."""
    parts = sorted((root / "data").glob("part-*.parquet"))
    return [path for path in (*parts, *parts, *sorted(root.glob("*.parquet"))) if pq.read_metadata(path).num_rows]


def parquet_bytes(root: Path, rng: Rng) -> None:
    """Bits flipped, bytes cut out or put in, anywhere, in the footer or at the start."""
    path = pick(rng, tables(root))
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    low, high = pick(rng, [(0, len(data)), (footer, len(data)), (footer, len(data)), (4, footer), (0, 200)])
    for _ in range(int(rng.integers(1, 9))):
        at = int(rng.integers(low, min(high, len(data))))
        action = rng.integers(5)
        if action == 0:
            del data[at : at + int(rng.integers(1, 50))]
        elif action == 1:
            data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 20)), dtype=np.uint8))
        elif action == 2:
            data[at] = int(rng.choice([0, 0x7F, 0x80, 0xFF]))
        else:
            data[at] ^= 1 << int(rng.integers(8))
        high = min(high, len(data))
        if high <= low:
            break
    if rng.integers(8) == 0:
        del data[int(rng.integers(len(data) + 1)) :]
    path.write_bytes(data)


def _nodes(value: Any, found: list[list[Any]]) -> list[list[Any]]:
    """All fields below a struct."""
    for field in value:
        found.append(field)
        kind, inner = field[1], field[2]
        if kind == thrift.STRUCT:
            _nodes(inner, found)
        elif kind in (thrift.LIST, thrift.SET) and inner[0] == thrift.STRUCT:
            for one in inner[1]:
                _nodes(one, found)
    return found


def _change_field(field: list[Any], rng: Rng) -> None:
    kind, value = field[1], field[2]
    if kind in (thrift.I16, thrift.I32, thrift.I64):
        near = [value + 1, value - 1, value * 2, -value]
        field[2] = pick(rng, [*INTEGERS, *near])
    elif kind == thrift.BINARY:
        choices = [b"", b"x", b"\xff\xfe", b"sample_id", b"../x", value * 3, value[:-1], b"x" * 100_000]
        field[2] = pick(rng, choices)
    elif kind in (thrift.LIST, thrift.SET):
        inner, values = value
        changed = [values[:-1], values * 2, [], values[::-1], values * 500 if len(values) < 20 else values[1:]]
        field[2] = (inner, pick(rng, changed))
    elif kind == thrift.STRUCT:
        field[2] = pick(rng, [[], value[1:], value[:-1], value * 2])
    else:
        field[2] = not value if kind in (thrift.TRUE, thrift.FALSE) else value


def parquet_footer(root: Path, rng: Rng) -> None:
    """One to three fields of a footer changed, well-formed all the same."""
    path = pick(rng, tables(root))
    data = path.read_bytes()
    footer = thrift.footer(data)
    for _ in range(int(rng.integers(1, 4))):
        _change_field(pick(rng, _nodes(footer, [])), rng)
    path.write_bytes(thrift.with_footer(data, footer))


def with_page(data: bytes, chunk_number: int, change: Callable[[list[Any], bytes], tuple[list[Any], bytes]]) -> bytes:
    """The file with the first page of a column chunk changed; the footer's offsets follow, its counts do not."""
    footer = thrift.footer(data)
    chunk = thrift.chunks(footer)[chunk_number]
    size = int.from_bytes(data[-8:-4], "little")
    header, start, body = thrift.page(data, chunk)
    stop = start + thrift.get(chunk, 7)
    header, content = change(header, data[body:stop])
    new = thrift.struct_bytes(header) + content
    at = len(data) - 8 - size
    for number in (9, 11):
        thrift.put(chunk, number, at)
    thrift.put(chunk, 7, len(new))
    return thrift.with_footer(data[:at] + new + data[at:], footer)


def parquet_pages(root: Path, rng: Rng) -> None:
    """Fields of page headers, and bytes of the pages behind them, changed."""
    path = pick(rng, tables(root))
    data = path.read_bytes()

    def change(header: list[Any], content: bytes) -> tuple[list[Any], bytes]:
        if rng.integers(4):
            _change_field(pick(rng, _nodes(header, [])), rng)
        else:
            content = bytes(rng.permutation(np.frombuffer(content, np.uint8)))
        return header, content

    chunk = int(rng.integers(len(thrift.chunks(thrift.footer(data)))))
    data = with_page(data, chunk, change)
    path.write_bytes(data)


def write(path: Path, table: pa.Table, **options: Any) -> None:
    """A table as this project writes it, more or less."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"compression": "zstd", "use_dictionary": False, **options})
    path.write_bytes(sink.getvalue())


def _as_type(column: pa.ChunkedArray, rng: Rng) -> pa.Array:
    """The same length and another type."""
    rows = column.to_pylist()
    is_list = pa.types.is_list(column.type)
    leaf = column.type.value_type if is_list else column.type
    leaves = [pa.int64(), pa.uint32(), pa.int8(), pa.float64(), pa.float32(), pa.string(), pa.binary(), pa.bool_()]
    wrapped: Any = [pa.list_, pa.large_list] if is_list else [lambda kind: kind, lambda kind: pa.list_(kind)]
    for _ in range(20):
        kind = pick(rng, wrapped)(pick(rng, [leaf, *leaves]))
        try:
            return pa.array(rows, kind)
        except (pa.ArrowException, TypeError, OverflowError):
            continue
    choices = [pa.nulls(len(rows)), pa.array([[row] for row in rows]), pa.array([{"a": row} for row in rows])]
    return pick(rng, choices)


def columns(root: Path, rng: Rng) -> None:
    """Columns of other types, with nulls, missing, doubled, renamed, in another order, or dictionary-encoded."""
    path = pick(rng, tables(root))
    table = pq.read_table(path)
    at = int(rng.integers(table.num_columns))
    name, column = table.column_names[at], table.column(at)
    action = rng.integers(8)
    if action == 0:
        table = table.drop_columns([name])
    elif action == 1:
        table = table.append_column(pick(rng, [name, "extra", ""]), column)
    elif action == 2:
        table = table.rename_columns([*table.column_names[:at], "renamed", *table.column_names[at + 1 :]])
    elif action == 3:
        table = table.select(list(rng.permutation(table.column_names)))
    elif action == 4:
        hole = pa.array([None if rng.integers(2) else row for row in column.to_pylist()], column.type)
        table = table.set_column(at, pa.field(name, column.type), hole)
    elif action == 5 and pa.types.is_list(column.type):
        rows = [[None, *row][: len(row)] if row else row for row in column.to_pylist()]
        kind = pa.list_(pa.field("element", column.type.value_type))
        table = table.set_column(at, name, pa.array(rows, kind))
    elif action == 6 and not pa.types.is_nested(column.type):
        table = table.set_column(at, name, column.dictionary_encode())
    else:
        table = table.set_column(at, name, _as_type(column, rng))
    options = pick(rng, [{}, {}, {"use_dictionary": True}, {"store_schema": False}, {"row_group_size": 1}])
    write(path, table, **options)


def _hostile(kind: pa.DataType, rng: Rng) -> Any:
    """A value of a column's type that none of ours would hold."""
    if pa.types.is_floating(kind):
        return pick(rng, [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.5, -0.0, 0.0, -1e-40])
    if pa.types.is_integer(kind):
        bits = kind.bit_width
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(kind) else (0, 2**bits - 1)
        return pick(rng, [value for value in (0, 1, -1, 2, 7, 255, 399, 400, 65535, low, high) if low <= value <= high])
    if pa.types.is_boolean(kind):
        return bool(rng.integers(2))
    if pa.types.is_string(kind):
        return pick(rng, ["", "x", "\0", "../../x", "'; DROP TABLE x; --", "x" * 100_000, "é\u202e[/b]", "bos", "hole"])
    return pick(rng, [b"", b"x", b"\xff\xfe", b"x" * 100_000, b" "])


def _change_list(row: list[Any], kind: pa.DataType, rng: Rng) -> list[Any]:
    action, at = rng.integers(8), int(rng.integers(len(row) + 1))
    if action == 0:
        return row[:at]
    if action == 1:
        return [*row, _hostile(kind, rng)]
    if action == 2:
        return []
    if action == 3:
        return [_hostile(kind, rng)] * len(row)
    if action == 4:
        return row[::-1]
    if action == 5:
        return row * 40
    return [*row[:at], _hostile(kind, rng), *row[at + 1 :]]


def values(root: Path, rng: Rng) -> None:
    """Values that no writer of ours would write, in one to three cells of a table, types as they should be."""
    path = pick(rng, tables(root))
    table = pq.read_table(path)
    rows = table.to_pylist()
    for _ in range(int(rng.integers(1, 4))):
        field, row = pick(rng, table.schema), pick(rng, rows)
        name = field.name
        if pa.types.is_list(field.type):
            row[name] = _change_list(row[name] or [], field.type.value_type, rng)
        else:
            row[name] = _hostile(field.type, rng)
    action = rng.integers(12)
    rows = rows * 2 if action == 0 else rows[:-1] if action == 1 else [] if action == 2 else rows
    write(path, pa.Table.from_pylist(rows, table.schema))


# --- sealing ----------------------------------------------------------------------------------------------------------


def seal(root: Path, hash_of_vocabulary: Callable[[Path, dict[str, Any]], str | None]) -> None:
    """Make every hash, size and count of the manifest and of the commit records true, where they can be found out."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (root / name).is_file():
            manifest["files"][name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    for part in manifest["parts"]:
        file = root / "data" / f"part-{part['index']:05d}.parquet"
        data = file.read_bytes()
        part.update(sha256=hashlib.sha256(data).hexdigest(), file_bytes=len(data))
        try:
            part["samples"] = max(0, pq.read_metadata(io.BytesIO(data)).num_rows)
        except Exception:  # the damage is the point
            continue
        finally:
            (root / "commits" / f"part-{part['index']:05d}.json").write_text(json.dumps(part))
    found = hash_of_vocabulary(root, manifest)
    if found is not None:
        manifest["tokenizer"]["hash"] = found
    path.write_text(json.dumps(manifest))


def seal_sums(root: Path) -> None:
    """Make SHA256SUMS true of the files that are still there."""
    path = root / "SHA256SUMS"
    if path.is_file():
        names = [line.split(None, 1)[1] for line in path.read_text().splitlines()]
        files = [name for name in names if (root / name).is_file() and not (root / name).is_symlink()]
        lines = [f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
        path.write_text("".join(lines))
