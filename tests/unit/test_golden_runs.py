"""Runs that release 0.5.0 began and that were killed half-way go on; see tests/golden/make_runs.py."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.align import run_captures
from xtoken.pipeline.align.run import align
from xtoken.pipeline.align.run_identity import run_settings as align_settings
from xtoken.pipeline.capture.precompute import precompute
from xtoken.pipeline.capture.run_identity import check_settings, run_settings
from xtoken.pipeline.project import build_w
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import iter_targets, load_vocab
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.train import OptimGroup, TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.tables import targets
from xtoken.schemas.ui.config_file import read_settings
from xtoken.schemas.ui.flags import build
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.loop import train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORDS = {"capture": "run.json", "targets": "align.json", "run": "run.json"}
FINISHED = {"capture": "manifest.json", "targets": "manifest.json", "run": "summary.json"}
# Another value of a field that decides what a run makes.
OTHER = {"capture": "--max-tokens 32", "targets": "--entries 5", "run": "--warmup 3"}
# What may be another at every start.
FREE = {"capture": "--batch-tokens 64 --lease-seconds 60", "targets": "--memory-limit 2GB", "run": "--keep 2"}


def commands() -> dict[str, str]:
    """The command that began each run."""
    spec = importlib.util.spec_from_file_location("make_runs", GOLDEN / "make_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.COMMANDS)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The runs and what they read, in the working folder; ``begun(name, flags)`` runs its command again."""
    shutil.copytree(GOLDEN / "runs", tmp_path, dirs_exist_ok=True)
    for name in ("tiny", "v4-topk", "v4-targets"):
        shutil.copytree(GOLDEN / "captures" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = commands()

    def go_on(name: str, more: str = "", out: str | None = None) -> Any:
        flags = [*words[name].split(), "--out", out or name, "--quiet", "--json", *more.split()]
        return CliRunner().invoke(cli.app, flags)

    return go_on


def files(root: Path, below: str) -> dict[str, bytes]:
    """Content of what lies there, but for what a kill left half written."""
    return {path.name: path.read_bytes() for path in (root / below).glob("part-*") if path.suffix != ".tmp"}


@pytest.mark.parametrize("name", ["capture", "targets"])
def test_parts_are_finished(begun: Callable[..., Any], name: str) -> None:
    root = Path(name)
    record, before = (root / RECORDS[name]).read_bytes(), files(root, "data")
    assert before
    assert not (root / FINISHED[name]).exists()
    assert begun(name, FREE[name]).exit_code == 0
    assert (root / RECORDS[name]).read_bytes() == record
    after = files(root, "data")
    assert after.items() > before.items()
    assert not list(root.rglob("*.tmp"))
    assert begun(name, out="fresh").exit_code == 0
    assert (Path("fresh") / RECORDS[name]).read_bytes() == record, "what is written is what 0.5.0 wrote"
    fresh = files(Path("fresh"), "data")
    if name == "capture":
        assert fresh == after, "a run from its beginning gives the same bytes"
    else:  # targets are begun in version 6 now; the values are the same, see below
        assert fresh.keys() == after.keys()


def version_of(root: str) -> int:
    """Of the manifest, which all parts have the columns of."""
    manifest = read_manifest(root, TargetManifest)
    schema = targets(manifest.losses, manifest.schema_version)
    assert all(pq.read_schema(path).equals(schema) for path in Path(root, "data").glob("*.parquet"))
    assert Path(root, "codes.parquet").exists() == (manifest.schema_version == 6)
    return manifest.schema_version


def test_targets_go_on_in_the_version_that_they_were_begun_in(begun: Callable[..., Any]) -> None:
    """No folder holds two; and what is built for an older one is to the byte what its release built."""
    assert begun("targets").exit_code == 0
    assert verify("targets")["parts"] == len(files(Path("targets"), "data"))
    assert version_of("targets") == 3
    first, *others = sorted(files(GOLDEN / "runs" / "targets", "data").items())
    assert not others
    for path in (Path("targets/data") / first[0], Path("targets/commits") / first[0].replace("parquet", "json")):
        path.unlink()
    Path("targets/manifest.json").unlink()
    assert begun("targets").exit_code == 0
    assert version_of("targets") == 3
    assert (Path("targets/data") / first[0]).read_bytes() == first[1]


def test_targets_from_the_beginning_hold_what_older_ones_hold(begun: Callable[..., Any]) -> None:
    """Every value, but for the rounding of log-probabilities to steps."""
    assert begun("targets").exit_code == 0
    assert begun("targets", out="fresh").exit_code == 0
    assert (version_of("targets"), version_of("fresh")) == (3, 6)
    old, new = (pa.Table.from_batches(iter_targets(root)) for root in ("targets", "fresh"))
    assert new.schema.equals(old.schema, check_metadata=True)
    rounded = ["pkl_logprob", "pkl_rest_logprob"]
    ours, theirs = (repr(table.drop_columns(rounded).to_pydict()) for table in (new, old))
    assert ours == theirs, "where both say nan, too"
    for name in rounded:
        values = [table[name].combine_chunks().flatten().to_numpy() for table in (new, old)]
        np.testing.assert_allclose(*values, atol=1 / 32, rtol=0)


def test_parts_that_were_set_aside_are_built_in_the_version_of_the_others(begun: Callable[..., Any]) -> None:
    bad = max(Path("v4-topk/data").glob("*.parquet"))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    assert begun("targets", "--on-bad set-aside").exit_code == 4
    assert version_of("targets") == 4
    bad.write_bytes(whole)
    assert begun("targets").exit_code == 0
    assert version_of("targets") == 3


def test_targets_that_an_older_release_finished_stay(begun: Callable[..., Any]) -> None:
    shutil.copytree(GOLDEN / "captures" / "v3-targets", "old")
    config = AlignConfig(captures=["v4-topk"], student="bytes", out="old", losses=["p-kl", "h-kl", "alm"])
    capture = read_manifest("v4-topk", CaptureManifest)
    record = align_settings(config, capture, build_w(load_tokenizer("bytes").table, load_vocab("v4-topk")))
    Path("old/align.json").write_text(json.dumps(record, indent=1) + "\n")
    before = {str(path): path.read_bytes() for path in Path("old").rglob("*") if path.is_file()}
    assert align(config, Silent()).schema_version == 3
    assert {str(path): path.read_bytes() for path in Path("old").rglob("*") if path.is_file()} == before


def test_steps_are_finished(begun: Callable[..., Any]) -> None:
    root = Path("run")
    record = json.loads((root / "run.json").read_text())
    assert begun("run", FREE["run"]).exit_code == 0
    assert json.loads((root / "run.json").read_text()) == record
    assert begun("run", out="fresh").exit_code == 0
    fresh = json.loads((Path("fresh") / "run.json").read_text())
    assert {name: fresh["identity"][name] for name in record["identity"]} == record["identity"]
    assert {name: fresh["config"][name] for name in record["config"]} == record["config"] | {"out": "fresh"}
    if fresh["identity"] == record["identity"]:  # no field is new since
        assert fresh["run_hash"] == record["run_hash"]
    metrics = [map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) for one in (root, Path("fresh"))]
    ours, theirs = ({line["step"]: line["loss"] for line in lines} for lines in metrics)
    assert list(ours) == list(range(1, record["config"]["steps"] + 1))
    assert ours == pytest.approx(theirs), "from the checkpoint on as from the beginning"


