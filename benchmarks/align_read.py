"""Reading the parts of a capture, all columns: DuckDB to Arrow, pyarrow as the product reads, and what checks cost."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.align_corpus import build
from benchmarks.align_turns import Figures, in_turn
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_parquet, records
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.schemas.manifest import CaptureManifest, read_manifest

# Tokens of 1 MiB of text, which is a shard if nothing else is said, and of a shard of a small capture.
DEFAULT_PART, SMALL_PART = 330_000, 18_000
_SELECT = (
    "SELECT * EXCLUDE (snapped), coalesce(complete AND teacher_ids[-1] = 2, false) AS teacher_eos "
    "FROM read_parquet($path)"
)
DUCKDB, DUCKDB_KEPT, PYARROW = "DuckDB, a connection per part", "DuckDB, one connection", "pyarrow, pages checked"
BARE, PAGES, ROWS = "pyarrow, nothing checked", "of both: checks of pages", "of both: checks of rows"


def settings(threads: int) -> dict[str, Any]:
    """How the stage would run DuckDB: nothing spilled."""
    return {"memory_limit": "512MB", "threads": threads, "temp_directory": ""}


def paths(capture: str) -> list[str]:
    """Its parts, in order."""
    return [Folder(capture).url(data_name(index)) for index in sorted(records(capture))]


def count(batches: Iterator[pa.RecordBatch]) -> int:
    """Read to the end, holding one batch at a time."""
    return sum(batch.num_rows for batch in batches)


def by_duckdb(connection: "duckdb.DuckDBPyConnection", path: str) -> int:
    """One part."""
    found: Any = connection.sql(_SELECT, params={"path": path})
    return count(found.to_arrow_reader(ROW_GROUP))


def a_connection_each(files: list[str]) -> int:
    """As a stage does that bounds each part's memory by itself."""
    total = 0
    for path in files:
        with duckdb.connect(config=settings(1)) as connection:
            total += by_duckdb(connection, path)
    return total


def one_connection(files: list[str]) -> int:
    """All parts one after the other."""
    with duckdb.connect(config=settings(1)) as connection:
        return sum(by_duckdb(connection, path) for path in files)


def by_product(files: list[str]) -> int:
    """With the checks of ``xtoken.schemas.io.parquet_limits``."""
    return sum(count(iter_parquet(path)) for path in files)


def by_pyarrow(files: list[str]) -> int:
    """The library alone, on one thread."""
    return sum(count(pq.ParquetFile(path).iter_batches(ROW_GROUP, use_threads=False)) for path in files)


def each(work: Callable[[Any], Any], items: list[Any]) -> None:
    """Call it with each."""
    for item in items:
        work(item)


def one_size(capture: str, turns: int) -> Figures:
    """Microseconds per token of every way, for one capture."""
    manifest, files = read_manifest(capture, CaptureManifest), paths(capture)
    tokens = sum(part.tokens for part in manifest.parts)
    check = CaptureCheck.of(manifest)
    held = [batch for path in files for batch in iter_parquet(path)]
    works = {
        DUCKDB: partial(a_connection_each, files),
        DUCKDB_KEPT: partial(one_connection, files),
        PYARROW: partial(by_product, files),
        BARE: partial(by_pyarrow, files),
        PAGES: partial(each, check.file, files),
        ROWS: partial(each, check.batch, held),
    }
    found, results = in_turn(works, tokens, turns)
    assert len({results[name] for name in (DUCKDB, DUCKDB_KEPT, PYARROW, BARE)}) == 1, "a way lost rows"
    return {"tokens": tokens, "parts": len(files), "microseconds": found}


def measure(capture: str, folder: Path, tokens: int, turns: int) -> Figures:
    """Parts of the size that a capture has when nothing else is said, and small ones."""
    sizes = {}
    for shards in (max(1, round(tokens / each)) for each in (DEFAULT_PART, SMALL_PART)):
        out = folder / f"read-{shards}"
        build(capture, out, tokens, shards)
        sizes[str(shards)] = one_size(str(out), turns)
    return sizes


def report(found: Figures) -> list[str]:
    """Markdown."""
    lines = ["## Reading", "", "Microseconds per teacher token, all columns, one thread.", ""]
    for one in found.values():
        lines += [f"{one['tokens']:,} tokens in {one['parts']} parts", ""]
        lines += ["| | CPU | wall clock |", "|---|---|---|"]
        lines += [f"| {name} | {us['cpu']:.3f} | {us['wall']:.3f} |" for name, us in one["microseconds"].items()]
        lines += [""]
    return lines
