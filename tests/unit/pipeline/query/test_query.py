"""What a query may do, what it says when it fails, and where its rows go."""

import csv
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.query import query
from xtoken.pipeline.query.output import MOST
from xtoken.pipeline.query.run import _interruptible
from xtoken.schemas.configs.artifacts import QueryConfig
from xtoken.schemas.errors import VerificationError, XtokenError

from .conftest import ask

RUNNER = CliRunner()


@pytest.fixture
def copy(capture: Path, tmp_path: Path) -> Path:
    """A copy of the capture that a test may damage."""
    return Path(shutil.copytree(capture, tmp_path / "copy"))


@pytest.fixture
def remote(capture: Path) -> Iterator[str]:
    """The capture on a server of this process."""
    fs = fsspec.filesystem("memory")
    for path in capture.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/query/{path.relative_to(capture)}", path.read_bytes())
    yield "memory://query"
    fs.rm("/query", recursive=True)


def changed(root: Path, column: str, value: int) -> None:
    """Write the first element of a list column of the first part anew."""
    path = root / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0][0] = value
    at = table.schema.get_field_index(column)
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, field.type)), path)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("COPY (SELECT 1) TO '{tmp}/x.csv'", "a query reads, and this is COPY"),
        ("CREATE TABLE x AS SELECT 1", "a query reads, and this is CREATE"),
        ("ATTACH '{tmp}/x.db'", "a query reads, and this is ATTACH"),
        ("INSTALL httpfs", "a query reads"),
        ("LOAD httpfs", "a query reads"),
        ("SET memory_limit = '100GB'", "a query reads"),
        ("EXPORT DATABASE '{tmp}/x'", "a query reads"),
        ("SELECT 1; SELECT 2", "2 statements; ask one at a time"),
        ("SELEC 1", "syntax error.*the views are entries, mass, parts, samples, spans, tokens, vocab"),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT nothing FROM samples", "nothing"),
        ("FROM 's3://bucket/x.parquet'", "the query does not run"),
        ("FROM monkeypatch", "monkeypatch does not exist"),
    ],
)
def test_what_a_query_may_not_do(capture: Path, tmp_path: Path, sql: str, said: str) -> None:
    with pytest.raises(XtokenError, match=re.compile(said, re.DOTALL)):
        ask(capture, sql.replace("{tmp}", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_query_may_join_files_of_its_author(capture: Path, tmp_path: Path) -> None:
    rows = [{"document": "book/en/one", "year": 1851}, {"document": "book/ja/one", "year": 1905}]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ask(
        capture,
        f"SELECT DISTINCT year, source FROM samples JOIN '{tmp_path}/meta.jsonl' USING (document) ORDER BY year",
    )
    assert found == [{"year": 1851, "source": "book/en"}, {"year": 1905, "source": "book/ja"}]


def test_pivots_and_ctes_are_queries(capture: Path) -> None:
    assert ask(capture, "WITH s AS (FROM samples) SELECT count(*) > 1 AS many FROM s;") == [{"many": True}]
    assert len(ask(capture, "PIVOT (SELECT script, source FROM samples) ON script USING count(*)")) == 6


def test_memory_is_limited_and_nothing_spills(capture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hungry = "SELECT b.text, row_number() OVER (ORDER BY a.probability, b.text) AS n FROM entries AS a, samples AS b"
    with pytest.raises(XtokenError, match="does not fit --memory-limit 30MB"):
        ask(capture, hungry, memory_limit="30MB")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValidationError, match="'much' is not a size"):
        ask(capture, "SELECT 1", memory_limit="much")


def _to_whoever_hears() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _to_another_thread() -> None:
    """As the system may choose: it then wakes nothing that waits for a lock."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("send", [_to_whoever_hears, _to_another_thread])
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.3])
def test_ctrl_c_stops_a_query(seconds: float, send: Callable[[], None]) -> None:
    """Whether it runs already or is only being planned; the connection is free afterwards."""
    endless = "SELECT count(*) FROM range(10000000) AS a, range(10000000) AS b WHERE a.range + b.range = 3.5"
    with duckdb.connect() as connection:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the clock starts with the query
            threading.Timer(seconds, send).start()
            _interruptible(connection, lambda: {"rows": connection.sql(endless).fetchall()})
        assert connection.sql("SELECT 1").fetchall() == [(1,)]


def test_a_thread_that_comes_too_late_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a busy machine has not begun with it."""
    begin: list[Callable[[], None]] = []
    done: list[str] = []

    class Late(threading.Thread):
        def start(self) -> None:
            begin.extend([super().start, self.join])
            raise KeyboardInterrupt

    monkeypatch.setattr("xtoken.pipeline.query.run.Thread", Late)
    with duckdb.connect() as connection, pytest.raises(KeyboardInterrupt):
        _interruptible(connection, lambda: {"rows": done.append("asked")})
    for step in begin:
        step()
    assert done == []


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("kept", 200, "do not sum to its entries"),
        ("topk_codes", 1 << 30, "an id is outside 0 to"),
        ("topk_codes", -1, "an id is outside 0 to"),
    ],
)
def test_rows_that_do_not_fit_are_refused(copy: Path, column: str, value: int, said: str) -> None:
    changed(copy, column, value)
    with pytest.raises(VerificationError, match=f"{said}.*xtoken verify"):
        ask(copy, "FROM entries")


