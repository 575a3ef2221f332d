"""The local executor with workers that fail, die and hang."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xtoken.pipeline.capture import LocalExecutor
from xtoken.pipeline.store.files import DiskFull
from xtoken.schemas.errors import XtokenError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]


@pytest.fixture
def jobs(monkeypatch):
    """The module of toy jobs under a name that worker processes find too."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("executor_jobs")


def run(job, workers=2, shards=range(6), lease_seconds=60.0, watch=None):
    watch = watch or sys.modules["executor_jobs"].Watching()
    failed = LocalExecutor(workers, lease_seconds).run(job, shards, watch)
    assert {(part.index, part.index + 100) for part in watch.parts} <= set(watch.messages)
    return watch.parts, failed


def notes(folder: Path, prefix: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))


def test_every_shard_runs_once(jobs, tmp_path):
    parts, failed = run(jobs.ToyJob(str(tmp_path)))
    assert sorted(part.index for part in parts) == list(range(6))
    assert failed == {}
    assert notes(tmp_path, "run-") == [f"run-{shard}-1" for shard in range(6)]
    assert 1 <= len(notes(tmp_path, "open-")) <= 2, "the last to load may come too late"


def test_no_more_workers_than_shards_and_nothing_for_none(jobs, tmp_path):
    run(jobs.ToyJob(str(tmp_path)), workers=4, shards=[5])
    assert len(notes(tmp_path, "open-")) == 1
    assert run(jobs.ToyJob(str(tmp_path)), shards=[]) == ([], {})


def test_a_poison_shard_is_quarantined_after_three_attempts_and_the_others_go_on(jobs, tmp_path):
    parts, failed = run(jobs.ToyJob(str(tmp_path), {2: "poison", 3: "bad input"}))
    assert sorted(part.index for part in parts) == [0, 1, 4, 5]
    assert sorted(failed) == [2, 3]
    assert failed[2].endswith("ValueError: it tastes bad")
    assert failed[3] == "document 'd' is bad; mend it"
    assert notes(tmp_path, "run-2") == ["run-2-1", "run-2-2", "run-2-3"]


def test_a_killed_worker_is_replaced_and_its_shard_leased_again(jobs, tmp_path):
    parts, failed = run(jobs.ToyJob(str(tmp_path), {1: "die once"}), workers=1)
    assert sorted(part.index for part in parts) == list(range(6))
    assert failed == {}
    assert notes(tmp_path, "run-1") == ["run-1-1", "run-1-2"]
    assert len(notes(tmp_path, "open-")) == 2


def test_a_shard_that_kills_its_worker_is_quarantined(jobs, tmp_path):
    parts, failed = run(jobs.ToyJob(str(tmp_path), {0: "die"}), workers=1, shards=[0, 1])
    assert [part.index for part in parts] == [1]
    assert list(failed) == [0]
    assert "died (signal 9, the system may have run out of memory)" in failed[0]


def test_a_job_that_cannot_be_opened_ends_the_run_at_once(jobs, tmp_path):
    with pytest.raises(XtokenError, match="no such model"):
        run(jobs.ToyJob(str(tmp_path), opening="bad model"), workers=1)
    assert len(notes(tmp_path, "open-")) == 1


def test_a_worker_that_cannot_open_ends_no_run_that_others_can_do(jobs, tmp_path):
    watch = jobs.Watching(str(tmp_path))
    job = jobs.ToyJob(str(tmp_path), {0: "wait 3"}, opening="bad slot 1")
    parts, failed = run(job, workers=2, shards=range(4), lease_seconds=600.0, watch=watch)
    assert sorted(part.index for part in parts) == list(range(4))
    assert failed == {}
    assert len(notes(tmp_path, "refused-")) == 3
    died = [event.error for event in watch.events if event.kind == "died"]
    assert len(died) == 3
    assert all("cannot open: GPU 1 is taken" in error for error in died)
    assert died[-1].endswith("(3 times in a row: the run goes on without worker 1)")


def test_a_job_that_nobody_can_open_is_opened_once_by_each(jobs, tmp_path):
    with pytest.raises(XtokenError, match=r"^no such model$"):
        run(jobs.ToyJob(str(tmp_path), opening="bad model"), workers=3)
    assert len(notes(tmp_path, "slot-")) <= 3


def test_a_defect_on_open_keeps_its_traceback(jobs, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ValueError: a defect"):
        run(jobs.ToyJob(str(tmp_path), opening="defect"), workers=1)


def test_a_worker_that_dies_while_loading_is_tried_three_times(jobs, tmp_path):
    with pytest.raises(XtokenError, match="while loading, 3 times in a row"):
        run(jobs.ToyJob(str(tmp_path), opening="die"), workers=1)
    assert len(notes(tmp_path, "open-")) == 3


def test_a_full_disk_stops_the_run_at_once(jobs, tmp_path):
    with pytest.raises(DiskFull, match="no room"):
        run(jobs.ToyJob(str(tmp_path), {1: "full"}), workers=1)
    assert notes(tmp_path, "run-") == ["run-0-1", "run-1-1"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_workers_end_with_their_driver(tmp_path, number, code):
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
    command = [sys.executable, str(HERE / "executor_jobs.py"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        wait_until(lambda: len(notes(tmp_path, "run-")) == 2)
        workers = [int(name.removeprefix("open-")) for name in notes(tmp_path, "open-")]
        assert all(alive(worker) for worker in workers)
        driver.send_signal(number)
        assert driver.wait(120) == code
    wait_until(lambda: not any(alive(worker) for worker in workers))


def wait_until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen within 120 s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.thorough
def test_a_worker_that_stalls_loses_its_shard_and_may_still_finish(jobs, tmp_path):
    watch = jobs.Watching()
    parts, failed = run(jobs.ToyJob(str(tmp_path), {1: "stall once"}), lease_seconds=3.0, watch=watch)
    assert failed == {}
    assert sorted(part.index for part in parts) == list(range(6)), "one part of a shard counts"
    assert notes(tmp_path, "run-1") == ["run-1-1", "run-1-2"]
    assert "overdue" in watch.kinds()


@pytest.mark.thorough
def test_a_worker_that_never_gets_on_is_replaced(jobs, tmp_path):
    parts, failed = run(jobs.ToyJob(str(tmp_path), {1: "slow"}), workers=1, shards=[0, 1], lease_seconds=1.0)
    assert [part.index for part in parts] == [0]
    assert "no progress for 1 s" in failed[1]
    assert notes(tmp_path, "run-1") == ["run-1-1", "run-1-2", "run-1-3"]


def test_every_worker_has_a_slot_and_its_heir_keeps_it(jobs, tmp_path):
    watch = jobs.Watching(str(tmp_path))
    # the other worker stays until then: once all else is done it would have left its slot to the heir
    run(jobs.ToyJob(str(tmp_path), {0: "die once", 1: "wait 1"}), workers=2, watch=watch)
    started = [event.worker for event in watch.events if event.kind == "starting"]
    (died,) = [event.worker for event in watch.events if event.kind == "died"]
    assert started == [0, 1, died]
