"""The folder of a run: what is taken for one, and what is done where a file of it is gone or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.lock import LOCK, only_trainer
from xtoken.trainer.loop import train
from xtoken.trainer.record import lacking
from xtoken.trainer.report.run_folder import read_run
from xtoken.trainer.run import refuse_foreign

INDEX = "model.safetensors.index.json"


@pytest.fixture
def configure(make_targets: Callable[..., str], student_dir: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    base = {"targets": [make_targets([[9, 12, 5]])], "student": student_dir, "out": str(tmp_path / "run")}
    sizes = {"steps": 2, "step_tokens": 24, "micro_tokens": 14, "max_tokens": 32, "device": "cpu"}
    return lambda **options: TrainConfig.from_flat(**{**base, **sizes, **options})


@pytest.fixture
def finished(configure: Callable[..., TrainConfig], student_info: Any) -> tuple[Path, Callable[[], dict[str, Any]]]:
    """A finished run, and its command once more."""
    config = configure()
    train(config, student_info, [], Silent())
    return Path(config.out), lambda: train(config, student_info, [], Silent())


CAPTURE = {"tokenizer_hash": "a", "teacher": "t"}


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"run.json": CAPTURE}, "is a capture"),
        ({"run.json": CAPTURE, "plan.json": {}, "status.json": {}}, "is a capture"),
        ({"run.json": [], "plan.json": {}}, "is a capture"),
        ({"align.json": {}, "w.parquet": {}, "manifest.json": {}}, "is a folder of targets"),
        ({"w.parquet": {}, "manifest.json": {}}, "is a projection"),
        ({"config.json": {}, "model.safetensors": {}}, "is a model"),
        ({"run.json": {"identity": {}}}, "exists and is not a training run"),
        ({"notes.txt": {}}, "exists and is not a training run"),
    ],
)
def test_other_folders_are_refused_by_name_and_left_as_they_are(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, files: dict[str, Any], what: str
) -> None:
    root = tmp_path / "cu"
    root.mkdir()
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    with pytest.raises(XtokenError, match=f"cu {what}; use another --out"):
        train(configure(out=str(root)), student_info, [], Silent())
    assert {path.name: json.loads(path.read_text()) for path in root.iterdir()} == files
    with pytest.raises(XtokenError, match=r"is not a training run|run\.json is \[\], not an object"):
        read_run(str(root))


def test_what_another_trainer_has_only_begun_is_its_own(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path
) -> None:
    config = configure()
    with only_trainer(Path(config.out)):
        (Path(config.out) / "half").touch()
        with pytest.raises(XtokenError, match="run is being trained in by process"):
            train(config, student_info, [], Silent())
    with pytest.raises(XtokenError, match="exists and is not a training run"):
        train(config, student_info, [], Silent())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LOCK).write_text("theirs")
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(XtokenError, match="exists and is not a training run"):
        train(configure(out=str(tmp_path / "mine")), student_info, [], Silent())
    assert (tmp_path / "mine" / LOCK).read_text() == "theirs"


def test_what_a_kill_at_once_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / ".run.json.tmp").write_text("{")
    refuse_foreign(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", None])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_model_that_is_gone_is_written_again(
    finished: tuple[Path, Callable[[], dict[str, Any]]], name: str | None, how: str
) -> None:
    root, again = finished
    files = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    for path in [root / "model" / name] if name is not None else list((root / "model").iterdir()):
        path.write_bytes(b"") if how == "empty" else path.unlink()
    summary = json.loads((root / "summary.json").read_text())
    assert again() == summary
    assert {path.name: path.read_bytes() for path in (root / "model").iterdir()} == files
    (root / "model" / (name or "config.json")).unlink()
    shutil.rmtree(root / "checkpoints")
    with pytest.raises(XtokenError, match=f"model/{name or 'config.json'} is missing or empty and no checkpoint"):
        again()


def test_shards_of_a_model_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert lacking(tmp_path) == "model.safetensors"
    (tmp_path / INDEX).write_text("[]")
    assert lacking(tmp_path) == "model.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one", "b": "two", "c": "two"}}))
    (tmp_path / "one").write_text("weights")
    assert lacking(tmp_path) == "two"
    (tmp_path / "two").touch()
    assert lacking(tmp_path) == "two"
    (tmp_path / "two").write_text("weights")
    assert lacking(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]\n", '""\n', "{}\n", "{", "\xff"])
def test_damaged_records_are_named_with_the_least_costly_way_out(
    finished: tuple[Path, Callable[[], dict[str, Any]]],
    configure: Callable[..., TrainConfig],
    student_info: Any,
    tmp_path: Path,
    text: str,
) -> None:
    """And the way out is one."""
    root, again = finished
    summary = json.loads((root / "summary.json").read_text())
    (root / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(XtokenError, match=r"run/summary\.json is damaged.*; remove it and run the same command again"):
        again()
    (root / "summary.json").unlink()
    assert again() == summary
    (root / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(XtokenError, match=r"run/run\.json is damaged.*; put a copy of it there"):
        again()
    train(configure(out=str(tmp_path / "other")), student_info, [], Silent())
    shutil.copy(tmp_path / "other" / "run.json", root)
    assert again() == summary


@pytest.mark.parametrize("text", ["[]", '""', "{}", "null", "{", "\xff"])
def test_a_line_that_no_run_writes_is_named(
    finished: tuple[Path, Callable[[], dict[str, Any]]], configure: Callable[..., TrainConfig], text: str
) -> None:
    root, again = finished
    (root / "summary.json").unlink()
    lines = (root / "metrics.jsonl").read_bytes()
    (root / "metrics.jsonl").write_bytes(lines + text.encode("latin-1") + b"\n")
    with pytest.raises(XtokenError, match=r"metrics\.jsonl, line 3 is .*; remove that line and run the same command"):
        again()
    (root / "metrics.jsonl").write_bytes(lines)
    assert again()["steps"] == 2


def test_a_damaged_record_of_a_run_that_did_not_begin_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with pytest.raises(XtokenError, match=r"run\.json is damaged.*; remove it and run the same command again"):
        refuse_foreign(str(tmp_path))
