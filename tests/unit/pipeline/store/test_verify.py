"""verify finds every kind of damage, names it, and follows nothing that a file says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import commit_name, committed, data_name
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import TargetCheck, verify
from xtoken.pipeline.store.writer import write_parquet
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, read_manifest
from xtoken.schemas.tables import LEAN_TARGETS, target_columns, targets
from xtoken.schemas.target_form import TargetForm, TokenCodes

CAPTURE = open_codec(CodecInfo(k=64)).schema()


def test_a_good_capture_passes_with_its_figures(kept_capture):
    manifest = read_manifest(str(kept_capture), CaptureManifest)
    seen = []
    report = verify(str(kept_capture), seen.append)
    assert report["kind"] == "capture"
    assert report["parts"] == len(manifest.parts) == len(seen) > 1
    assert report["tokens"] == sum(part.tokens for part in manifest.parts)
    assert report["rows"] == report["tokens"] - report["samples"]  # no BOS: the first token of each has no row


def problems(root) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(str(root))
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_flipped_bit_in_any_file_is_found(capture):
    for name in (data_name(1), "vocab.parquet", "merges.parquet"):
        path = capture / name
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        found = problems(capture)
        assert ("part 1" if name.startswith("data") else name) in found
        path.write_bytes(whole)
    verify(str(capture))


def test_missing_and_truncated_parts_are_both_named(capture):
    (capture / data_name(0)).unlink()
    path = capture / data_name(1)
    path.write_bytes(path.read_bytes()[:-10])
    found = problems(capture)
    assert "part 0: data/part-00000.parquet is missing" in found
    assert "part 1" in found


def edit_manifest(root, change) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_wrong_counts_are_found(capture):
    edit_manifest(capture, lambda manifest: manifest["parts"][0].update(entries=5))
    found = problems(capture)
    assert "part 0: commit record and manifest differ" in found
    assert "entries, recorded 5" in found


def test_a_part_the_manifest_leaves_out_is_found(capture):
    edit_manifest(capture, lambda manifest: manifest["parts"].pop())
    assert "commit record and manifest differ" in problems(capture)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "data/../../secret"])
def test_no_name_in_a_manifest_is_followed(capture, name, monkeypatch):
    (capture.parent / "secret").write_bytes(b"s")
    edit_manifest(capture, lambda manifest: manifest["files"].update({name: "0" * 64}))
    opened = []
    real = Folder.sha256
    monkeypatch.setattr(Folder, "sha256", lambda self, what: opened.append(what) or real(self, what))
    assert "is not a file of a capture artifact" in problems(capture)
    assert name not in opened


def test_links_are_refused(capture):
    path = capture / data_name(0)
    outside = capture.parent / "outside.parquet"
    os.rename(path, outside)
    path.symlink_to(outside)
    assert "part 0: data/part-00000.parquet is a symbolic link" in problems(capture)


def test_a_manifest_of_another_version_is_refused(capture):
    edit_manifest(capture, lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(XtokenError, match="schema version 99"):
        verify(str(capture))


def changed(column, change):
    """Replace one column's Python values in every row."""

    def apply(rows):
        for row in rows:
            row[column] = change(row[column])

    return apply


def plus_last(amount):
    return lambda values: [*values[:-1], values[-1] + amount]


BREAKS = {
    "teacher_end decreases": changed("teacher_end", lambda ends: [ends[0] + 99, *ends[1:]]),
    "last teacher_end is not the length": changed("teacher_end", plus_last(1)),
    "teacher_end has another length": changed("teacher_end", lambda ends: ends[:-1]),
    "teacher_ids has an id outside": changed("teacher_ids", lambda ids: [*ids[:-1], 10**6]),
    "topk_ids has an id outside": changed("topk_codes", lambda ids: [-1, *ids[1:]]),
    "kept is not between 1 and": changed("kept", lambda kept: [0, *kept[1:]]),
    "topk_ids has not as many": changed("topk_codes", lambda ids: ids[:-1]),
    "topk_gap has not as many": changed("topk_gap", lambda gaps: [*gaps, 1]),
    "an id stands twice": changed("topk_codes", lambda ids: [ids[1], *ids[1:]]),
    "do not sum to 1": changed("topk_gap", lambda gaps: [0] * len(gaps)),
    "realised_logprob has another": changed("realised_logprob", lambda values: values[1:]),
    "realised_logprob is no": changed("realised_logprob", lambda values: [float("nan"), *values[1:]]),
    "space_logprob has another": changed("space_logprob", lambda values: values[1:]),
    "space_logprob is no": changed("space_logprob", lambda values: [0.5, *values[1:]]),
    "first_row is not 0 or 1": changed("first_row", lambda _: 2),
}


@pytest.mark.parametrize("rule", BREAKS)
def test_every_row_rule_is_checked(kept_capture, tmp_path, rule):
    manifest = read_manifest(str(kept_capture), CaptureManifest)
    check = CaptureCheck(manifest.tokenizer.size, manifest.codec)
    rows = pq.read_table(kept_capture / data_name(1)).to_pylist()
    copy = str(tmp_path / "part.parquet")
    write_parquet(copy, CAPTURE, [pa.RecordBatch.from_pylist(rows, CAPTURE)])
    assert check(copy).samples == len(rows)
    broken = [dict(row) for row in rows]
    BREAKS[rule](broken[-1:])
    write_parquet(copy, CAPTURE, [pa.RecordBatch.from_pylist(broken, CAPTURE)])
    with pytest.raises(VerificationError, match=rule) as caught:
        check(copy)
    assert repr(rows[-1]["sample_id"]) in str(caught.value)


