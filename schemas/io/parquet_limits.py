"""What an untrusted Parquet file may ask for, looked at before anything of it is decoded.

A list of 10**9 zeros costs Parquet a few hundred bytes, and a footer may say of it whatever it likes: pyarrow believes
the headers of the pages, so these are read too, and must add up to what the footer says. Bounds, all far above what
this project writes (row groups of 32 samples):

    footer                       4 MiB, 4,096 row groups, 256 columns
    row group                    2**20 rows; 1 GiB decoded: numbers are counted before they are read, bytes while
    page                         256 MiB; a batch of byte strings is as short as its longest page asks for
    table that is read whole     1 GiB decoded
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_headers import Chunk, Pages, read_chunks, read_pages

FOOTER_BYTES = 4 << 20
GROUPS = 1 << 12
COLUMNS = 256
GROUP_ROWS = 1 << 20
GROUP_BYTES = 1 << 30
PAGE_BYTES = 256 << 20
TABLE_BYTES = 1 << 30
# Decoded values of a column, and the two 16-bit levels that say where lists and nulls are.
_WIDTH = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}  # by number of the physical type; byte strings have none
_LEVELS = 4
_TAIL = 8
_ROWS = 1 << 14


@contextmanager
def reading(name: str, way_out: str) -> Iterator[None]:
    """Turn what libraries raise on damaged files inside the block into VerificationError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise VerificationError(f"{name} cannot be read ({str(error)[:500]}); {way_out}") from error


