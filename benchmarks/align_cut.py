"""Cutting chunks, Parquet read and all: plain Python, SQL, and the compiled loop fed by batches or called by DuckDB.

The input is a Parquet file of both sides' byte ends of a real align, as list columns in the product's layout, eos left
out; every way gives the same boundaries, in order.

Shapes: N samples, C boundaries of all samples together.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.align_turns import Figures, best, in_turn, lines_of
from xtoken.pipeline.align.kernels import boundaries_batch
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture, iter_parquet, records
from xtoken.pipeline.store.writer import write_parquet
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest

Cuts = tuple[NDArray[Any], NDArray[Any]]
_LIST = pa.list_(pa.field("element", pa.int32(), nullable=False))
SCHEMA = pa.schema([pa.field(f"{side}_end", _LIST, nullable=False) for side in ("student", "teacher")])
BATCH = 2048  # rows of a batch where a reader may choose, DuckDB's own vector
PYTHON, CHECKED, PLAIN = "plain Python", "kernel, pyarrow, pages checked", "kernel, pyarrow"
FED, UDF, SQL = "kernel, DuckDB to Arrow batches", "kernel, Arrow function in DuckDB", "SQL"

_ENDS = """
WITH ends AS (SELECT file_row_number AS doc, * FROM read_parquet($path, file_row_number = true)),
student AS (SELECT doc, unnest(student_end) AS end_byte, generate_subscripts(student_end, 1) AS pos FROM ends),
teacher AS (SELECT doc, unnest(teacher_end) AS end_byte, generate_subscripts(teacher_end, 1) AS pos FROM ends)
"""
# One number for (doc, end_byte) makes a cheaper key.
_KEYS = """
WITH ends AS (SELECT file_row_number AS doc, * FROM read_parquet($path, file_row_number = true)),
student AS (
    SELECT doc * 4294967296 + unnest(student_end) AS key, generate_subscripts(student_end, 1) AS pos FROM ends
),
teacher AS (
    SELECT doc * 4294967296 + unnest(teacher_end) AS key, generate_subscripts(teacher_end, 1) AS pos FROM ends
)
"""
# The same boundaries in different words; the fastest counts.
QUERIES = {
    "both sides grouped, then joined": _ENDS
    + """, s AS (SELECT doc, end_byte, max(pos) AS s_end FROM student WHERE end_byte > 0 GROUP BY ALL),
    t AS (SELECT doc, end_byte, max(pos) AS t_end FROM teacher WHERE end_byte > 0 GROUP BY ALL)
    SELECT s_end, t_end FROM s JOIN t USING (doc, end_byte) ORDER BY doc, s_end""",
    "joined, then grouped": _ENDS
    + """SELECT max(s.pos) AS s_end, max(t.pos) AS t_end FROM student AS s JOIN teacher AS t USING (doc, end_byte)
    WHERE end_byte > 0 GROUP BY doc, end_byte ORDER BY doc, s_end""",
    "joined by one number, then grouped": _KEYS
    + """SELECT max(s.pos) AS s_end, max(t.pos) AS t_end FROM student AS s JOIN teacher AS t USING (key)
    WHERE key % 4294967296 > 0 GROUP BY key ORDER BY key""",
    "union, grouped once": _KEYS
    + """SELECT max(s) AS s_end, max(t) AS t_end FROM (
        SELECT key, pos AS s, NULL AS t FROM student UNION ALL SELECT key, NULL, pos FROM teacher
    ) WHERE key % 4294967296 > 0 GROUP BY key HAVING max(s) IS NOT NULL AND max(t) IS NOT NULL ORDER BY key""",
    "list functions": """
    SELECT
        unnest(list_filter(range(1, len(student_end) + 1), lambda i: student_end[i] > 0
            AND student_end[i + 1] IS DISTINCT FROM student_end[i]
            AND list_contains(teacher_end, student_end[i]))) AS s_end,
        unnest(list_filter(range(1, len(teacher_end) + 1), lambda i: teacher_end[i] > 0
            AND teacher_end[i + 1] IS DISTINCT FROM teacher_end[i]
            AND list_contains(student_end, teacher_end[i]))) AS t_end
    FROM read_parquet($path)""",
}


def ends_file(capture: str, targets: str, url: str, tokens: int) -> int:
    """Write both sides' ends of all samples, over and over until there are so many teacher tokens; how many there are.

    Args:
        targets: of an align of ``capture``.
    """
    eos = (
        read_manifest(targets, TargetManifest).student.eos_id,
        read_manifest(capture, CaptureManifest).tokenizer.eos_id,
    )
    rows = [pair for part in sorted(records(capture)) for pair in _ends(capture, targets, eos, part)]
    size = sum(len(theirs) for _, theirs in rows)
    copies = max(1, round(tokens / size))
    table = pa.table([pa.array(side, _LIST) for side in zip(*rows, strict=True)], schema=SCHEMA)
    write_parquet(url, SCHEMA, pa.concat_tables([table] * copies).to_batches())
    return size * copies


def _ends(capture: str, targets: str, eos: tuple[int | None, int | None], part: int) -> list[tuple[Any, Any]]:
    """One part's ends, student's and teacher's, of the samples that have targets."""
    names = (["sample_id", "student_ids", "student_end"], ["sample_id", "teacher_ids", "teacher_end"])
    mine = pa.Table.from_batches(iter_parquet(Folder(targets).url(data_name(part)), names[0]))
    theirs = pa.Table.from_batches(iter_capture(capture, names[1], [part]))
    sides = []
    for table, (sample_id, ids, end), close in zip((mine, theirs), names, eos, strict=True):
        rows = zip(*(table[name].to_pylist() for name in (sample_id, ids, end)), strict=True)
        sides.append({name: ends[:-1] if tokens[-1:] == [close] else ends for name, tokens, ends in rows})
    return [(ends, sides[1][name]) for name, ends in sides[0].items()]