def test_another_schema_is_refused(kept_capture, tmp_path):
    table = pq.read_table(kept_capture / data_name(0)).drop_columns(["snapped"])
    pq.write_table(table, tmp_path / "part.parquet")
    with pytest.raises(VerificationError, match="not those of the format"):
        CaptureCheck(100, CodecInfo(k=4, min_p=0.1, step=1 / 32))(str(tmp_path / "part.parquet"))


def test_a_forged_record_is_found(capture):
    part = committed(str(capture))[0]
    (capture / commit_name(0)).write_text(part.model_copy(update={"sha256": "0" * 64}).model_dump_json())
    assert "part 0: commit record and manifest differ" in problems(capture)


def test_other_filesystems(kept_capture):
    import fsspec

    root = f"memory://{kept_capture.parent.name}/capture"
    fsspec.filesystem("memory").put(str(kept_capture), root, recursive=True)
    assert verify(root) == verify(str(kept_capture))
    ours, theirs = (pa.Table.from_batches(iter_capture(where)) for where in (str(kept_capture), root))
    assert ours.equals(theirs)


FORMS = {
    version: TargetForm(list(LOSSES), version, 1 / 32, TokenCodes(*[np.arange(4, dtype=np.int32)] * 2))
    for version in (LEAN_TARGETS - 1, LEAN_TARGETS)
}


def target_row(name: str, version: int = LEAN_TARGETS - 1) -> dict[str, Any]:
    """A sample of 3 tokens and 2 chunks, with as many entries as its counts say."""
    schema = targets(LOSSES, version)
    row: dict[str, Any] = {"sample_id": name}
    lengths = {"token": 3, "chunk": 2}
    for column, axis in target_columns(LOSSES, version)[1:]:
        assert pa.types.is_list(schema.field(column).type) == (axis != "sample")
        if axis == "sample":
            row[column] = 0.5
            continue
        counts = any(other == column for _, other in target_columns(LOSSES))
        row[column] = [2, 0, 1][: lengths[axis]] if counts else [0] * lengths[axis]
        if counts:
            lengths[column] = sum(row[column])
    return row


LISTS = [(at, *column) for at in FORMS for column in target_columns(LOSSES, at) if column.axis != "sample"]


@pytest.mark.parametrize(("version", "name", "axis"), LISTS)
def test_every_target_column_must_fit_its_axis(tmp_path, version, name, axis):
    path, schema = str(tmp_path / "part.parquet"), FORMS[version].schema
    rows = [target_row("a", version), target_row("b", version)]
    write_parquet(path, schema, [pa.RecordBatch.from_pylist(rows, schema)])
    check = TargetCheck(FORMS[version])
    assert (check(path).samples, check(path).tokens, check(path).entries) == (2, 6, 4)
    # One more here and one less there: only the sample, not the batch, is wrong.
    rows[0][name], rows[1][name] = [*rows[0][name], 0], rows[1][name][:-1]
    write_parquet(path, schema, [pa.RecordBatch.from_pylist(rows, schema)])
    with pytest.raises(VerificationError, match=r"sample 'a': \w+ has \d+ entries, \w+ (has|says) \d+"):
        check(path)


def test_negative_counts_are_found(tmp_path):
    path, schema = str(tmp_path / "part.parquet"), targets(["uld"])
    row = {column: target_row("a")[column] for column in schema.names} | {"uld_count": [3, -1]}
    write_parquet(path, schema, [pa.RecordBatch.from_pylist([row], schema)])
    with pytest.raises(VerificationError, match="uld_count has a negative count"):
        TargetCheck(TargetForm(["uld"], LEAN_TARGETS))(path)


def test_a_code_that_no_token_has_is_found(tmp_path):
    path, schema = str(tmp_path / "part.parquet"), FORMS[LEAN_TARGETS].schema
    row = target_row("a", LEAN_TARGETS)
    write_parquet(path, schema, [pa.RecordBatch.from_pylist([row | {"pkl_codes": [4, 0]}], schema)])
    with pytest.raises(VerificationError, match="pkl_codes has a code outside 0 to 3"):
        TargetCheck(FORMS[LEAN_TARGETS])(path)


def test_codes_are_looked_at_as_any_table_beside_the_parts(tmp_path):
    golden = Path(__file__).resolve().parents[3] / "golden" / "captures" / "v6-targets"
    root = Path(shutil.copytree(golden, tmp_path / "t"))
    assert "codes.parquet" in verify(str(root))["files"]
    whole = (root / "codes.parquet").read_bytes()
    (root / "codes.parquet").write_bytes(whole[:-1])
    with pytest.raises(VerificationError, match=r"codes\.parquet has sha256 .*, its manifest says"):
        verify(str(root))
    (root / "codes.parquet").unlink()
    with pytest.raises(VerificationError, match=r"codes\.parquet is missing"):
        verify(str(root))
