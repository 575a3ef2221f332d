"""A loss with columns of its own is a schema entry and a file: checks, verify, query and page take it from there."""

import ast
import math
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from in_process import InThisProcess

import xtoken
from xtoken.pipeline.align import losses as losses_package
from xtoken.pipeline.align.checks import rules_of, rules_sql
from xtoken.pipeline.align.losses import builder
from xtoken.pipeline.align.run import align
from xtoken.pipeline.page.data import UNIT, sample_data
from xtoken.pipeline.page.sample import load_sample
from xtoken.pipeline.query import query
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig, QueryConfig
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.ui.progress import Silent

ROOT = Path(xtoken.__file__).parent
TOYS = Path(__file__).parents[3] / "toys"


def ask(root: str, sql: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = query(QueryConfig(path=root, sql=sql))["rows"]
    return rows


@pytest.fixture(scope="module")
def best() -> Iterator[None]:
    """The toy's file in the folder of losses, and its entry in the schema."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses_package, "__path__", [*losses_package.__path__, str(TOYS)])
        spec = spec_from_file_location("toy_best", TOYS / "best.py")
        assert spec is not None
        assert spec.loader is not None
        toy = module_from_spec(spec)
        spec.loader.exec_module(toy)
        patch.setitem(LOSSES, "best", toy.SCHEMA)
        yield


@pytest.fixture(scope="module")
def targets(best: None, kept_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Targets for the toy beside a loss of ours; read only."""
    out = str(tmp_path_factory.mktemp("toy") / "targets")
    config = AlignConfig(captures=[str(kept_capture)], student="bytes", out=out, losses=["best", "p-kl"])
    assert config.losses == ["p-kl", "best"]
    align(config, Silent(), executor=InThisProcess())
    return out


def stored(root: str) -> list[dict[str, Any]]:
    return [row for batch in iter_targets(str(root)) for row in batch.to_pylist()]


def test_its_targets_are_whole_and_counted(targets: str) -> None:
    assert verify(targets)["samples"] == len(stored(targets)) > 3
    made = sum(sum(row["best_count"]) for row in stored(targets))
    assert inspect(targets)["counts"]["best_chunks"] == made > 20


def test_its_rules_are_checked(best: None) -> None:
    assert rules_of("best") == {
        "best_count is negative": "best_count_low < 0",
        "best_ids has an id outside the student's vocabulary": "best_ids_low < 0 OR best_ids_high >= $student",
        "best_pairs_logprob is not a log-probability": "best_pairs_logprob_high > 2e-3",
        "best_logprob sums to more than 1": "best_mass_high > 1 + 1e-5",
        "best_count is above 1": "best_count_high > 1",
    }
    assert rules_sql("best").count("CASE WHEN") == 5
    assert builder("best").not_linear == "takes the best"


def test_query_shows_its_entries_values_and_mass(targets: str) -> None:
    rows = stored(targets)
    entries = ask(targets, "FROM best_entries LIMIT 10000")
    expected = [
        (row["sample_id"], chunk, row["best_ids"][at], row["best_logprob"][at])
        for row in rows
        for at, chunk in enumerate(place for place, n in enumerate(row["best_count"]) for _ in range(n))
    ]
    assert [(e["sample_id"], e["chunk"], e["student_id"], e["logprob"]) for e in entries] == expected
    assert {"rank", "bytes", "token", "probability"} <= set(entries[0])
    values = ask(targets, "SELECT pairs_logprob FROM best_chunk_values LIMIT 10000")
    masses = [mass for row in rows for mass in row["best_pairs_logprob"]]
    # a chunk without pairs has none: minus infinity, shown as null
    assert [one["pairs_logprob"] for one in values] == [mass if math.isfinite(mass) else None for mass in masses]
    views = {view["view"] for view in query(QueryConfig(path=targets))["views"]}
    assert {"best_entries", "best_chunk_values", "never_reached", "pkl_entries"} <= views


def test_a_page_draws_it(targets: str, kept_capture: Path) -> None:
    sample = load_sample(InspectConfig(path=targets, html="a.txt:0#0", capture=str(kept_capture)))
    assert sample.targets is not None
    data, row = sample_data(sample), sample.targets.row
    assert data["layout"]["best"] == {
        "axis": "chunk",
        "parts": [["tokens", "s"], ["value", "all pairs"]],
        "moved": False,
    }
    spans = list(pairwise(accumulate(row["best_count"], initial=0)))
    for (places, gaps, value), (start, end), mass in zip(
        data["targets"]["best"], spans, row["best_pairs_logprob"], strict=True
    ):
        assert [data["student"][place][0] for place in places] == row["best_ids"][start:end]
        assert [-gap * UNIT for gap in gaps] == pytest.approx(row["best_logprob"][start:end], abs=UNIT)
        assert (-math.inf if value is None else -value * UNIT) == pytest.approx(mass, abs=UNIT)


def test_columns_of_a_loss_are_named_where_it_is_made_only() -> None:
    """The list of files that a loss needs stays that of docs/extend.md: its columns are not named anywhere else."""
    owner = {column.name: loss.module for loss in LOSSES.values() for column in loss.columns}
    shared = {"factor_logprob"}
    elsewhere = []
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")]:
        if path == ROOT / "schemas" / "losses.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in owner and node.value not in shared:
                home = ROOT / "pipeline" / "align" / "losses" / f"{owner[str(node.value)]}.py"
                elsewhere += [] if path == home else [f"{path.relative_to(ROOT)}: {node.value}"]
    assert elsewhere == []


def test_every_loss_with_columns_has_its_file() -> None:
    assert all(builder(name).name == name for name in LOSSES)
    files = {path.stem for path in (ROOT / "pipeline" / "align" / "losses").glob("*.py")} - {"__init__", "base"}
    assert files == {loss.module for name, loss in LOSSES.items() if loss.columns and name != "best"}


def test_rules_of_p_kl_are_these() -> None:
    assert rules_sql("p-kl") == (
        "SELECT sample_id, unnest([\n"
        "    CASE WHEN pkl_count_low < 0 THEN 'pkl_count is negative' END,\n"
        "    CASE WHEN pkl_ids_low < 0 OR pkl_ids_high >= $teacher "
        "THEN 'pkl_ids has an id outside the teacher''s vocabulary' END,\n"
        "    CASE WHEN pkl_rest_logprob_high > 1e-5 THEN 'pkl_rest_logprob is not a log-probability' END,\n"
        "    CASE WHEN NOT $rest_unknown AND pkl_rest_logprob_unknown > 0 "
        "THEN 'pkl_rest_logprob is NaN where the tail mass is known' END,\n"
        "    CASE WHEN pkl_mass_high > 1 + 1e-5 OR (NOT $drawn AND pkl_mass_low < 1 - 1e-5) "
        "THEN 'pkl_logprob and the tail mass do not sum to 1' END\n"
        "]) AS rule FROM built"
    )
    assert rules_sql("ce") == ""
    assert pa.types.is_list(LOSSES["p-kl"].column("pkl_ids").type)