def by_python(url: str) -> Cuts:
    """Two pointers over lists, as published code walks."""
    s_end: list[int] = []
    t_end: list[int] = []
    for row in pq.read_table(url).to_pylist():
        walk(row["student_end"], row["teacher_end"], s_end, t_end)
    return np.array(s_end), np.array(t_end)


def walk(student: list[int], teacher: list[int], s_end: list[int], t_end: list[int]) -> None:
    """Append the boundaries of one sample; of equal ends the last token counts, an end of 0 is none."""
    s = t = 0
    while s < len(student) and t < len(teacher):
        a, b = student[s], teacher[t]
        if a < b or (s + 1 < len(student) and student[s + 1] == a):
            s += 1
        elif b < a or (t + 1 < len(teacher) and teacher[t + 1] == b):
            t += 1
        else:
            s, t = s + 1, t + 1
            if a > 0:
                s_end.append(s)
                t_end.append(t)


def by_sql(url: str, query: str, threads: int) -> Cuts:
    """The whole result as Arrow."""
    with duckdb.connect(config={"threads": threads, "temp_directory": ""}) as connection:
        found: Any = connection.sql(query, params={"path": url}).to_arrow_table()
        return found["s_end"].to_numpy(), found["t_end"].to_numpy()


def kernel(batch: pa.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Boundaries of a batch: offsets [N + 1], and both sides' [C]."""
    lists = [(flat(batch, name), offsets_of(list_lengths(batch, name))) for name in SCHEMA.names]
    none = np.zeros(batch.num_rows, np.bool_)
    offsets, s_end, t_end, *_ = boundaries_batch(*lists[0], *lists[1], none, none)
    return offsets, s_end, t_end


def offsets_of(lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each list starts, and where the last ends, [N + 1]."""
    offsets = np.zeros(len(lengths_N) + 1, np.int64)
    np.cumsum(lengths_N, out=offsets[1:])
    return offsets


def over(batches: Iterator[pa.RecordBatch]) -> Cuts:
    """The kernel over batches, its results put together."""
    found = [kernel(batch) for batch in batches]
    return np.concatenate([one[1] for one in found]), np.concatenate([one[2] for one in found])


def by_batches(url: str) -> Cuts:
    """DuckDB reads, the kernel gets its batches."""
    with duckdb.connect(config={"threads": 1, "temp_directory": ""}) as connection:
        found: Any = connection.sql("SELECT student_end, teacher_end FROM read_parquet($path)", params={"path": url})
        return over(found.to_arrow_reader(BATCH))


def function(student: Any, teacher: Any) -> pa.Array:
    """The kernel as DuckDB calls it: two list columns in, a struct of two list columns out."""
    sides = [side.combine_chunks() if isinstance(side, pa.ChunkedArray) else side for side in (student, teacher)]
    offsets, s_end, t_end = kernel(pa.RecordBatch.from_arrays(sides, names=SCHEMA.names))
    at = pa.array(offsets.astype(np.int32))
    return pa.StructArray.from_arrays([pa.ListArray.from_arrays(at, pa.array(v)) for v in (s_end, t_end)], ["s", "t"])


def by_function(url: str) -> Cuts:
    """DuckDB reads and calls the kernel."""
    query = "SELECT cut(student_end, teacher_end) AS cut FROM read_parquet($path)"
    lists = "INTEGER[]"
    with duckdb.connect(config={"threads": 1, "temp_directory": ""}) as connection:
        connection.create_function("cut", function, [lists, lists], f"STRUCT(s {lists}, t {lists})", type="arrow")
        found: Any = connection.sql(query, params={"path": url}).to_arrow_reader(BATCH)
        sides = [[batch["cut"].field(at).flatten().to_numpy() for at in (0, 1)] for batch in found]
    return np.concatenate([one[0] for one in sides]), np.concatenate([one[1] for one in sides])


def measure(url: str, tokens: int, turns: int) -> Figures:
    """Every way; the same boundaries asserted for all."""
    works = {
        PYTHON: partial(by_python, url),
        CHECKED: lambda: over(iter_parquet(url, rows=BATCH)),
        PLAIN: lambda: over(pq.ParquetFile(url).iter_batches(BATCH, use_threads=False)),
        FED: partial(by_batches, url),
        UDF: partial(by_function, url),
    }
    for name, query in QUERIES.items():
        works |= {f"{SQL}: {name}, threads {n}": partial(by_sql, url, query, n) for n in (1, 2)}
    found, results = in_turn(works, tokens, turns)
    wanted = results[PYTHON]
    for name, cuts in results.items():
        assert all(np.array_equal(a, b) for a, b in zip(cuts, wanted, strict=True)), f"{name} cuts elsewhere"
    return {"tokens": tokens, "boundaries": len(wanted[0]), "microseconds": found, **ratios(found)}


def ratios(found: Figures) -> Figures:
    """How many times faster the kernel is, by CPU time and by wall clock."""
    sql = {by: best(found, SQL, by) for by in ("cpu", "wall")}
    ways = (CHECKED, PLAIN, FED, UDF)
    of = {
        name: {by: [found[other][by] / found[name][by] for other in (PYTHON, sql[by])] for by in sql} for name in ways
    }
    return {"best_sql": sql, "times": of}


def report(found: Figures) -> list[str]:
    """Markdown."""
    lines = [
        f"## Cut: {found['tokens']:,} teacher tokens, {found['boundaries']:,} boundaries, Parquet read included",
        "",
    ]
    lines += ["Microseconds per teacher token. Wanted: 10 times plain Python, 3 times the best SQL.", ""]
    lines += lines_of(found["microseconds"], CHECKED)
    lines += ["| kernel | of plain Python: CPU, wall | of the best SQL: CPU, wall |", "|---|---|---|"]
    for name, one in found["times"].items():
        cells = [f"{one['cpu'][at]:.1f}, {one['wall'][at]:.1f}" for at in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]