def test_files_are_checked_before_they_are_read(copy: Path) -> None:
    path = copy / "data" / "part-00000.parquet"
    whole = path.read_bytes()
    # ten million zeros in a few bytes, under the name of a part
    pq.write_table(pa.table({"sample_id": np.zeros(10_000_000, np.int8)}), path)
    with pytest.raises(VerificationError, match=r"part-00000.parquet has 1048576|columns are"):
        ask(copy, "SELECT count(*) FROM samples")
    path.write_bytes(whole[:-1000])
    with pytest.raises(VerificationError, match="made to harm"):
        ask(copy, "FROM samples")
    path.unlink()
    with pytest.raises(VerificationError, match="No such file"):
        ask(copy, "FROM samples")
    assert ask(copy, "SELECT count(*) > 0 AS some FROM vocab") == [{"some": True}], "the vocabulary reads no part"


def test_only_parts_with_a_record_are_read(copy: Path) -> None:
    shutil.copy(copy / "data" / "part-00000.parquet", copy / "data" / "part-00099.parquet")
    expected = ask(copy, "SELECT sum(samples) AS n FROM parts")
    assert ask(copy, "SELECT count(*) AS n FROM samples") == expected
    (copy / "commits" / "part-00000.json").unlink()
    with pytest.raises(VerificationError, match="no commit record of part 0"):
        ask(copy, "FROM samples")


def test_another_vocabulary_is_refused(copy: Path) -> None:
    (copy / "vocab.parquet").write_bytes((copy / "merges.parquet").read_bytes())
    with pytest.raises(VerificationError, match=r"vocab.parquet has sha256"):
        ask(copy, "FROM tokens")


def test_a_remote_capture_is_read_through_the_cache(capture: Path, remote: str) -> None:
    asked = "SELECT sample_id, count(*) AS n FROM entries GROUP BY ALL ORDER BY ALL"
    assert ask(remote, asked) == ask(capture, asked)


def test_folders_that_do_not_go_together(capture: Path, targets: Path, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["run_hash"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(XtokenError, match="was aligned from another capture"):
        ask(targets, "FROM coverage_by_category", copy)
    with pytest.raises(XtokenError, match="leave it out"):
        ask(capture, "FROM samples", capture)
    with pytest.raises(XtokenError, match="does not exist"):
        ask(copy / "data", "FROM samples")


def test_rows_are_counted_beyond_those_held(capture: Path) -> None:
    found = query(QueryConfig(path=str(capture), sql=f"SELECT range AS n FROM range({MOST + 7})"))
    assert (found["total"], len(found["rows"])) == (MOST + 7, MOST)
    assert found["left_out"].startswith("7 rows")


def test_values_are_json(capture: Path) -> None:
    asked = "SELECT 'nan'::DOUBLE AS a, '\\xE6'::BLOB AS b, [1, 2] AS c, MAP {'x': 1} AS d, DATE '2024-01-02' AS e"
    row = ask(capture, f"{asked}, sum(range) AS f FROM range(4)")[0]
    assert row == {"a": None, "b": "\\xe6", "c": [1, 2], "d": {"x": 1}, "e": "2024-01-02", "f": 6}


def test_files_are_written_whole(capture: Path, tmp_path: Path) -> None:
    asked = "SELECT sample_id, tokens FROM samples ORDER BY ALL"
    rows = ask(capture, asked)
    for suffix in ("parquet", "csv", "json", "jsonl"):
        out = tmp_path / f"it's.{suffix}"
        out.write_text("what was there before")
        found = query(QueryConfig(path=str(capture), sql=asked, out=str(out)))
        assert found == {"total": len(rows), "file_bytes": out.stat().st_size, "out": str(out)}
    assert pq.read_table(tmp_path / "it's.parquet").to_pylist() == rows
    with (tmp_path / "it's.csv").open() as file:
        assert [{**row, "tokens": int(row["tokens"])} for row in csv.DictReader(file)] == rows
    assert json.loads((tmp_path / "it's.json").read_text()) == rows
    assert [json.loads(line) for line in (tmp_path / "it's.jsonl").read_text().splitlines()] == rows
    assert len(list(tmp_path.iterdir())) == 4, "no temporary file stays"


def test_a_query_that_fails_leaves_the_file_there_was(capture: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("before")
    with pytest.raises(XtokenError, match="Could not convert"):
        query(QueryConfig(path=str(capture), sql="SELECT text::INTEGER FROM samples", out=str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert out.read_text() == "before"


@pytest.mark.parametrize(
    ("out", "said"), [("x.xlsx", "choose from .parquet"), ("s3://b/x.csv", "local file"), ("/no/x.csv", "/no does not")]
)
def test_places_that_cannot_be_written(capture: Path, out: str, said: str) -> None:
    with pytest.raises(XtokenError, match=said):
        query(QueryConfig(path=str(capture), sql="SELECT 1", out=out))


def test_the_terminal_says_how_many_more(capture: Path) -> None:
    result = RUNNER.invoke(
        cli.app, ["query", str(capture), "SELECT pos, repeat('x', 900) AS long FROM tokens LIMIT 50"]
    )
    assert result.exit_code == 0
    assert "rows: 10 more" in result.stdout
    assert result.stdout.count("x") < 40 * 500


def test_the_command_line_lists_views_and_reads_standard_input(capture: Path) -> None:
    listed = json.loads(RUNNER.invoke(cli.app, ["query", str(capture), "--json"]).stdout)
    assert [view["view"] for view in listed["views"]] == [
        *("entries", "mass", "parts", "samples", "spans", "tokens", "vocab")
    ]
    found = RUNNER.invoke(cli.app, ["query", str(capture), "-", "--json"], input="SELECT 1 AS one\n")
    assert json.loads(found.stdout) == {"total": 1, "rows": [{"one": 1}]}
    failed = RUNNER.invoke(cli.app, ["query", str(capture), "FROM nowhere"])
    assert failed.exit_code == 2
    assert "nowhere does not exist" in failed.output
