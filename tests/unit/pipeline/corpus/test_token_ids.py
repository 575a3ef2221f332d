"""Token ids in tables and saved datasets: every type of list gives the rows of the same records as JSON lines."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.corpus import Corpus
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError

ROWS: list[dict[str, Any]] = [
    {"input_ids": [1, 40, 2, 0], "labels": [-100, 40, 2, -100], "attention_mask": [1, 1, 1, 0]},
    {"input_ids": [1, 7, 8, 2], "labels": [-100, -100, 8, 2], "attention_mask": [1, 1, 1, 1]},
]
KINDS: dict[str, pa.DataType] = {
    "int32": pa.list_(pa.int32()),
    "int64": pa.list_(pa.int64()),
    "int16, large": pa.large_list(pa.int16()),
    "fixed": pa.list_(pa.int32(), 4),
    "floats": pa.list_(pa.float32()),
    "texts": pa.string(),
}


def texts(path: Path) -> list[str]:
    return [one.text for one in Corpus(CorpusConfig(corpus=str(path), form="auto")).documents()]


def table(kind: pa.DataType, rows: list[dict[str, Any]] = ROWS) -> pa.Table:
    if pa.types.is_string(kind):
        rows = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    return pa.table({name: pa.array([row[name] for row in rows]).cast(kind) for name in rows[0]})


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_list_is_read(tmp_path: Path, kind: str, suffix: str) -> None:
    found, path = table(KINDS[kind]), tmp_path / f"ids.{suffix}"
    if suffix == "parquet":
        pq.write_table(found, path)
    else:
        with pa.ipc.new_stream(path, found.schema) as stream:
            stream.write_table(found)
    assert texts(path) == texts(lines(tmp_path / "ids.jsonl", ROWS))


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """As ``save_to_disk`` leaves it; of several splits train is read."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "splits"))
    expected = texts(lines(tmp_path / "ids.jsonl", ROWS))
    assert texts(tmp_path / "one") == texts(tmp_path / "splits") == expected


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[1, None, 2, 0], None], pa.list_(pa.int32())), "input_ids holds None"),
        (pa.array([[[1, 40, 2, 0]], [[1]]]), "numbers of one sample, no batch"),
        (pa.array([["a"], ["b"]]), "input_ids holds 'a'"),
        (pa.array([1, 2]), "input_ids holds 1, but it must be a list"),
        (pa.array([[1, 40, 2], [1]]), "labels has 4 entries, input_ids 3"),
    ],
)
def test_columns_of_other_things_are_named(tmp_path: Path, column: Any, said: str) -> None:
    pq.write_table(table(KINDS["int32"]).set_column(0, "input_ids", column), tmp_path / "ids.parquet")
    with pytest.raises(XtokenError, match=rf"ids.parquet.*{said}"):
        texts(tmp_path / "ids.parquet")
