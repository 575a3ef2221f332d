"""TensorBoard's and W&B's own files, read back."""

import logging
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.trackers import Trackers, flat, require_trackers


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def points(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(root: Path) -> Iterator[Any]:
    """Records of W&B's transaction logs in order: blocks of 32 KiB of pieces with a header of 7 bytes.

    The folders are named by the second of their start; a second start in the same one gets a suffix and sorts behind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        data, place, piece = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := -place % 32768) < 7 and left:
                place += left
                continue
            size, kind = struct.unpack_from("<HB", data, place + 4)
            piece += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                yield Record.FromString(piece)
                piece = b""


def history(root: Path) -> list[dict[str, float]]:
    found = []
    for record in records(root):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def test_nested_figures_are_named_by_their_path() -> None:
    line = {
        "step": 3,
        "eval": {"by_source": {"x": {"bpb": 1}}, "when": "after"},
        "kd": [0.5, 2],
        "on": True,
        "no": None,
    }
    assert dict(flat(line)) == {"step": 3.0, "eval/by_source/x/bpb": 1.0, "kd/0": 0.5, "kd/1": 2.0}


def test_tensorboard_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    """Killed after step 6 (never closed), resumed from the checkpoint of step 3."""
    first = Trackers(tmp_path, True, None, "run", {}, 0)
    for step in range(1, 7):
        first.log(step, {"train": {"loss": float(step)}})
    assert len(points(tmp_path)["train/loss"]) == 6, "on disk without being closed"
    second = Trackers(tmp_path, True, None, "run", {}, 3)
    for step in (4, 5):
        second.log(step, {"train": {"loss": 10.0 + step}, "eval": {"bits_per_byte": 2.0}})
    second.close()
    found = points(tmp_path)
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0)]
    assert found["eval/bits_per_byte"] == [(4, 2.0), (5, 2.0)]


@pytest.mark.parametrize("writers", [0, 9, 99])
def test_tensorboard_follows_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int) -> None:
    """One start that goes back from step 4 to 2, by a process that has made so many writers."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(writers))
    trackers = Trackers(tmp_path, True, None, "run", {}, 0)
    for step, loss in ((1, 1), (2, 2), (3, 3), (4, 99), (2, 12), (3, 13)):
        trackers.log(step, {"loss": float(loss)})
    trackers.close()
    assert points(tmp_path)["loss"] == [(1, 1.0), (2, 12.0), (3, 13.0)]


@pytest.mark.usefixtures("_offline")
def test_wandb_goes_on_as_the_same_run(tmp_path: Path) -> None:
    """Two starts, one id; steps that go back are kept, since the axis is ours."""
    for resumed, steps in ((0, (1, 2)), (1, (2, 3))):
        trackers = Trackers(tmp_path, False, "project", "name", {"lr": 0.5}, resumed)
        for step in steps:
            trackers.log(step, {"train": {"loss": step / 2}})
        trackers.close()
    assert [(line["step"], line["train/loss"]) for line in history(tmp_path)] == [(1, 0.5), (2, 1), (2, 1), (3, 1.5)]
    runs = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    ids = {run.run_id for run in runs}
    assert ids == {(tmp_path / "wandb-id").read_text().strip()}
    assert {(run.project, run.display_name) for run in runs} == {("project", "name")}
    assert any(item.key == "lr" and item.value_json == "0.5" for run in runs for item in run.config.update)
    axes = {
        (r.metric.name or r.metric.glob_name, r.metric.step_metric) for r in records(tmp_path) if r.HasField("metric")
    }
    assert ("*", "step") in axes


@pytest.mark.usefixtures("_offline")
def test_a_kill_costs_wandb_a_second_of_lines_at_most(tmp_path: Path) -> None:
    """W&B's own default is 15 s; what is on disk then is what 'wandb sync' sends after a kill."""
    trackers = Trackers(tmp_path, False, "project", "name", {}, 0)
    trackers.log(1, {"loss": 1.0})
    (tracker,) = trackers._open
    assert tracker._run.settings.x_transaction_log_flush_interval <= 1  # type: ignore[attr-defined]
    give_up = time.monotonic() + 120
    while not any(b"loss" in path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < give_up, "nothing is on disk before close"
        time.sleep(0.05)
    trackers.close()


@pytest.mark.usefixtures("_offline")
def test_a_run_of_the_callers_own_goes_on(tmp_path: Path) -> None:
    import wandb

    own = wandb.init(project="own", dir=str(tmp_path / "own"), settings=wandb.Settings(silent=True, console="off"))
    try:
        trackers = Trackers(tmp_path, False, "project", "name", {}, 0)
        trackers.log(1, {"loss": 1.0})
        trackers.close()
        own.log({"mine": 2.0})
    finally:
        own.finish()
        wandb.teardown()
    assert [line["mine"] for line in history(tmp_path / "own")] == [2.0]
    assert [line["loss"] for line in history(tmp_path)] == [1.0]


def test_no_network_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses connections: the run goes on, and what it logs lies ready for 'wandb sync'."""
    fake = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"}
    for name, value in (fake | {"WANDB_MODE": "online", "HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    import wandb

    wandb.teardown()  # the service of another test read its settings before
    with caplog.at_level(logging.WARNING, "xtoken"):
        trackers = Trackers(tmp_path, False, "project", "name", {}, 0)
    assert "W&B cannot be reached" in caplog.text
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    wandb.teardown()
    assert [line["loss"] for line in history(tmp_path)] == [1.0]


class Broken:
    """A service that is down."""

    name = "Broken"

    def log(self, *_: Any) -> None:
        raise ConnectionError("down")

    def close(self) -> None:
        raise ConnectionError("down")


def test_a_failing_service_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers(tmp_path, True, None, "run", {}, 0)
    trackers._open.insert(0, Broken())
    with caplog.at_level(logging.WARNING, "xtoken"):
        for step in (1, 2):
            trackers.log(step, {"loss": 1.0})
        trackers.close()
    assert caplog.text.count("Broken fails") == 1
    assert len(points(tmp_path)["loss"]) == 2, "the others go on"


def config(**options: Any) -> TrainConfig:
    return TrainConfig.from_flat(targets=["t"], student="s", out="o", **options)


@pytest.mark.parametrize(
    ("options", "package"), [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "project"}, "wandb")]
)
def test_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], package: str) -> None:
    require_trackers(config().report)
    monkeypatch.setitem(sys.modules, package, None)
    require_trackers(config().report)
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[tracking\]'"):
        require_trackers(config(**options).report)


def test_being_logged_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    with pytest.raises(XtokenError, match="run 'wandb login'"):
        require_trackers(config(wandb="project").report)
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(config(wandb="project").report)
    wandb.teardown()
