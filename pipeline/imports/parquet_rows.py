"""Rows of others' Parquet files, a few at a time, in slices that become parts.

Row groups of such files hold gigabytes (a thousand rows of 8,192 tokens), so nothing reads one whole: pages are looked
at first, then rows are decoded a few at a time. A group that decodes to more than 1 GiB is believed only where it has
at most 64 values for each byte of the file, which real rows, nearly incompressible, are far below.

Shapes: T lists of one row.
"""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.imports.samples import Slice
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_headers import Chunk, read_pages
from xtoken.schemas.io.parquet_limits import GROUP_BYTES, PAGE_BYTES, group_chunks, open_parquet, reading
from xtoken.schemas.io.remote import named_errors, open_filesystem, open_url

_WAY_OUT = "fetch it again from its source"
_VALUES_PER_BYTE = 64
_BATCH_BYTES = 16 << 20
_MOST_ROWS = 64  # of a batch
_MOST_SLICES, _MOST_FILE_ROWS = 1 << 18, 1 << 24
_DECODED = 8  # bytes that a value and its levels may take
_BUFFER = 1 << 20


class BadRow(XtokenError):
    """A row of a file that cannot be what the format says; under ``--on-bad skip`` it is left out.

    Attributes:
        reason: what is counted.
        detail: of this one.
    """

    def __init__(
        self, place: str, reason: str, detail: str, way_out: str = "--on-bad skip leaves such rows out"
    ) -> None:
        super().__init__(f"{place}: {reason}: {detail}; {way_out}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SourceFile:
    """A file: path or URL, a short name that no other of the run has, and bytes."""

    path: str
    name: str
    size: int


def list_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[SourceFile]:
    """Files with one of these endings that are named, or lie below named folders, in order.

    Raises:
        XtokenError: a path is missing, a folder has no such file, or two files would have one name.
    """
    found: list[SourceFile] = []
    for path in paths:
        with named_errors(path):
            found += _files_of(path, suffixes)
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise XtokenError(f"two files are named {twice[0]!r}, and samples are named by them; give their common folder")
    return found


def _files_of(path: str, suffixes: Sequence[str]) -> list[SourceFile]:
    fs, inner = open_filesystem(path)
    if not fs.exists(inner):
        raise XtokenError(f"{path} does not exist; give files or folders that hold {' or '.join(suffixes)}")
    if fs.isfile(inner):
        if not inner.lower().endswith(tuple(suffixes)):
            raise XtokenError(f"{path} is not of this format, whose files end in {' or '.join(suffixes)}")
        return [SourceFile(path, posixpath.basename(inner), int(fs.size(inner) or 0))]
    root = inner.rstrip("/")
    below = sorted(name for name in fs.find(root) if name.lower().endswith(tuple(suffixes)))
    if not below:
        raise XtokenError(f"{path} holds no file that ends in {' or '.join(suffixes)}; name the folder of the data")
    short = [name[len(root) :].lstrip("/") for name in below]
    return [
        SourceFile(f"{path.rstrip('/')}/{name}", name, int(fs.size(full) or 0))
        for name, full in zip(short, below, strict=True)
    ]


@dataclass
class _Open:
    """A file that is being read: its rows, and the number of the next one."""

    file: int
    rows: Iterator[pa.RecordBatch]
    stack: ExitStack
    at: int = 0
    held: pa.RecordBatch | None = None


@dataclass
class ParquetRows:
    """Files of one format.

    Attributes:
        files: in order.
        columns: top-level columns that are read, of those that a file has.
        needed: those that each file must have.
    """

    files: list[SourceFile]
    columns: tuple[str, ...]
    needed: tuple[str, ...]
    _open: _Open | None = field(default=None, repr=False)

    def schema(self, number: int = 0) -> pa.Schema:
        """Columns of a file.

        Raises:
            VerificationError: it is no Parquet file, or its footer is damaged.
        """
        path = self.files[number].path
        with reading(path, _WAY_OUT), open_url(path) as file:
            return open_parquet(file, path).schema_arrow

    def slices(self, part_bytes: int) -> list[Slice]:
        """Runs of rows of about so many decoded bytes, none over two files.

        Raises:
            XtokenError: a file lacks a column, or the slices are too many.
        """
        found: list[Slice] = []
        for number, one in enumerate(self.files):
            with reading(one.path, _WAY_OUT), open_url(one.path) as file:
                parquet = open_parquet(file, one.path)
            names = parquet.schema_arrow.names
            if twice := [name for name in self.columns if names.count(name) > 1]:
                raise XtokenError(f"{one.path} has the column {twice[0]} {names.count(twice[0])} times; {_WAY_OUT}")
            missing = [name for name in self.needed if name not in names]
            if missing:
                raise XtokenError(
                    f"{one.path} lacks the column {missing[0]}; its columns are "
                    f"{', '.join(names[:12])}, which is another format"
                )
            if parquet.metadata.num_rows > _MOST_FILE_ROWS:
                raise XtokenError(
                    f"{one.path} has {parquet.metadata.num_rows} rows, more than {_MOST_FILE_ROWS}; split it"
                )
            found += _cut(number, parquet.metadata, part_bytes)
            if len(found) > _MOST_SLICES:
                raise XtokenError(f"--part-bytes {part_bytes} makes more than {_MOST_SLICES} parts; use a larger one")
        return found

    def read(self, wanted: Slice) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Rows of a slice in order, a few at a time, each time with the number of the first.

        Raises:
            VerificationError: the file is damaged, or asks for more than is read.
        """
        path = self.files[wanted.file].path
        with reading(path, _WAY_OUT):
            if self._open is None or self._open.file != wanted.file or self._open.at > wanted.start:
                self._begin(wanted.file)
            here = self._open
            assert here is not None
            while here.at < wanted.stop:
                batch = here.held if here.held is not None else next(here.rows, None)
                if batch is None:
                    raise VerificationError(f"{path} ends at row {here.at}, before row {wanted.stop}; {_WAY_OUT}")
                skipped = min(max(0, wanted.start - here.at), batch.num_rows)
                taken = min(batch.num_rows, wanted.stop - here.at) - skipped
                first, here.at = here.at + skipped, here.at + skipped + max(0, taken)
                rest = batch.slice(skipped + max(0, taken))
                here.held = rest if rest.num_rows else None
                if taken > 0:
                    yield first, batch.slice(skipped, taken)

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.stack.close()
            self._open = None

    def _begin(self, number: int) -> None:
        self.close()
        stack, one = ExitStack(), self.files[number]
        file = stack.enter_context(open_url(one.path))
        self._open = _Open(number, _batches(file, one.path, self.columns), stack)


def _cut(number: int, metadata: Any, part_bytes: int) -> Iterator[Slice]:
    start = at = 0
    held = 0.0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        size = max(0, metadata.row_group(group).total_byte_size) / max(1, rows)
        for _ in range(rows):
            at, held = at + 1, held + size
            if held >= part_bytes:
                yield Slice(number, start, at)
                start, held = at, 0.0
    if at > start:
        yield Slice(number, start, at)


def _batches(file: Any, path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    parquet = open_parquet(file, path, buffer_size=_BUFFER, pre_buffer=False)
    wanted = [name for name in columns if name in parquet.schema_arrow.names]
    for group, chunks in enumerate(group_chunks(parquet, file, path)):
        rows = parquet.metadata.row_group(group).num_rows
        if not rows:
            continue
        size = sum(_checked(chunk, file, f"{path}, row group {group}") for chunk in chunks if chunk.column in wanted)
        most = int(np.clip(_BATCH_BYTES // max(1, size // rows), 1, _MOST_ROWS))
        for batch in parquet.iter_batches(most, row_groups=[group], columns=wanted, use_threads=False):
            batch.validate(full=True)
            yield batch


def _checked(chunk: Chunk, file: Any, where: str) -> int:
    """Bytes that a column of a row group decodes to, after a look at its pages."""
    pages = read_pages(file, chunk, f"{where}, column {chunk.column[:100]}")
    decoded = pages.values * _DECODED
    if pages.values != chunk.values or pages.longest > PAGE_BYTES:
        raise VerificationError(f"{where}: pages of {chunk.column[:100]} are not what the footer says; {_WAY_OUT}")
    if decoded > GROUP_BYTES and pages.values > _VALUES_PER_BYTE * chunk.size:
        raise VerificationError(
            f"{where}: column {chunk.column[:100]} decodes {chunk.size} bytes to {pages.values} values; it was damaged "
            "or made to harm: fetch it again from a source you trust"
        )
    return decoded


def numbers(batch: pa.RecordBatch, name: str, row: int, place: str) -> NDArray[Any] | None:
    """A row's list of numbers; None where the file has no such column, or null there.

    Raises:
        BadRow: it is no list of numbers, or has nulls.
    """
    if batch.schema.get_field_index(name) < 0:
        return None
    value = batch[name][row]
    if not value.is_valid:
        return None
    if not _is_list(value.type):
        raise BadRow(place, f"{name} is no list", f"it is {value.type}")
    return _flat(value.values, name, place)


def matrix(batch: pa.RecordBatch, name: str, row: int, place: str) -> NDArray[Any]:
    """A row's list of equally long lists of numbers, [T, width].

    Raises:
        BadRow: it is none.
    """
    value = batch[name][row]
    if not value.is_valid or not _is_list(value.type) or not _is_list(value.type.value_type):
        raise BadRow(place, f"{name} is no list of lists", f"it is {value.type if value.is_valid else 'null'}")
    rows = value.values
    lengths = pc.list_value_length(rows)
    if rows.null_count:
        raise BadRow(place, f"lists of {name} that are null", f"{rows.null_count} of {len(rows)}")
    if (len(rows) and lengths[0] != pc.max(lengths)) or pc.min(lengths) != pc.max(lengths):
        found = pc.min_max(lengths)
        raise BadRow(
            place, f"lists of {name} of unequal lengths", f"they have {found['min']} to {found['max']} numbers"
        )
    width = lengths[0].as_py() if len(rows) else 0
    return _flat(pc.list_flatten(rows), name, place).reshape(len(rows), width)


def _flat(values: pa.Array, name: str, place: str) -> NDArray[Any]:
    if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        what = f"{values.null_count} nulls" if values.null_count else f"{values.type}"
        raise BadRow(place, f"{name} holds something else than numbers", f"it has {what}")
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def byte_rows(values: NDArray[Any], width: int, name: str, place: str) -> NDArray[np.uint8]:
    """A matrix as bytes, of a width that the settings say.

    Raises:
        BadRow: another width, or a number that is no byte.
    """
    if values.shape[1] != width:
        raise BadRow(
            place,
            f"rows of {name} of another length",
            f"they have {values.shape[1]} bytes, and by --compression each has {width}",
            "give the configuration that the set was written with",
        )
    if values.dtype != np.uint8 and len(values) and (values.min() < 0 or values.max() > 255):
        raise BadRow(place, f"{name} holds numbers that are no bytes", f"they go from {values.min()} to {values.max()}")
    return whole_numbers(values, name, place).astype(np.uint8, copy=False)


def whole_numbers(values: NDArray[Any], name: str, place: str) -> NDArray[np.int64]:
    """Numbers as int64; what is above its largest becomes negative, which is no id.

    Raises:
        BadRow: one is no whole number.
    """
    if np.issubdtype(values.dtype, np.floating):
        odd = values[~(np.isfinite(values) & (values == np.floor(values)))]
        if odd.size:
            raise BadRow(place, f"{name} holds something else than whole numbers", f"it has {float(odd[0])}")
        values = np.clip(values, -1.0, 2.0**53)
    return values.astype(np.int64)