@pytest.mark.parametrize("name", RECORDS)
def test_another_run_is_refused(begun: Callable[..., Any], name: str) -> None:
    result = begun(name, OTHER[name])
    assert result.exit_code == 2
    assert "another" in result.output
    assert OTHER[name].split()[0][2:].replace("-", "_") in result.output
    assert not (Path(name) / FINISHED[name]).exists()


def test_targets_of_an_older_rule_are_another_run(begun: Callable[..., Any]) -> None:
    """Release 0.5.0 cut byte-prefix by the longest token that fits: none of its parts beside one of now."""
    words = ["align", "v4-topk", "--student", "bytes", "--for", "byte-prefix", "--out", "cut", "--quiet"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    record = json.loads(Path("cut/align.json").read_text())
    assert record.pop("revisions") == ["byte-prefix-1"]
    assert CliRunner().invoke(cli.app, [*words, "--config", "cut/align.json"]).exit_code == 0
    Path("cut/align.json").write_text(json.dumps(record))
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2
    assert "revisions: none there, byte-prefix-1 now" in result.output


def test_the_record_of_a_run_is_its_config_file(begun: Callable[..., Any]) -> None:
    result = CliRunner().invoke(cli.app, ["train", "--config", "run/run.json", "--quiet", "--warmup", "3"])
    assert "warmup=2 there, 3 now" in result.output


class Later(PrecomputeConfig):
    """A later release's, with a field that nobody thought of."""

    forgotten: int = Field(0, description="New.")


class LaterAlign(AlignConfig):
    """As ``Later``."""

    forgotten: int = Field(0, description="New.")


class LaterOptim(OptimGroup):
    """As ``Later``."""

    forgotten: int = Field(0, description="New.")


class LaterTrain(TrainConfig):
    """As ``Later``."""

    optim: LaterOptim


def test_a_field_that_came_later_to_align(begun: Callable[..., Any]) -> None:
    places = {"captures": "v4-topk", "student": "bytes", "out": "targets"}
    config = build(LaterAlign, read_settings("targets/align.json", LaterAlign) | places)
    with pytest.raises(XtokenError, match="forgotten: 0 there, 1 now"):
        run_captures(config.changed(forgotten=1), Silent())


def test_a_field_that_came_later_to_train(begun: Callable[..., Any]) -> None:
    config = build(LaterTrain, read_settings("run/run.json", LaterTrain))
    with pytest.raises(XtokenError, match="forgotten=0 there, 1 now"):
        train(config.changed(forgotten=1), load_tokenizer("bytes").table.info, [], Silent())


def test_a_field_that_came_later(begun: Callable[..., Any]) -> None:
    """A capture of 0.5.0 has its default; with another value it is another run, to the estimate, too."""
    words = commands()["capture"].split()[2:]
    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    config = build(Later, {"corpus": "corpus.jsonl", "out": "capture", **flags})
    tables = load_tokenizer("tiny").table, load_tokenizer("bytes").table
    check_settings(Folder("capture"), run_settings(config, *tables), Later)
    with pytest.raises(XtokenError, match="forgotten: 0 there, 1 now"):
        precompute(config.changed(forgotten=1), Silent())
    shutil.copy("capture/run.json", "settings.json")
    assert read_settings("settings.json", Later)["k"] == 8
