"""From a set to a capture: tests of the rows, resuming, what is refused, and what such captures can train."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distillkit_sets import PLAIN, QWEN3, packed, sampled, write
from tests.in_process import InThisProcess
from tests.unit.pipeline.imports.sets import IMPORT, SIZE, TINY, config_of, documents, write_set
from xtoken import cli
from xtoken.pipeline.align.run import align
from xtoken.pipeline.imports import parts
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.query import query
from xtoken.pipeline.query.samples import Capture
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.codecs.topk import TAIL_UNKNOWN
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture, iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig, QueryConfig
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sampled set."""
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def capture(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it becomes."""
    out = tmp_path_factory.mktemp("made") / "capture"
    import_dataset(config_of(data, out, license=["corpus=cc0-1.0", "outputs=mit"], source="a/b"), Silent())
    return out


@pytest.fixture(scope="module")
def renormalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose rows were made to sum to 1 over their entries, as a capture."""
    folder = tmp_path_factory.mktemp("renormalised")
    rows, whole = [], {**PLAIN, "exact_k": 128, "polynomial_terms": []}
    for one in documents():
        top = np.argsort(-one.logprob, axis=1)[:, :128]
        mass = np.log(np.exp(np.take_along_axis(one.logprob, top, 1)).sum(axis=1, keepdims=True))
        rows.append(sampled(type(one)(one.ids, one.logprob - mass), whole, SIZE))
    write(folder / "set" / "rows.parquet", rows, whole, SIZE)
    import_dataset(config_of(folder / "set", folder / "capture"), Silent())
    return folder / "capture"


def align_config(capture: Path, out: Path, *losses: str, **more: Any) -> AlignConfig:
    return AlignConfig(captures=[str(capture)], student="bytes", out=str(out), losses=list(losses), **more)


def files(root: Path) -> dict[str, bytes]:
    """All that does not say who wrote it."""
    left = ("manifest.json", "SHA256SUMS")
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in left}


def test_the_manifest_says_what_is_known(capture: Path, data: Path) -> None:
    manifest = read_manifest(str(capture), CaptureManifest)
    known = manifest.imported
    assert known is not None
    assert (manifest.schema_version, known.rest, known.format) == (7, "exact", "distillkit")
    assert manifest.licenses == {"corpus": "cc0-1.0", "outputs": "mit"}
    assert (known.source, known.files[0].bytes) == ("a/b", (data / "rows.parquet").stat().st_size)
    assert known.same_ids == 1.0
    assert max(known.shift, key=lambda shift: known.shift[shift]) == "+0"
    rows = sum(part.rows for part in manifest.parts)
    labels = np.concatenate([batch["realised_logprob"].flatten().to_numpy() for batch in iter_capture(str(capture))])
    assert len(labels) == rows
    assert np.isnan(labels).mean() == pytest.approx(known.labels_unknown)
    assert 0 < known.labels_unknown < 0.3


def test_rows_are_those_of_the_teacher(capture: Path) -> None:
    """Head and REST of every row against the distributions that were encoded, within half a step of the codec."""
    found = Capture(str(capture))
    for sample, document in zip(found, documents(), strict=True):
        assert sample.sample_id.startswith("rows.parquet:")
        assert sample.token_ids.tolist() == document.ids.tolist()
        assert sample.complete
        for row in range(len(sample.offsets) - 1):
            ids, logprob, rest = sample.row(row)
            truth = document.logprob[row].astype(np.float64)
            np.testing.assert_allclose(logprob, truth[ids], atol=1 / 64 + 1e-5)
            left = 1 - np.exp(truth[ids]).sum()
            np.testing.assert_allclose(rest, np.log(left), atol=1 / 64 + 1e-4)


def test_whoever_reads_captures_reads_this_one(capture: Path) -> None:
    verify(str(capture))
    assert inspect(str(capture))["samples"] == 8
    found = query(QueryConfig(path=str(capture), sql="FROM tokens SELECT count(*) AS n, count(rest) AS known"))
    assert found["rows"][0]["n"] > found["rows"][0]["known"] > 0


