"""Ids in targets of strangers, and targets without what their loss needs, are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import VerificationError, XtokenError
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


def test_strict_without_a_target_is_refused(make_targets: Callable[..., str]) -> None:
    """A teacher so sharp, or a capture so small, that no row keeps two tokens; older parts do not say."""
    targets = Targets(make_targets([[6], [7]], losses=("strict", "alm")))
    targets.require_options("strict", LossOptions())
    first, second = targets.manifest.parts
    none, some = ({"strict_chunks": count} for count in (0, 3))
    for counts, refused in (((none, none), True), ((none, some), False)):
        parts = [part.model_copy(update={"counts": one}) for part, one in zip((first, second), counts, strict=True)]
        targets.manifest = targets.manifest.model_copy(update={"parts": parts})
        targets.require_options("alm", LossOptions())
        if refused:
            with pytest.raises(XtokenError, match="has no target for strict: no chunk of one token on either side"):
                targets.require_options("strict", LossOptions())
        else:
            targets.require_options("strict", LossOptions())
