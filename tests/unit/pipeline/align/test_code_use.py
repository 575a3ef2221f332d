"""Which tokens have small codes: counted again by plain loops."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from in_process import InThisProcess

from xtoken.pipeline.align import code_use
from xtoken.pipeline.align.code_use import token_codes
from xtoken.pipeline.align.run import align
from xtoken.pipeline.project import build_w
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.store.reader import ids_of_codes, iter_capture, load_vocab
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"


def opened(name: str) -> tuple[str, CaptureManifest, Projection]:
    root = str(GOLDEN / name)
    return root, read_manifest(root, CaptureManifest), build_w(load_tokenizer("bytes").table, load_vocab(root))


@pytest.mark.parametrize(
    ("name", "column"), [("v1-topk", "topk_ids"), ("v4-topk", "topk_ids"), ("v3-sampled", "draw_ids")]
)
def test_tokens_of_many_entries_come_first(name: str, column: str) -> None:
    root, manifest, w = opened(name)
    codes = token_codes(root, manifest, w, "prefix")
    route_U = w.routes("prefix")
    rows = (row for batch in iter_capture(root) for row in batch.to_pylist())
    use = Counter(int(route_U[token]) for row in rows for token in row[column])
    counted = [use[token] for token in codes.teacher.tolist()]
    assert counted == sorted(counted, reverse=True)
    assert counted[0] > counted[-1] == 0
    id_of_code = ids_of_codes(root)
    order = range(len(counted)) if id_of_code is None else id_of_code.tolist()
    none = [token for token in order if not use[token]]
    assert codes.teacher[-len(none) :].tolist() == none, "the others in the order of the text's use"
    assert sorted(codes.student.tolist()) == list(range(w.student.size))
    # a byte that is a token of the teacher counts as often as this one does
    twins = dict(zip(w.student_id[w.weight == 1].tolist(), w.teacher_id[w.weight == 1].tolist(), strict=True))
    of_students = [use[twins[token]] for token in codes.student.tolist() if token in twins and use[twins[token]]]
    assert of_students == sorted(of_students, reverse=True)


def test_a_few_row_groups_are_enough_and_a_damaged_part_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    shutil.copytree(GOLDEN / "v4-topk", tmp_path / "c")
    root, manifest, w = str(tmp_path / "c"), *opened("v4-topk")[1:]
    whole = token_codes(root, manifest, w, "prefix")
    monkeypatch.setattr(code_use, "_PARTS", 1)
    one = token_codes(root, manifest, w, "prefix")
    assert not np.array_equal(one.teacher, whole.teacher)
    first = tmp_path / "c" / "data" / "part-00000.parquet"
    first.write_bytes(first.read_bytes()[:100])
    none = token_codes(root, manifest, w, "prefix")
    id_of_code = ids_of_codes(root)
    assert id_of_code is not None
    assert none.teacher.tolist() == id_of_code.tolist()


@pytest.mark.parametrize(("items", "most", "chosen"), [([], 3, []), ([5], 3, [5]), (list(range(10)), 4, [0, 3, 6, 9])])
def test_what_is_looked_at_is_spread_evenly(items: list[int], most: int, chosen: list[int]) -> None:
    assert code_use._spread(items, most) == chosen


def test_a_run_goes_on_in_the_codes_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be counted now; and without them nobody could say what its parts hold."""
    config = AlignConfig(captures=[str(GOLDEN / "v4-topk")], student="bytes", out=str(tmp_path / "t"), losses=["p-kl"])
    align(config, Silent(), executor=InThisProcess())
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").rglob("*.parquet")}
    (tmp_path / "t" / "manifest.json").unlink()
    for name in ("data/part-00001.parquet", "commits/part-00001.json"):
        (tmp_path / "t" / name).unlink()
    monkeypatch.setattr("xtoken.pipeline.align.form.token_codes", None)
    align(config, Silent(), executor=InThisProcess())
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").rglob("*.parquet")} == before
    for name in ("manifest.json", "codes.parquet"):
        (tmp_path / "t" / name).unlink()
    with pytest.raises(VerificationError, match=r"holds parts without codes\.parquet.*remove that folder"):
        align(config, Silent(), executor=InThisProcess())
