"""Copies of a capture of conversations with one column damaged, sealed again as an attacker would."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.mutations import seal, write

from xtoken.pipeline.store.seal import SUMS_FILE
from xtoken.pipeline.store.seal import seal as seal_artifact

Change = Callable[[list[Any]], list[Any]]
# What becomes of the list of a sample; ends first.
ENDS: list[Change] = [
    lambda row: row[:-1],
    lambda row: row[:0],
    lambda row: row[::-1],
    lambda row: [*row[:-1], row[-1] + 1],
    lambda row: [2**31 - 1, *row[1:]],
    lambda row: [-1, *row[1:]],
]
FLAGS: list[Change] = [lambda row: row[:-1], lambda row: row[:0], lambda row: row * 40]
KINDS: list[Change] = [*FLAGS, lambda row: ["nobody", *row[1:]], lambda row: ["user"] * len(row)]
NUMBERS: list[Change] = [*FLAGS, lambda row: [-7] * len(row), lambda row: [10**6] * len(row)]
CHANGES = {
    "span_kind": KINDS,
    "span_byte_end": ENDS,
    "span_token_end": ENDS,
    "span_message": NUMBERS,
    "span_part": [*FLAGS, lambda row: [-7] * len(row)],
    "span_learn": [*FLAGS, lambda row: [True] * len(row), lambda row: [False] * len(row)],
}


def damaged(capture: Path, column: str, folder: Path) -> Iterator[Path]:
    """A copy for each change of a column's first row, in the first part."""
    for at, change in enumerate(CHANGES[column]):
        root = Path(shutil.copytree(capture, folder / f"{column}-{at}"))
        path = next(iter(sorted((root / "data").glob("*.parquet"))))
        table = pq.read_table(path)
        rows = table.to_pylist()
        rows[0][column] = change(rows[0][column])
        write(path, pa.Table.from_pylist(rows, table.schema))
        seal(root, lambda _root, _manifest: None)
        (root / SUMS_FILE).unlink(missing_ok=True)
        seal_artifact(str(root))
        assert json.loads((root / "manifest.json").read_text())["schema_version"] == 6
        yield root
