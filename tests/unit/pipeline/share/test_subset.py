"""True subsets: what they say about themselves holds, and readers see what was left out as left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import InThisProcess

from xtoken.pipeline.align.run import align
from xtoken.pipeline.project.mass import teacher_mass
from xtoken.pipeline.share.push_pull import pull, push
from xtoken.pipeline.share.subset import Where, chosen_parts, number_ranges
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.left_out import LeftOut
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.seal import seal
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.share import PullConfig, PushConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, Part, TargetManifest, content_hash, read_manifest
from xtoken.schemas.tables import CAPTURE
from xtoken.schemas.ui.progress import Silent

GOLDEN = Path(__file__).parents[3] / "golden" / "captures"


def pulled(source, destination, **options) -> CaptureManifest:
    pull(PullConfig(source=str(source), destination=str(destination), **options), Silent())
    verify(str(destination))
    return read_manifest(str(destination), CaptureManifest)


def table(root, columns=None) -> pa.Table:
    return pa.Table.from_batches(iter_capture(str(root), columns))


def part(index: int) -> Part:
    return Part(index=index, samples=1, tokens=1, rows=1, entries=1, text_bytes=1, file_bytes=1, sha256="0" * 64)


def test_ranges_of_parts():
    parts = [part(index) for index in (0, 1, 2, 5, 9)]
    assert [found.index for found in chosen_parts("1-2,9", parts)] == [1, 2, 9]
    assert [found.index for found in chosen_parts("2,2,0-1", parts)] == [0, 1, 2]
    assert [found.index for found in chosen_parts("2-5", parts, set_aside=[3, 4])] == [2, 5]
    assert number_ranges({0, 1, 2, 5, 9}) == "0-2,5,9"


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ("0-3", r"--parts 0-3 names part 3, which is not there: the parts are 0-2,5"),
        ("7", "names part 7"),
        ("5-2", "runs backwards; write 2-5"),
        ("0-999999999", "names part 3"),
    ],
)
def test_parts_that_are_not_there_are_refused(ranges, message):
    with pytest.raises(XtokenError, match=message):
        chosen_parts(ranges, [part(index) for index in (0, 1, 2, 5)])


def test_some_parts_keep_their_numbers_and_bytes(kept_capture, tmp_path):
    source = read_manifest(str(kept_capture), CaptureManifest)
    found = pulled(kept_capture, tmp_path / "copy", parts="1-2")
    assert found.parts == source.parts[1:]
    assert (tmp_path / "copy" / data_name(2)).read_bytes() == (kept_capture / data_name(2)).read_bytes()
    (origin,) = found.derived_from
    assert (origin.content_hash, origin.parts, origin.first_part) == (content_hash(source), "1-2", 1)
    assert (found.corpus, found.run_hash) == (source.corpus, source.run_hash)
    # the plan still says which documents are in which part
    assert (tmp_path / "copy" / "plan.json").exists()


def test_samples_by_condition(kept_capture, tmp_path):
    rows = table(kept_capture).to_pylist()
    wanted = [row for row in rows if len(row["teacher_ids"]) < 60]
    assert 0 < len(wanted) < len(rows)
    found = pulled(kept_capture, tmp_path / "copy", where="len(teacher_ids) < 60")
    assert table(tmp_path / "copy").to_pylist() == wanted
    assert sum(one.samples for one in found.parts) == len(wanted)
    assert sum(one.tokens for one in found.parts) == sum(len(row["teacher_ids"]) for row in wanted)
    assert found.derived_from[0].where == "len(teacher_ids) < 60"
    documents = {row["sample_id"].rpartition("#")[0] for row in wanted}
    counts = Counter()
    for one in found.parts:
        counts.update(one.counts)
    assert counts["documents"] == len(documents)
    assert counts["snapped"] == sum(row["snapped"] for row in wanted)
    assert "chunks" not in counts
    assert not (tmp_path / "copy" / "plan.json").exists()


def test_parts_without_a_sample_are_dropped(kept_capture, tmp_path):
    only = table(kept_capture, ["sample_id"])["sample_id"][-1].as_py()
    found = pulled(kept_capture, tmp_path / "copy", where=f"sample_id = '{only}'")
    assert [one.samples for one in found.parts] == [1]
    assert Folder(str(tmp_path / "copy")).names("data") == [f"part-{found.parts[0].index:05d}.parquet"]
    with pytest.raises(XtokenError, match="no sample is left"):
        pulled(kept_capture, tmp_path / "none", where="sample_id = 'nobody'")
    assert [path.name for path in (tmp_path / "none").rglob("*") if path.is_file()] == []


WRONG = {
    "no_such_column > 1": "no_such_column",
    "count(*) > 1": "aggregates",
    "complete; SELECT 1": "more than one statement",
    "true) OR (true": "syntax error",
    "complete, snapped": "cannot be evaluated",
    "sample_id IN (SELECT content FROM read_text('/etc/hostname'))": "Permission Error",
    "sample_id IN (SELECT sample_id FROM variable)": "variable",
    "": "cannot be evaluated",
}


@pytest.mark.parametrize("where", WRONG)
def test_wrong_conditions_are_refused_before_anything_is_copied(kept_capture, tmp_path, where):
    variable = pa.table({"sample_id": ["a"]})  # conditions must not find Python's variables
    with pytest.raises(XtokenError, match=WRONG[where]) as caught:
        Where(where, CAPTURE)
    assert repr(where) in str(caught.value)
    assert "realised_logprob" in str(caught.value)
    if where:
        with pytest.raises(XtokenError, match=WRONG[where]):
            pulled(kept_capture, tmp_path / "copy", where=where)
    assert not (tmp_path / "copy").exists()
    del variable


def test_conditions_that_fail_on_a_sample_say_so(kept_capture, tmp_path):
    with pytest.raises(XtokenError, match=r"--where .* cannot be evaluated .*Conversion Error"):
        pulled(kept_capture, tmp_path / "copy", where="CAST(sample_id AS INTEGER) > 3")
    assert not (tmp_path / "copy" / "manifest.json").exists()


@pytest.mark.parametrize("options", [{"where": "random() < 0.5"}, {"columns": ["rows"]}, {"where": "complete"}])
def test_the_same_subset_has_the_same_bytes(kept_capture, tmp_path, options):
    for name, workers in (("one", 1), ("two", 4)):
        pulled(kept_capture, tmp_path / name, workers=workers, **options)
    one, two = (Folder(str(tmp_path / name)) for name in ("one", "two"))
    assert one.names("data") == two.names("data")
    for name in (
        *(f"data/{name}" for name in one.names("data")),
        *(f"commits/{name}" for name in one.names("commits")),
    ):
        assert one.read(name) == two.read(name)


@pytest.mark.parametrize("keep", [["none"], ["text"], ["rows"], ["space_logprob"], ["text", "rows"]])
def test_columns_left_out_are_said_and_read_as_such(kept_capture, tmp_path, keep):
    source = read_manifest(str(kept_capture), CaptureManifest)
    found = pulled(kept_capture, tmp_path / "copy", columns=keep)
    stored = pq.read_schema(tmp_path / "copy" / data_name(0)).names
    whole = pq.read_schema(kept_capture / data_name(0)).names
    assert found.left_out == [name for name in whole if name not in stored]
    assert (
        {"text": "text", "rows": "topk_gap", "space_logprob": "space_logprob"}[keep[0]] in stored
        if keep != ["none"]
        else set(stored).isdisjoint({"text", "topk_gap", "space_logprob"})
    )
    assert [one.counts for one in found.parts] == [one.counts for one in source.parts]
    assert [one.rows for one in found.parts] == [one.rows for one in source.parts]
    assert (sum(one.entries for one in found.parts) > 0) == ("rows" in keep)
    read, before = table(tmp_path / "copy"), table(kept_capture)
    assert set(read.column_names) == set(before.column_names)
    for name in before.column_names:
        if name in stored or (name == "topk_ids" and "rows" in keep):
            assert read[name].equals(before[name]), name
    if "text" not in keep:
        assert read["text"].null_count == len(read)
    if "space_logprob" not in keep:
        assert read["space_logprob"].null_count == len(read)
    if "rows" not in keep:
        assert [len(ids) for ids in read["topk_ids"].to_pylist()] == [0] * len(read)
        assert [set(kept) for kept in read["kept"].to_pylist()] == [
            {0} if len(row) else set() for row in before["kept"]
        ]
        assert read["rest_gap"].to_pylist() == read["kept"].to_pylist()


def test_single_columns_are_read_where_others_were_left_out(kept_capture, tmp_path):
    pulled(kept_capture, tmp_path / "copy", columns=["none"])
    assert table(tmp_path / "copy", ["kept", "sample_id"]).column_names == ["kept", "sample_id"]
    assert table(tmp_path / "copy", ["text"])["text"].null_count > 0


def test_subsets_without_rows_are_inspected_and_projected(kept_capture, tmp_path):
    pulled(kept_capture, tmp_path / "copy", columns=["text"])
    assert inspect(str(tmp_path / "copy"))["kind"] == "capture"
    assert teacher_mass(str(tmp_path / "copy"), 100) is None


def test_what_a_subset_lacks_cannot_be_asked_of_it(kept_capture, tmp_path):
    pulled(kept_capture, tmp_path / "copy", columns=["text"])
    with pytest.raises(XtokenError, match=r"--columns rows: .*copy is a subset that left it out"):
        pulled(tmp_path / "copy", tmp_path / "more", columns=["text", "rows"])
    again = pulled(tmp_path / "copy", tmp_path / "less", where="complete", columns=["none"])
    assert again.derived_from[0].content_hash == content_hash(read_manifest(str(tmp_path / "copy"), CaptureManifest))
    assert set(again.left_out) > {"text", "kept", "space_logprob"}


@pytest.mark.parametrize("name", ["v1-tau", "v2-tau", "v2-sampled", "v3-tau", "v3-sampled"])
def test_every_version_and_codec_has_subsets(name, tmp_path):
    source = GOLDEN / name
    version = read_manifest(str(source), CaptureManifest).schema_version
    assert pulled(source, tmp_path / "some", where="len(teacher_ids) % 2 = 0").schema_version == version
    wanted = [row for row in table(source).to_pylist() if len(row["teacher_ids"]) % 2 == 0]
    assert table(tmp_path / "some").to_pylist() == wanted
    pulled(source, tmp_path / "bare", columns=["none"])
    found, before = table(tmp_path / "bare"), table(source)
    assert set(found.column_names) == set(before.column_names)
    assert found["realised_logprob"].equals(before["realised_logprob"])
    inspect(str(tmp_path / "bare"))


@pytest.mark.parametrize("left_out", [["sample_id"], ["kept"], ["nothing"]])
def test_manifests_that_leave_out_what_cannot_be_are_refused(capture, left_out):
    manifest = json.loads((capture / "manifest.json").read_text())
    (capture / "manifest.json").write_text(json.dumps(manifest | {"left_out": left_out}))
    for read in (verify, inspect, LeftOut.of, CaptureCheck.of):
        given = str(capture) if read in (verify, inspect) else read_manifest(str(capture), CaptureManifest)
        with pytest.raises(XtokenError, match="not a list of whole groups of optional columns"):
            read(given)
    with pytest.raises(XtokenError, match="not a list of whole groups of optional columns"):
        next(iter_capture(str(capture)))


def aligned(capture: Path, out: Path, losses: list[str]) -> TargetManifest:
    config = AlignConfig(captures=[str(capture)], student="bytes", out=str(out), losses=losses)
    return align(config, Silent(), executor=InThisProcess())


def target_rows(root: Path) -> dict[str, list[Any]]:
    paths = sorted((root / "data").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(path) for path in paths).to_pydict()


def test_alm_is_the_same_without_rows(kept_capture, tmp_path):
    pulled(kept_capture, tmp_path / "copy", columns=["text", "space_logprob"])
    aligned(kept_capture, tmp_path / "from-whole", ["alm"])
    aligned(tmp_path / "copy", tmp_path / "from-subset", ["alm"])
    whole, subset = target_rows(tmp_path / "from-whole"), target_rows(tmp_path / "from-subset")
    assert np.isnan(subset.pop("teacher_entropy")).all()
    assert np.isnan(subset.pop("teacher_top1")).all()
    for name, values in subset.items():
        # NaN stands for chunks without a row
        np.testing.assert_equal(values, whole[name], err_msg=name)
    assert any(np.isfinite(row).any() for row in subset["alm_space_logprob"])
    verify(str(tmp_path / "from-subset"))


def test_losses_that_need_rows_are_refused_without_them(kept_capture, tmp_path):
    pulled(kept_capture, tmp_path / "copy", columns=["text"])
    with pytest.raises(XtokenError, match="without the teacher's rows, which --for p-kl,uld needs; take --for ce,alm"):
        aligned(tmp_path / "copy", tmp_path / "targets", ["p-kl", "ce", "uld"])
    aligned(tmp_path / "copy", tmp_path / "targets", ["ce"])


def test_part_of_targets(kept_capture, tmp_path):
    aligned(kept_capture, tmp_path / "targets", ["ce"])
    for options in ({"where": "true"}, {"columns": ["none"]}):
        with pytest.raises(XtokenError, match="subset the capture with it, then run 'xtoken align'"):
            pull(PullConfig(source=str(tmp_path / "targets"), destination=str(tmp_path / "t"), **options), Silent())
    config = {"source": str(tmp_path / "targets"), "destination": str(tmp_path / "some"), "parts": "0,2"}
    pull(PullConfig(**config), Silent())
    assert verify(str(tmp_path / "some"))["parts"] == 2
    push(PushConfig(source=str(tmp_path / "targets"), destination=str(tmp_path / "all")), Silent())
    assert verify(str(tmp_path / "all")) == verify(str(tmp_path / "targets"))
    with pytest.raises(XtokenError, match="--license is of a capture"):
        push(PushConfig(**config, license=["corpus=mit", "outputs=mit"]), Silent())


def test_shards_set_aside_are_named_where_their_number_was_asked_for(capture, tmp_path):
    manifest = json.loads((capture / "manifest.json").read_text())
    manifest["parts"].pop(1)
    manifest["set_aside"] = {"1": "the engine died"}
    (capture / "manifest.json").write_text(json.dumps(manifest))
    for name in (data_name(1), "commits/part-00001.json"):
        (capture / name).unlink()
    seal(str(capture))
    assert pulled(capture, tmp_path / "all").set_aside == {1: "the engine died"}
    assert pulled(capture, tmp_path / "some", parts="0-1").set_aside == {1: "the engine died"}
    assert pulled(capture, tmp_path / "last", parts="2").set_aside == {}
    with pytest.raises(XtokenError, match="quarantined; choose other parts"):
        pulled(capture, tmp_path / "lost", parts="1")


def test_a_damaged_source_makes_no_subset(capture, tmp_path):
    whole = (capture / data_name(1)).read_bytes()
    (capture / data_name(1)).write_bytes(whole[:200] + b"?" + whole[201:])
    with pytest.raises(VerificationError, match=r"part-00001\.parquet has sha256"):
        pull(PullConfig(source=str(capture), destination=str(tmp_path / "copy"), columns=["none"]), Silent())
