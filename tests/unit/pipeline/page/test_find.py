"""A sample is found by its id, whatever footers say."""

import math
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.page import find as module
from xtoken.pipeline.page.find import Place, all_ids, find, find_worst, read_sample
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.tables import LEAN_TARGETS
from xtoken.schemas.tables import targets as target_schema


def test_every_sample_is_found_where_it_lies(capture: str, targets: str) -> None:
    manifest = read_manifest(capture, CaptureManifest)
    assert len(manifest.parts) > 1
    for root, schema in ((capture, CaptureCheck.of(manifest).schema), (targets, None)):
        names = list(all_ids(root))
        assert len(names) == len(set(names)) > 5
        for name in names:
            place = find(root, name)
            schema = schema or target_schema(["p-kl", "h-kl", "gold", "uld", "alm", "byte-prefix", "ce"], LEAN_TARGETS)
            assert read_sample(root, place, schema)["sample_id"].to_pylist() == [name]


def test_only_row_groups_that_may_hold_it_are_read(capture: str, tmp_path: Path) -> None:
    names = sorted(all_ids(capture))
    pq.write_table(pq.read_table(Folder(capture).url(data_name(0))).slice(0, 1), tmp_path / "one.parquet")
    only = pq.read_table(tmp_path / "one.parquet")["sample_id"][0].as_py()
    for name in names:
        assert module._groups(name.encode(), str(tmp_path / "one.parquet")) == ([0] if name == only else [])


def test_an_unknown_id_names_those_near_it(capture: str) -> None:
    with pytest.raises(XtokenError, match=r"called 'plane\.txt:0#0'; near it: 'plain\.txt:0#0'") as caught:
        find(capture, "plane.txt:0#0")
    assert str(caught.value).count("#") <= 6
    with pytest.raises(XtokenError, match="'xtoken query' lists the ids"):
        find(capture, "¤" * 40)


def test_statistics_that_lie_hide_nothing(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(all_ids(capture))
    monkeypatch.setattr(module, "_groups", lambda *_: [])
    assert find(capture, name) == Place(0, 0, 0)


def test_worst_has_most_bits_per_byte(capture: str, targets: str) -> None:
    rows = (
        duckdb.connect()
        .sql(
            "SELECT sample_id, -list_sum(realised_logprob) / ln(2) / strlen(text) AS b "
            f"FROM '{capture}/data/*.parquet' WHERE len(realised_logprob) > 0 ORDER BY b DESC"
        )
        .fetchall()
    )
    manifest = read_manifest(capture, CaptureManifest)
    assert math.isfinite(rows[0][1])
    assert find_worst(capture, manifest) == find_worst(capture, manifest, targets) == rows[0][0]