def open_parquet(file: Any, name: str, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file and check its footer; ``file`` is open for reading bytes and seekable.

    Args:
        options: of ``pyarrow.parquet.ParquetFile``.

    Raises:
        VerificationError: the footer asks for more than the bounds, or points outside the file.
        pa.ArrowException, OSError: it is not a Parquet file (see ``reading``).
    """
    size = int(file.seek(0, 2))
    file.seek(max(0, size - _TAIL))
    footer = int.from_bytes(file.read(4), "little")
    _refuse(name, "a footer of {} bytes", footer, FOOTER_BYTES)
    file.seek(0)
    parquet = pq.ParquetFile(file, **options)
    check_footer(parquet.metadata, name)
    return parquet


def check_footer(metadata: Any, name: str) -> None:
    """Raise VerificationError unless a footer (pyarrow.parquet.FileMetaData) keeps to the bounds."""
    _refuse(name, "{} row groups", metadata.num_row_groups, GROUPS)
    _refuse(name, "{} columns", metadata.num_columns, COLUMNS)
    rows = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        _refuse(name, f"{{}} rows in row group {group}", row_group.num_rows, GROUP_ROWS)
        rows += row_group.num_rows
    if rows != metadata.num_rows:
        raise VerificationError(f"{name}: row groups hold {rows} rows, the footer says {metadata.num_rows}")


def batches(
    parquet: pq.ParquetFile,
    file: Any,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    rows: int = _ROWS,
    groups: Sequence[int] | None = None,
    chunks: list[list[Chunk]] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Record batches of some row groups, the pages of each checked before it is read.

    Args:
        parquet: from ``open_parquet`` of ``file``.
        columns: names of top-level columns; all when left out.
        rows: most rows of a batch.
        groups: row groups; all when left out.
        chunks: ``group_chunks`` of this file, for those who read it group by group.

    Raises:
        VerificationError: a row group asks for more than the bounds, or its pages are not what the footer says.
        pa.ArrowException, OSError: damaged pages (see ``reading``).
    """
    wanted, chunks = None if columns is None else list(columns), chunks or group_chunks(parquet, file, name)
    for group in _filled(parquet, range(len(chunks)) if groups is None else groups):
        most = check_group(chunks[group], file, group, name, columns)
        size = 0
        for batch in parquet.iter_batches(min(rows, most), row_groups=[group], columns=wanted):
            size += batch.nbytes
            _refuse(name, f"{{}} decoded bytes in row group {group}", size, GROUP_BYTES)
            batch.validate(full=True)  # strings that are not UTF-8
            yield batch


def read_whole(file: Any, name: str) -> pa.Table:
    """A small Parquet file as one table.

    Raises:
        VerificationError: more than the bounds.
        pa.ArrowException, OSError: it is damaged (see ``reading``).
    """
    parquet = open_parquet(file, name)
    kept, size = [], 0
    for batch in batches(parquet, file, name):
        size += batch.nbytes
        _refuse(name, "{} decoded bytes", size, TABLE_BYTES)
        kept.append(batch)
    return pa.Table.from_batches(kept, parquet.schema_arrow)


def check_file(file: Any, name: str) -> pq.ParquetFile:
    """Check footer and all pages, for readers that are not ours (DuckDB); the file opened.

    Raises:
        VerificationError, pa.ArrowException, OSError: as ``batches``.
    """
    parquet = open_parquet(file, name)
    chunks = group_chunks(parquet, file, name)
    for group in _filled(parquet, range(len(chunks))):
        check_group(chunks[group], file, group, name)
    return parquet


def check_pages(file: Any, name: str, schema: pa.Schema, rows: int) -> None:
    """A file that was just written lies there as it was meant: its columns, its rows, and the checksum of every page.

    Raises:
        VerificationError, pa.ArrowException, OSError: it does not.
    """
    parquet = open_parquet(file, name)
    if not parquet.schema_arrow.equals(schema) or parquet.metadata.num_rows != rows:
        raise VerificationError(f"{name} has {parquet.metadata.num_rows} rows of other columns than the {rows} written")
    for group, chunks in enumerate(group_chunks(parquet, file, name)):
        for chunk in chunks:
            where = f"{name}, row group {group}, column {chunk.column[:100]}"
            _check_pages(read_pages(file, chunk, where, checksums=True), chunk, where)


def _filled(parquet: pq.ParquetFile, groups: Sequence[int]) -> list[int]:
    """Those with rows; of the others nothing is decoded, and their columns have no pages."""
    return [group for group in groups if parquet.metadata.row_group(group).num_rows]


def group_chunks(parquet: pq.ParquetFile, file: Any, name: str) -> list[list[Chunk]]:
    """Column chunks of each row group; VerificationError unless they are as many as pyarrow finds."""
    chunks_of_groups = read_chunks(file, name)
    expected = [parquet.metadata.num_columns] * parquet.metadata.num_row_groups
    if [len(chunks) for chunks in chunks_of_groups] != expected:
        raise VerificationError(f"{name}: its footer contradicts itself about columns or row groups; fetch it again")
    return chunks_of_groups


def check_group(chunks: Sequence[Chunk], file: Any, group: int, name: str, columns: Sequence[str] | None = None) -> int:
    """Read the page headers of a row group; returns how many rows of it may be decoded at once.

    Raises:
        VerificationError: more than the bounds, or headers that contradict the footer.
    """
    decoded, longest = 0, 1
    for chunk in chunks:
        if columns is not None and chunk.column not in columns:
            continue
        where = f"{name}, row group {group}, column {chunk.column[:100]}"
        pages = read_pages(file, chunk, where)
        _check_pages(pages, chunk, where)
        width = _WIDTH.get(chunk.physical)
        if width is None:
            longest = max(longest, pages.longest)
        decoded += pages.values * (_LEVELS + (width or _LEVELS))
        _refuse(name, f"{{}} decoded bytes in row group {group}", decoded, GROUP_BYTES)
    return max(1, PAGE_BYTES // longest)


def _check_pages(pages: Pages, chunk: Chunk, where: str) -> None:
    _refuse(where, "a page of {} bytes", pages.longest, PAGE_BYTES)
    if pages.values != chunk.values:
        raise VerificationError(f"{where}: pages hold {pages.values} values, the footer says {chunk.values}")


def _refuse(name: str, what: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise VerificationError(
            f"{name} has {what.format(value)}, more than the {most} that are read; "
            "it was damaged or made to harm: fetch it again from a source you trust"
        )
