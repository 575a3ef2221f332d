"""Every view is documented as it is, on captures and targets of every version and codec."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.query import query
from xtoken.pipeline.query.views import Catalog, read_view, read_views
from xtoken.pipeline.share.push_pull import pull
from xtoken.schemas.configs.artifacts import QueryConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

from .conftest import ask

GOLDEN = Path(__file__).parents[3] / "golden" / "captures"
CAPTURES = ("v1-topk", "v1-tau", "v2-topk", "v2-sampled", "v3-topk", "v3-tau", "v3-sampled")
TARGETS = ("v2-targets", "v3-targets", "v3-targets-sampled")


def listing(path: Path, **options: Any) -> dict[str, Any]:
    return query(QueryConfig(path=str(path), **options))


def columns_of(path: Path, views: list[dict[str, Any]], capture: Path | None = None) -> dict[str, list[str]]:
    """Names of the columns that views have; a query that names them in a comment has them made."""
    named = " ".join(view["view"] for view in views)
    columns = "FROM duckdb_columns() WHERE schema_name = 'main' AND NOT internal ORDER BY column_index"
    found: dict[str, list[str]] = {view["view"]: [] for view in views}
    for row in ask(path, f"SELECT table_name, column_name {columns} -- {named}", capture):
        found[row["table_name"]].append(row["column_name"])
    return found


@pytest.mark.parametrize("name", [*CAPTURES, *TARGETS])
def test_views_have_the_columns_they_are_said_to_have(name: str) -> None:
    views = listing(GOLDEN / name)["views"]
    found = columns_of(GOLDEN / name, views)
    assert {view["view"]: view["columns"].split(", ") for view in views} == found
    # every column of every view is computed, of files of every version
    counts = (f"(SELECT count(*) FROM (SELECT DISTINCT * FROM {view}))" for view in found)
    assert all(count >= 0 for count in ask(GOLDEN / name, f"SELECT {', '.join(counts)}")[0].values())


def test_views_over_both(capture: Path, targets: Path) -> None:
    views = listing(targets, capture=str(capture))["views"]
    found = columns_of(targets, views, capture)
    assert {view["view"]: view["columns"].split(", ") for view in views} == found
    assert {"samples", "teacher_samples", "teacher_tokens", "teacher_mass", "chunk_tokens"} <= set(found)


def test_every_file_explains_itself() -> None:
    for view in read_views(("capture", "targets", "joined")):
        assert view.about.endswith("."), view.name
        assert bool(view.columns) == view.listed, view.name
        assert "\n-- " in f"\n{view.text}"


@pytest.mark.parametrize("name", CAPTURES)
def test_rows_of_old_captures_sum_to_one(name: str) -> None:
    rows = """
        SELECT max(abs(mass + coalesce(rest, 0) - 1)) AS off, count(*) AS n FROM (
            SELECT sample_id, pos, sum(probability) AS mass FROM entries GROUP BY ALL
        ) JOIN tokens USING (sample_id, pos)
    """
    found = ask(GOLDEN / name, rows)[0]
    assert found["off"] < 0.02
    assert found["n"] == ask(GOLDEN / name, "SELECT sum(rows) AS n FROM parts")[0]["n"]


def test_draws_are_shares_and_say_their_entropy() -> None:
    row = ask(GOLDEN / "v3-sampled", "SELECT min(entropy) AS least, count(rest) AS rest FROM tokens")[0]
    assert row["rest"] == 0
    assert row["least"] >= 0


def test_ids_of_version_1_are_not_codes() -> None:
    stored = pq.read_table(GOLDEN / "v1-topk" / "data").to_pylist()
    ids = [token for sample in stored for token in sample["topk_ids"]]
    assert [row["teacher_id"] for row in ask(GOLDEN / "v1-topk", "SELECT teacher_id FROM entries")] == ids


def test_subsets_say_what_they_lack(capture: Path, tmp_path: Path) -> None:
    pull(PullConfig(source=str(capture), destination=str(tmp_path / "bare"), columns=["none"]), Silent())
    found = listing(tmp_path / "bare")
    assert [view["not here"] for view in found["not_here"]] == ["entries", "mass"]
    assert "text was left out" in found["notes"][0]["note"]
    row = ask(tmp_path / "bare", "FROM samples LIMIT 1")[0]
    assert row["text"] is row["script"] is row["entries"] is None
    assert row["bits_per_byte"] > 0
    assert ask(tmp_path / "bare", "SELECT count(kept) AS kept, count(logprob) > 0 AS some FROM tokens") == [
        {"kept": 0, "some": True}
    ]
    with pytest.raises(XtokenError, match=r"entries is not here.*pull it again with --columns text,rows"):
        ask(tmp_path / "bare", "SELECT * FROM entries")


def test_the_bare_name_of_a_view_explains_its_columns(capture: Path) -> None:
    found = query(QueryConfig(path=str(capture), sql=" tokens ;"))
    assert found["view"] == "tokens"
    assert {"column": "surprise", "meaning": "the same in bits, positive"} in found["columns"]


def test_a_path_that_looks_like_a_pattern_is_a_path(capture: Path, tmp_path: Path) -> None:
    odd = tmp_path / "we[ir]d 'x' *?"
    shutil.copytree(capture, odd)
    shutil.copytree(capture, tmp_path / "wei 'x' abc")
    assert ask(odd, "SELECT count(*) AS n FROM samples") == ask(capture, "SELECT count(*) AS n FROM samples")


def test_a_file_is_read_to_the_first_line_of_sql() -> None:
    view = read_view(
        "targets", "x.sql", "-- One row\n-- per y.\n-- Needs: p-kl | h-kl, capture\n-- a: the a\nSELECT 1 -- b: c\n"
    )
    assert (view.name, view.about, view.columns) == ("targets.x", "One row per y.", (("a", "the a"),))
    assert view.lacks({"h-kl"}) == ["capture"]
    assert view.lacks({"capture"}) == ["p-kl | h-kl"]


def test_what_a_query_names_is_made_after_what_it_needs() -> None:
    catalog = Catalog.of(["capture"], {"rows": True, "topk": True}, {}, "")
    needed = catalog.closure(catalog.mentioned("select * from MASS"))
    assert needed[-1] == "capture.mass"
    assert needed.index("capture._stored") < needed.index("capture._rows") < needed.index("capture.mass")
    assert "capture.tokens" not in needed
