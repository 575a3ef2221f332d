"""Files that cannot be what the format says are refused by name, never read as something else."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distillkit_sets import QWEN3
from tests.unit.pipeline.imports.sets import SIZE, config_of, write_set
from xtoken.pipeline.chats import Refused
from xtoken.pipeline.chats.conversation import clean
from xtoken.pipeline.imports.api_trace_line import Line
from xtoken.pipeline.imports.api_trace_rows import prompt_rows
from xtoken.pipeline.imports.axolotl import parallel_lists
from xtoken.pipeline.imports.compression import read_compression
from xtoken.pipeline.imports.parquet_rows import BadRow, byte_rows, whole_numbers
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.store.codecs.topk import STEP, pack
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent


@pytest.mark.parametrize("value", [1.5, np.nan, np.inf])
def test_numbers_that_are_not_whole_are_no_ids_and_no_bytes(value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadRow, match="something else than whole numbers: it has"):
            whole_numbers(np.array([1.0, value]), "input_ids", "x")
        with pytest.raises(BadRow, match=r"whole numbers|no bytes"):
            byte_rows(np.array([[1.0, value]]), 2, "a", "x")
    assert whole_numbers(np.array([3.0, 1e300]), "a", "x").tolist() == [3, 1 << 53]


def test_a_column_that_stands_twice(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set") / "rows.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_arrays([*table.columns, table[0]], [*table.column_names, "input_ids"]), path)
    with pytest.raises(XtokenError, match="the column input_ids 2 times"):
        import_dataset(config_of(tmp_path / "set", tmp_path / "out"), Silent())


def test_null_within_a_list_is_named(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set") / "rows.parquet"
    table = pq.read_table(path)
    column = table["compressed_logprobs"].to_pylist()
    column[0][1] = None
    pq.write_table(
        table.set_column(1, "compressed_logprobs", pa.array(column, table["compressed_logprobs"].type)), path
    )
    with pytest.raises(XtokenError, match="lists of compressed_logprobs that are null: 1 of"):
        import_dataset(config_of(tmp_path / "set", tmp_path / "out"), Silent())


@pytest.mark.parametrize("text", ['!!bool "abc"', '!!timestamp "abc"'])
def test_a_tag_of_yaml_that_does_not_fit(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(XtokenError, match="cannot be read as YAML"):
        read_compression(str(tmp_path / "a.yaml"))


def test_settings_that_contradict_each_other_are_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps({"d": SIZE, **QWEN3, "polynomial_terms": [99]}))
    with pytest.raises(XtokenError, match=r"a\.yaml: the power 99 is not 0 to 64"):
        read_compression(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("logprobs", "ids"),
    [
        ([-0.5], [1]),
        ([["a"]], [[1]]),
        ([[-0.5]], [["x"]]),
        ([[-0.5]], [[float("nan")]]),
        ([[[-0.5]]], [[[1]]]),
        ([[None]], [[1]]),
    ],
)
def test_lists_of_something_else(logprobs: list[Any], ids: list[Any]) -> None:
    with pytest.raises(BadRow, match="no lists of numbers: row 0 has"):
        parallel_lists(logprobs, ids, "x")


def test_an_id_of_64_bits_is_no_token() -> None:
    assert parallel_lists([[-0.5, -1.0]], [[(1 << 64) - 1, 7]], "x").ids.tolist() == [-1, 7]


def test_numbers_that_no_float_and_no_rank_can_be() -> None:
    line = Line("a", 0)
    with pytest.raises(XtokenError, match="a log-probability is a finite number"):
        line.logprob(-(10**400), "x")
    with pytest.raises(XtokenError, match="a whole number from 0 to 2147483647"):
        prompt_rows([None, {"5": {"logprob": -1.0, "rank": 1 << 40}}], None, line, "x")
    assert line.whole(-1, "seed") == -1


def test_lists_that_lie_too_deep_in_each_other() -> None:
    value: Any = "a"
    for _ in range(500):
        value = [value]
    with pytest.raises(Refused, match="over 100 deep"):
        clean(value)


def test_a_file_that_changed_while_the_run_was_down(tmp_path: Path) -> None:
    config = config_of(write_set(tmp_path / "set"), tmp_path / "out", part_bytes=1 << 12)
    import_dataset(config, Silent())
    (tmp_path / "out" / "commits" / "part-00001.json").unlink()
    path = tmp_path / "set" / "rows.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(XtokenError, match=r"rows\.parquet changed since .* was begun; restore it"):
        import_dataset(config, Silent())


def test_rows_that_are_nearly_everything_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pack(np.array([1, 1]), np.array([3, 4], np.int32), np.array([-1e-18, -1.0]))
    assert found.rest_gap[0] == round(-np.log(1e-18) / STEP)