def test_the_same_set_gives_the_same_bytes_also_in_parts_and_after_a_kill(data: Path, tmp_path: Path) -> None:
    settings = {"part_bytes": 1 << 14}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    import_dataset(config_of(data, whole, **settings), Silent())
    manifest = read_manifest(str(whole), CaptureManifest)
    assert len(manifest.parts) > 3
    words = ["import", "distillkit", str(data), "--tokenizer", str(TINY), "--part-bytes", str(1 << 14), "--quiet"]
    command = [sys.executable, str(Path(cli.__file__)), *words, "--out", str(killed)]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    commits = killed / "commits"
    deadline = time.monotonic() + 120
    while not (commits.is_dir() and any(commits.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(commits.iterdir())
    import_dataset(config_of(data, killed, **settings), Silent())
    assert files(killed) == files(whole)
    before = (killed / "manifest.json").read_bytes()
    import_dataset(config_of(data, killed, **settings), Silent())
    assert (killed / "manifest.json").read_bytes() == before, "a finished run does nothing"
    with pytest.raises(XtokenError, match=r"holds another run.*min_p"):
        import_dataset(config_of(data, killed, min_p=0.5, **settings), Silent())


def test_two_imports_at_once_make_one_capture(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins, and sweeps, while the first has written a part that it has not published."""
    settings, out, real, second = {"part_bytes": 1 << 14}, tmp_path / "capture", parts.write_parquet, []

    def within(*args: Any, **options: Any) -> Any:
        written = real(*args, **options)
        if not second:
            second.append(None)
            second[0] = import_dataset(config_of(data, out, **settings), Silent())
        return written

    monkeypatch.setattr(parts, "write_parquet", within)
    first = import_dataset(config_of(data, out, **settings), Silent())
    assert first == second[0]
    import_dataset(config_of(data, tmp_path / "alone", **settings), Silent())
    assert files(out) == files(tmp_path / "alone")
    verify(str(out))


def test_packed_rows_become_the_same_documents(tmp_path: Path) -> None:
    some = documents(6)
    write(
        tmp_path / "set" / "rows.parquet", [packed(some[:3], QWEN3, SIZE), packed(some[3:], QWEN3, SIZE)], QWEN3, SIZE
    )
    import_dataset(config_of(tmp_path / "set", tmp_path / "out"), Silent())
    found = list(Capture(str(tmp_path / "out")))
    assert [one.token_ids.tolist() for one in found] == [one.ids[:-1].tolist() for one in some]
    assert not any(one.complete for one in found), "what ended them is lost"


@pytest.mark.parametrize(
    ("written", "read", "entries", "said"),
    [
        (QWEN3, PLAIN, "head", "rows add up to more than 1"),
        (QWEN3, PLAIN, "all", "the tail of these rows is noise"),
        (PLAIN, QWEN3, "head", r"ranks? (1|2-8) in .* decoded wrongly; is --compression that of the set"),
    ],
)
def test_the_wrong_settings_are_found(
    written: dict[str, Any], read: dict[str, Any], entries: str, said: str, tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "set", config=written)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"d": SIZE, **read}))
    config = config_of(folder, tmp_path / "out", compression=str(other), entries=entries, dry_run=True)
    with pytest.raises(XtokenError, match=said):
        import_dataset(config, Silent())
    assert not (tmp_path / "out").exists()


def test_rows_that_are_about_another_token_are_refused(tmp_path: Path) -> None:
    """A set whose rows stand one place too early."""
    rows = []
    for one in documents():
        late = np.concatenate([one.logprob[1:], one.logprob[:1]])
        rows.append(sampled(type(one)(one.ids, late), QWEN3, SIZE))
    write(tmp_path / "set" / "rows.parquet", rows, QWEN3, SIZE)
    with pytest.raises(XtokenError, match=r"predict the token \+1 from where the format says|decoded wrongly"):
        import_dataset(config_of(tmp_path / "set", tmp_path / "out"), Silent())


def test_another_tokenizer_is_refused(data: Path, tmp_path: Path, tokenizer_file: Any) -> None:
    other = config_of(data, tmp_path / "out", tokenizer=str(tokenizer_file("smollm2")), form="text")
    with pytest.raises(XtokenError, match=r"is of another tokenizer; give the teacher's with --tokenizer"):
        import_dataset(other, Silent())
    small = config_of(
        IMPORT / "dk_qwen3_152k.parquet", tmp_path / "out", compression=str(IMPORT / "dk_qwen3_152k.json")
    )
    with pytest.raises(XtokenError, match=r"an id that is no token.*is --tokenizer right"):
        import_dataset(small, Silent())


def test_a_dry_run_writes_nothing_and_says_what_can_be_trained(data: Path, tmp_path: Path) -> None:
    found = import_dataset(config_of(data, tmp_path / "out", dry_run=True), Silent())
    assert not (tmp_path / "out").exists()
    assert "p-kl" in found["losses"]
    assert list(found["losses_refused"]) == ["alm"]
    assert found["stored_probability_by_shift"]["+0"] > 5 * found["stored_probability_by_shift"]["+1"]


def test_a_folder_of_others_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(XtokenError, match=r"holds 'mine.txt' but no import"):
        import_dataset(config_of(data, tmp_path / "out"), Silent())
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json.d928a00b0c42.tmp").touch()  # of an import that begins at the same time
    import_dataset(config_of(data, tmp_path / "begun"), Silent())


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    import_dataset(config_of(folder, tmp_path / "out"), Silent())
    write_set(folder, count=7)
    with pytest.raises(XtokenError, match=r"changed since .* was begun"):
        import_dataset(config_of(folder, tmp_path / "out"), Silent())


def test_unknown_labels_are_only_where_the_manifest_says(capture: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(capture), str(root)], check=True)
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["imported"]
    (root / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 3}))
    with pytest.raises(VerificationError, match=r"realised_logprob is not a log-probability"):
        verify(str(root))
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(XtokenError, match=r"says where rows were imported from"):
        read_manifest(str(root), CaptureManifest)


def test_targets_of_unknown_labels(capture: Path, tmp_path: Path) -> None:
    """A chunk whose label nobody knows has p-kl's target, and of several tokens none of gold's and uld's."""
    losses = ("p-kl", "h-kl", "gold", "uld", "byte-prefix")
    manifest = align(align_config(capture, tmp_path / "t", *losses), Silent(), executor=InThisProcess())
    verify(str(tmp_path / "t"))
    assert manifest.schema_version == 8
    assert manifest.imported == read_manifest(str(capture), CaptureManifest).imported
    counts = {name: sum(part.counts.get(name, 0) for part in manifest.parts) for name in ("chunks_label_unknown",)}
    unknown = lost = 0
    for batch in iter_targets(str(tmp_path / "t")):
        for row in batch.to_pylist():
            label = np.array(row["teacher_logprob"])
            size_C = np.diff(row["chunk_teacher_end"], prepend=0)
            unknown += int(np.isneginf(label).sum())
            assert (np.array(row["pkl_count"])[np.isneginf(label)] > 0).all()
            factor = np.array(row["factor_logprob"])
            several = np.isnan(factor) & ~np.isnan(label)
            lost += int(several.sum())
            assert (size_C[several] > 1).all()
            assert not np.array(row["uld_count"])[several].any()
            assert not np.array(row["gold_count"])[several].any()
    assert unknown == counts["chunks_label_unknown"] > 0
    targets = Targets(str(tmp_path / "t"))
    targets.require_options("p-kl", LossOptions())
    targets.require_weighting("entropy")
    with pytest.raises(XtokenError, match=r"--weighting ce: .* does not know the log-probability of"):
        targets.require_weighting("ce")


def test_alm_needs_all_labels(capture: Path, tmp_path: Path) -> None:
    with pytest.raises(
        XtokenError, match=r"--for alm: .* of the labels do not have a log-probability .* --for ce,p-kl"
    ):
        align(align_config(capture, tmp_path / "t", "alm"), Silent())
    assert not (tmp_path / "t").exists()


def test_another_temperature_is_refused_without_a_way_that_an_import_has_not(capture: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"at --tau 2 needs the tail mass .* stores it at 1 only; leave --tau out$"):
        align(align_config(capture, tmp_path / "t", "h-kl", tau=2.0), Silent())


def test_rows_that_were_renormalised_have_no_tail(renormalised: Path) -> None:
    manifest = read_manifest(str(renormalised), CaptureManifest)
    assert manifest.imported is not None
    assert (manifest.imported.rest, manifest.imported.labels_unknown) == ("unknown", 1.0)
    verify(str(renormalised))
    assert inspect(str(renormalised))["samples_shown"][0]["row"]["rest_logprob"] is None
    for batch in iter_capture(str(renormalised)):
        assert set(batch["rest_gap"].flatten().to_pylist()) == {TAIL_UNKNOWN}
    found = query(QueryConfig(path=str(renormalised), sql="FROM tokens SELECT count(rest) AS known"))
    assert found["rows"][0]["known"] == 0


@pytest.mark.parametrize("loss", ["h-kl", "gold", "uld", "alm", "byte-prefix", "mined"])
def test_losses_that_need_the_tail_are_refused(loss: str, renormalised: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=f"--for {loss}: .*It can serve --for ce,p-kl,strict,sparse-kl"):
        align(align_config(renormalised, tmp_path / "t", loss), Silent())


def test_merging_rows_without_a_tail_is_refused(renormalised: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"--merge mean joins probabilities"):
        align(align_config(renormalised, tmp_path / "t", "p-kl", merge="mean"), Silent())


def test_p_kl_without_a_tail_drops_it(renormalised: Path, tmp_path: Path) -> None:
    align(align_config(renormalised, tmp_path / "t", "p-kl"), Silent(), executor=InThisProcess())
    verify(str(tmp_path / "t"))
    assert read_manifest(str(tmp_path / "t"), TargetManifest).schema_version == 8
    targets = Targets(str(tmp_path / "t"))
    with pytest.raises(XtokenError, match=r"tail mass nobody knows; train with --rest drop"):
        targets.require_options("p-kl", LossOptions())
    targets.require_options("p-kl", LossOptions(rest="drop"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_refused_or_read(data: Path, tmp_path: Path, draws: st.DataObject) -> None:
    """Whatever bytes of the file are others: an error that names it, or an import; never another exception."""
    whole = bytearray((data / "rows.parquet").read_bytes())
    for _ in range(draws.draw(st.integers(1, 4))):
        at = draws.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(len(whole) - 4000, len(whole) - 1)))
        whole[at] = draws.draw(st.integers(0, 255))
    stop = draws.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "rows.parquet").write_bytes(whole[:stop])
    (folder / "compression_config.yaml").write_bytes((data / "compression_config.yaml").read_bytes())
    try:
        import_dataset(config_of(folder, tmp_path / "out", dry_run=True), Silent())
    except XtokenError as error:
        assert str(error)  # noqa: PT017 - nothing else may be raised


def test_rows_of_any_lists_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "rows.parquet")
    good = table.to_pylist()[0]
    for name, value, said in (
        ("input_ids", good["input_ids"][:-3], "ids and rows that do not fit"),
        ("compressed_logprobs", [row[:-1] for row in good["compressed_logprobs"]], "rows of compressed_logprobs"),
        ("compressed_logprobs", [*good["compressed_logprobs"][:-1], [1]], "lists of compressed_logprobs of unequal"),
        ("bytepacked_indices", good["bytepacked_indices"][:-1], "columns of unequal lengths"),
        ("input_ids", None, "no input_ids"),
    ):
        folder = tmp_path / "set"
        write(folder / "rows.parquet", [{**good, name: value}, *table.to_pylist()[1:]], QWEN3, SIZE)
        with pytest.raises(XtokenError, match=f"rows.parquet:0: {said}"):
            import_dataset(config_of(folder, tmp_path / "out", dry_run=True), Silent())
        found = import_dataset(config_of(folder, tmp_path / "out", dry_run=True, on_bad="skip"), Silent())
        assert found["rows_looked_at"] > 0


def test_two_imports_become_one_capture(capture: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "set", count=4)
    (other / "rows.parquet").rename(other / "more.parquet")
    import_dataset(config_of(other, tmp_path / "more", source="c/d"), Silent())
    merge(MergeConfig(sources=[str(capture), str(tmp_path / "more")], destination=str(tmp_path / "both")), Silent())
    verify(str(tmp_path / "both"))
    parts = [read_manifest(str(root), CaptureManifest).imported for root in (capture, tmp_path / "more")]
    both = read_manifest(str(tmp_path / "both"), CaptureManifest)
    assert both.imported is not None
    assert (both.schema_version, both.imported.source) == (7, "a/b, c/d")
    assert [one.name for one in both.imported.files] == ["rows.parquet", "more.parquet"]
    assert both.imported.looked_at == sum(one.looked_at for one in parts if one is not None)
    assert both.imported.labels_unknown == max(one.labels_unknown for one in parts if one is not None)


def test_an_import_and_a_capture_of_a_teacher_stay_apart(capture: Path, renormalised: Path, tmp_path: Path) -> None:
    golden = TINY.parent / "v3-topk"
    for other, said in ((renormalised, "imported.rest is 'exact' and 'unknown'"), (golden, "cannot be one capture")):
        with pytest.raises(XtokenError, match=said):
            merge(MergeConfig(sources=[str(capture), str(other)], destination=str(tmp_path / "both")), Silent())


def test_a_subset_says_where_it_is_from(capture: Path, tmp_path: Path) -> None:
    config = PullConfig(source=str(capture), destination=str(tmp_path / "some"), where="len(teacher_ids) > 40")
    pull(config, Silent())
    verify(str(tmp_path / "some"))
    found, whole = (read_manifest(str(root), CaptureManifest) for root in (tmp_path / "some", capture))
    assert found.imported == whole.imported
    assert found.schema_version == 7
    assert 0 < sum(part.samples for part in found.parts) < sum(part.samples for part in whole.parts)
