"""Ids in targets of strangers index arrays, so they are looked at when a row group is read."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.data.targets import Targets

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"


@pytest.mark.parametrize("name", ["pkl_ids", "hkl_common_ids"])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_ids_outside_their_vocabulary_are_refused(tmp_path: Path, name: str, value: int) -> None:
    root = shutil.copytree(GOLDEN / "v3-targets", tmp_path / "targets")
    part = root / "data" / "part-00000.parquet"
    table = pq.read_table(part)
    rows = [[*values[:-1], value] if values else values for values in table[name].to_pylist()]
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(rows, table.schema.field(at).type)), part)
    targets = Targets(str(root))
    assert any(rows)
    group = next(group for group in targets.groups if group.part == 0)
    targets.read(group, ("student_ids",))
    with pytest.raises(VerificationError, match=f"has {name} outside 0 to"):
        targets.read(group, (name,))
