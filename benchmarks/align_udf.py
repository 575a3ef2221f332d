"""How rows reach the compiled projection: batches that pyarrow or DuckDB reads, or DuckDB calling it as a function.

Each way reads the row columns of a capture's parts, restores ids, decodes, normalises and projects through P-KL's
routes, batch by batch. The stage also needs the student's tokens of each sample, which no way gives.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.align_project import RowSet, SparseMap, by_kernel, maps, real_rows
from benchmarks.align_read import paths, settings
from benchmarks.align_turns import Figures, in_turn, lines_of
from xtoken.pipeline.store.codes import Codes, restore_ids
from xtoken.pipeline.store.reader import ids_of_codes, iter_parquet
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, read_manifest

COLUMNS = ["kept", "topk_codes", "topk_gap", "rest_gap"]
PYARROW, FED, UDF = "pyarrow, pages checked, to batches", "DuckDB to batches", "DuckDB, Arrow function"
_TYPES = ["UTINYINT[]", "INTEGER[]", "USMALLINT[]", "USMALLINT[]"]
_RETURNS = "STRUCT(count INTEGER[], ids INTEGER[], logprob FLOAT[], rest FLOAT[])"


class Projector:
    """Stored row columns of a batch to targets."""

    def __init__(self, capture: str, to: SparseMap) -> None:
        codec: CodecInfo = read_manifest(capture, CaptureManifest).codec
        self._codec, self._to = codec, to
        self._id_of_code: Codes | None = ids_of_codes(capture)

    def batch(self, batch: pa.RecordBatch) -> tuple[NDArray[Any], ...]:
        """Count, ids, log-probabilities and REST of all rows."""
        rows = RowSet.of(restore_ids(batch, self._id_of_code), self._codec)
        return by_kernel(rows, self._to)

    def function(self, kept: Any, codes: Any, gap: Any, rest_gap: Any) -> pa.Array:
        """As DuckDB calls it: four list columns in, a struct of four list columns out."""
        arrays = [
            one.combine_chunks() if isinstance(one, pa.ChunkedArray) else one for one in (kept, codes, gap, rest_gap)
        ]
        count_R, ids, logprob, rest_R = self.batch(pa.RecordBatch.from_arrays(arrays, names=COLUMNS))
        rows_at = arrays[0].offsets.to_numpy() - arrays[0].offsets[0].as_py()
        entries_at = np.concatenate([np.zeros(1, np.int64), np.cumsum(count_R, dtype=np.int64)])[rows_at]
        pairs = ((rows_at, count_R), (entries_at, ids), (entries_at, logprob), (rows_at, rest_R))
        lists = [pa.ListArray.from_arrays(pa.array(at.astype(np.int32)), pa.array(values)) for at, values in pairs]
        return pa.StructArray.from_arrays(lists, ["count", "ids", "logprob", "rest"])


def totals(found: Iterator[tuple[NDArray[Any], ...]]) -> tuple[int, float]:
    """Entries, and their mass with REST: what is compared."""
    entries, mass = 0, 0.0
    for _, ids, logprob, rest_R in found:
        entries += len(ids)
        mass += float(np.exp(logprob.astype(np.float64)).sum() + np.exp(rest_R.astype(np.float64)).sum())
    return entries, mass


def by_pyarrow(files: list[str], projector: Projector, rows: int) -> tuple[int, float]:
    """The product's reader."""
    return totals(projector.batch(batch) for path in files for batch in iter_parquet(path, COLUMNS, rows))


def by_duckdb(files: list[str], projector: Projector, rows: int) -> tuple[int, float]:
    """DuckDB reads; one connection for all parts."""
    with duckdb.connect(config=settings(1)) as connection:
        found: Any = connection.sql(f"SELECT {', '.join(COLUMNS)} FROM read_parquet($paths)", params={"paths": files})
        return totals(projector.batch(batch) for batch in found.to_arrow_reader(rows))


def by_function(files: list[str], projector: Projector, rows: int) -> tuple[int, float]:
    """DuckDB reads and calls; how many rows it calls with is its own choice (up to 2,048)."""
    query = f"SELECT project({', '.join(COLUMNS)}) AS t FROM read_parquet($paths)"
    with duckdb.connect(config=settings(1)) as connection:
        connection.create_function("project", projector.function, _TYPES, _RETURNS, type="arrow")
        found: Any = connection.sql(query, params={"paths": files})
        return totals(_fields(batch["t"]) for batch in found.to_arrow_reader(rows))


def _fields(column: pa.StructArray) -> tuple[NDArray[Any], ...]:
    return tuple(column.field(at).flatten().to_numpy() for at in range(column.type.num_fields))


def measure(capture: str, student: str, turns: int) -> Figures:
    """Every way, the same totals asserted."""
    files = paths(capture)
    tokens = sum(part.tokens for part in read_manifest(capture, CaptureManifest).parts)
    to = maps(capture, student, real_rows(capture, 1))["routes of P-KL"]
    projector = Projector(capture, to)
    ways = {PYARROW: by_pyarrow, FED: by_duckdb, UDF: by_function}
    found, results = in_turn(
        {name: partial(way, files, projector, ROW_GROUP) for name, way in ways.items()}, tokens, turns
    )
    entries, mass = results[PYARROW]
    for name, (others, weight) in results.items():
        assert others == entries, f"{name} gives other entries"
        assert abs(weight / mass - 1) < 1e-9, f"{name} gives other probabilities"
    return {"tokens": tokens, "microseconds": found}


def report(found: Figures) -> list[str]:
    """Markdown."""
    lines = [f"## Batches or a function: projection of {found['tokens']:,} tokens, read and decoded", ""]
    return [*lines, "Microseconds per teacher token, one thread.", "", *lines_of(found["microseconds"], PYARROW)]
