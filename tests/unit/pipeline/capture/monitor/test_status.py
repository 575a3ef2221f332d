"""xtoken status: what it says of captures that run, ended, died, or were made by several drivers."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.monitor.status import duration, goes_on, status
from xtoken.pipeline.store.publish import committed
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.status import RunStatus, WorkerStatus, suffixed
from xtoken.schemas.ui.progress import Silent

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished capture of six shards, without a status."""
    folder = tmp_path_factory.mktemp("finished")
    text = "".join(json.dumps({"text": f"document {number}: " + "some words " * 30}) + "\n" for number in range(12))
    (folder / "corpus.jsonl").write_text(text)
    flags = {"corpus": str(folder / "corpus.jsonl"), "teacher": "bytes", "backend": "fake", "k": 4}
    precompute(PrecomputeConfig.from_flat(**flags, out=str(folder / "out"), shard_bytes=500), Silent())
    for path in (folder / "out").glob("status*.json"):
        path.unlink()
    return folder / "out"


@pytest.fixture
def capture(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def write(out: Path, cell: str | None = None, ago: float = 1.0, **changes) -> RunStatus:
    """The status of a driver that was written some seconds ago."""
    worker = WorkerStatus(slot=3, place="node-1", shard=5, state="working", tokens_per_s=70.5, since=NOW)
    known = {
        "xtoken_version": "1.0",
        "phase": "running",
        "host": "box",
        "pid": 77,
        "began": NOW - timedelta(hours=1),
        "updated": NOW - timedelta(seconds=ago),
        "seconds": 3600.0,
        "shards": 6,
        "shards_done": 2,
        "shards_in_flight": 1,
        "text_bytes": 4000,
        "text_bytes_done": 1000,
        "tokens": 1234,
        "tokens_per_s": 100.0,
        "tokens_per_s_mean": 90.0,
        "seconds_left": 5000.0,
        "worker_seconds": 7200.0,
        "failures": {"failed": 2},
        "workers": [worker],
    }
    found = RunStatus(**(known | {"cell": cell} | changes))
    (out / suffixed("status", "json", cell)).write_text(found.model_dump_json())
    return found


def unfinish(out: Path, keep: int) -> None:
    """Take the capture back to where only some shards are committed."""
    (out / "manifest.json").unlink()
    for path in sorted((out / "commits").iterdir())[keep:]:
        path.unlink()


def test_a_finished_capture(capture):
    found = status(str(capture), NOW)
    manifest = read_manifest(str(capture), CaptureManifest)
    assert found["phase"] == "done"
    assert found["says"].startswith("complete")
    assert found["shards"] == found["shards_done"] == len(manifest.parts) == 6
    assert found["tokens"] == sum(part.tokens for part in manifest.parts)
    assert found["share_done"] == 1.0
    assert not goes_on(found)


def test_a_run_at_work(capture):
    unfinish(capture, 3)
    write(capture)
    found = status(str(capture), NOW)
    assert (found["phase"], found["says"]) == ("running", "at work")
    assert (found["shards_done"], found["shards_in_flight"], found["tokens"]) == (3, 1, 1234)
    assert (found["tokens_per_s"], found["seconds_left"], found["time_left"]) == (100.0, 5000.0, "1 h 23 min")
    assert (found["worker_hours"], found["failures"]) == (2.0, {"failed": 2})
    assert found["workers"] == [
        {"worker": 3, "place": "node-1", "state": "working", "shard": 5, "tokens_per_s": 70.5, "for_s": 0}
    ]
    assert found["drivers"][0]["shards"] == "2/6"
    assert goes_on(found)


def test_a_driver_that_is_not_heard_of(capture):
    unfinish(capture, 3)
    write(capture, ago=93)
    found = status(str(capture), NOW)
    assert found["phase"] == "silent"
    assert found["says"] == (
        "the driver of 77 on box has not written for 93 s: it has ended or hangs; the same command resumes"
    )
    assert found["workers"] == []
    assert "tokens_per_s" not in found
    # the status is of two shards, and three are committed: the records know
    assert found["tokens"] == sum(part.tokens for part in committed(str(capture)).values())


def test_a_silent_driver_of_a_capture_that_is_complete_is_nobodys_worry(capture):
    write(capture, ago=93)
    assert status(str(capture), NOW)["phase"] == "done"


@pytest.mark.parametrize("phase", ["failed", "interrupted"])
def test_a_run_that_ended_early_says_why(capture, phase):
    unfinish(capture, 3)
    write(capture, phase=phase, error="no room\nat all", set_aside={5: "bad", 0: "old"}, ago=4000)
    found = status(str(capture), NOW)
    assert found["phase"] == phase
    assert found["says"] == f"the driver of 77 on box ended ({phase}: no room); the same command resumes"
    assert found["set_aside"] == [{"shard": 5, "error": "bad"}], "shard 0 was committed after all"


def test_cells_are_added_up_and_a_lone_silent_one_is_named(capture):
    unfinish(capture, 3)
    write(capture, "1/2", tokens=100)
    write(capture, "2/2", tokens=20, ago=50, pid=88)
    write(capture, ago=5000, tokens=10**6)
    found = status(str(capture), NOW)
    assert (found["phase"], found["tokens"]) == ("running", 120)
    assert [row["cell"] for row in found["drivers"]] == ["1/2", "2/2"]
    assert found["says"].startswith("the driver of 88 on box has not written for 50 s")
    assert {row["cell"] for row in found["workers"]} == {"1/2"}


def test_cells_that_are_done_wait_for_the_seal(capture):
    (capture / "manifest.json").unlink()
    for cell in ("1/2", "2/2"):
        write(capture, cell, phase="done", ago=50)
    found = status(str(capture), NOW)
    assert found["phase"] == "unsealed"
    assert found["worker_hours"] == 4.0
    assert found["says"] == "every shard is committed; the same command, without --cell, writes the manifest"


def test_one_cell_done_and_shards_left(capture):
    unfinish(capture, 3)
    write(capture, "1/2", phase="done", ago=50)
    found = status(str(capture), NOW)
    assert found["phase"] == "incomplete"
    assert found["says"] == "shards are left and no driver is at work; the same command resumes"


def test_before_there_is_a_plan(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    found = status(str(tmp_path), NOW)
    assert (found["phase"], found["shards"], found["tokens"]) == ("planning", None, 0)
    assert "it is planning, or ended" in found["says"]


def test_a_run_without_status_is_read_from_its_records(capture):
    unfinish(capture, 2)
    found = status(str(capture), NOW)
    assert found["phase"] == "incomplete"
    assert found["tokens"] == sum(part.tokens for part in committed(str(capture)).values()) > 0
    assert 0 < found["share_done"] < 1


def test_no_run_there(tmp_path, capture):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(XtokenError, match=r"holds no capture; name the --out"):
            status(str(path))
    with pytest.raises(XtokenError, match="the folders out below it do"):
        status(str(capture.parent))


def test_a_damaged_status_is_named(capture):
    (capture / "status.json").write_text('{"phase": 1}')
    with pytest.raises(XtokenError, match=r"status\.json is not a status of a capture"):
        status(str(capture))


def test_the_command_line(capture):
    result = CliRunner().invoke(cli.app, ["status", str(capture), "--json"])
    assert json.loads(result.stdout)["phase"] == "done"
    plain = CliRunner().invoke(cli.app, ["status", str(capture), "--watch", "0.01"])
    assert plain.exit_code == 0
    assert "complete" in plain.stdout
    missing = CliRunner().invoke(cli.app, ["status", str(capture / "data")])
    assert missing.exit_code == 2
    assert "holds no capture" in " ".join(missing.stderr.split())


def test_watching_ends_with_the_run(capture, monkeypatch):
    unfinish(capture, 3)
    write(capture, updated=datetime.now(UTC))

    def later(seconds):
        assert seconds == 7
        write(capture, updated=datetime.now(UTC), phase="interrupted")

    monkeypatch.setattr("time.sleep", later)
    result = CliRunner().invoke(cli.app, ["status", str(capture), "--watch", "7", "--json"])
    assert [json.loads(line)["phase"] for line in result.stdout.splitlines()] == ["running", "interrupted"]


def test_a_terminal_is_shown_the_first_rows_only(capture):
    unfinish(capture, 3)
    rows = [WorkerStatus(slot=slot, state="idle", since=NOW) for slot in range(1000)]
    write(capture, updated=datetime.now(UTC), workers=rows)
    result = CliRunner().invoke(cli.app, ["status", str(capture)])
    assert "workers: 960 more, which --json has" in result.stdout
    found = json.loads(CliRunner().invoke(cli.app, ["status", str(capture), "--json"]).stdout)
    assert len(found["workers"]) == 1000


@pytest.mark.parametrize(
    ("seconds", "said"), [(45.4, "45 s"), (61, "1 min"), (5000, "1 h 23 min"), (200_000, "2 d 7 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
