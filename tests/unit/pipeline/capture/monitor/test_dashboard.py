"""The board: what it counts from events, what it writes, and that nothing it writes can end a run."""

import importlib
import json
import threading
import time
import uuid
from pathlib import Path

import pytest

from xtoken.pipeline.capture import LocalExecutor
from xtoken.pipeline.capture.monitor.dashboard import Dashboard, run_figures
from xtoken.pipeline.capture.monitor.rate import Rate
from xtoken.pipeline.capture.monitor.status import read_status
from xtoken.pipeline.capture.plan import Plan, Shard
from xtoken.pipeline.executors.protocol import Event
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CorpusInfo, Part, TeacherInfo

SIZE = 1000  # bytes of text of a shard
EXECUTORS = Path(__file__).resolve().parents[2] / "executors"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.done, self.figures = 0, {}

    def start(self, label, total, unit, done=0):
        pass

    def note(self, text: str) -> None: ...

    def advance(self, amount, **figures):
        self.done, self.figures = self.done + amount, figures

    def finish(self):
        pass


def plan_of(shards: int) -> Plan:
    info = CorpusInfo(source="c", hash="h", documents=shards, text_bytes=SIZE * shards)
    found = [Shard(index=i, file=0, record=i, documents=1, text_bytes=SIZE, sha256="") for i in range(shards)]
    return Plan(corpus=info, files=[("c", 1)], shard_bytes=SIZE, shards=found)


def part_of(index: int, tokens: int = 250) -> Part:
    return Part(
        index=index, samples=1, tokens=tokens, rows=tokens, entries=1, text_bytes=SIZE, file_bytes=9, sha256="0" * 64
    )


class Stage:
    """A board with all that it needs."""

    def __init__(self, out, shards=4, done=(), **flags) -> None:
        self.clock, self.progress = Clock(), Told()
        self.config = PrecomputeConfig.from_flat(corpus="c", teacher="bytes", backend="fake", out=str(out), **flags)
        out.mkdir(exist_ok=True)
        self.folder = Folder(str(out))
        parts = {index: part_of(index) for index in done}
        run, teacher = self.config.run, self.config.teacher
        self.dashboard = Dashboard(self.folder, plan_of(shards), run, teacher, parts, self.progress, self.clock)

    def see(self, *events: Event, seconds: float = 0.0) -> None:
        for event in events:
            self.dashboard.see(event)
        self.clock.now += seconds

    def open(self, worker: int = 0) -> None:
        self.see(Event("starting", worker), Event("opened", worker, place="here"))

    def run(self, shard: int, seconds: float, worker: int = 0) -> None:
        self.see(Event("leased", worker, shard, 1), Event("begun", worker, shard), seconds=seconds / 2)
        self.see(Event("progress", worker, shard, done=SIZE // 2), seconds=seconds / 2)
        self.see(Event("part", worker, shard, part=part_of(shard)))


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "out")


def lines(out: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_a_run_in_figures(stage, tmp_path):
    stage.open()
    stage.run(0, 10)
    stage.run(1, 10)
    stage.dashboard.tick()
    found = stage.dashboard.status()
    assert (found.shards, found.shards_done, found.shards_in_flight, found.tokens) == (4, 2, 0, 500)
    # 2,000 bytes in 20 s, and a token is 4 bytes
    assert found.tokens_per_s == found.tokens_per_s_mean == 25.0
    assert found.seconds_left == 20.0
    assert (found.worker_seconds, found.gpu_seconds) == (20.0, 0.0)
    assert stage.progress.figures == {"shards": "2/4", "tok/s": 25.0, "workers": 1}
    assert stage.progress.done == 2000
    stage.see(Event("released", 0), seconds=5)
    stage.dashboard.close("done")
    written = read_status(str(tmp_path / "out"))
    assert (written.phase, written.worker_seconds, written.seconds, written.workers) == ("done", 20.0, 25.0, [])
    assert run_figures(written) == {"seconds": 25.0, "worker_hours": round(20 / 3600, 4), "went_wrong": {}}


def test_an_attempt_that_starts_anew_moves_nothing(stage):
    stage.open()
    stage.see(Event("leased", 0, 2, 1), Event("progress", 0, 2, done=600), Event("failed", 0, 2, 1, error="no"))
    stage.see(Event("leased", 0, 2, 2), Event("progress", 0, 2, done=400))
    stage.dashboard.tick()
    assert stage.progress.done == 600
    stage.see(Event("progress", 0, 2, done=5000))
    stage.dashboard.tick()
    assert stage.progress.done == SIZE, "a worker cannot do more than there is"
    stage.see(Event("part", 0, 2, part=part_of(2)), Event("late", 0, 2, part=part_of(2)))
    assert stage.progress.done == SIZE
    assert stage.dashboard.status().tokens == 250


def test_what_earlier_runs_committed_is_done_and_makes_no_speed(tmp_path):
    stage = Stage(tmp_path / "out", shards=4, done=[0, 1])
    stage.open()
    stage.clock.now += 10
    found = stage.dashboard.status()
    assert (found.shards_done, found.tokens, found.tokens_per_s, found.seconds_left) == (2, 500, 0.0, None)
    assert (stage.dashboard.text_bytes, stage.dashboard.text_bytes_done) == (4000, 2000)


def test_failures_by_kind_restarts_losses_and_outages(stage):
    stage.open(0)
    stage.open(1)
    stage.see(Event("leased", 0, 0, 1), Event("failed", 0, 0, 1, error="first"), Event("died", 0, error="signal 9"))
    stage.open(0)
    stage.see(Event("lost", 1, error="node gone"), Event("outage", error="503"), Event("overdue", 0, error="slow"))
    stage.see(Event("set_aside", 0, 3, error="Traceback (most recent call last):\n" + "x" * 9000))
    found = stage.dashboard.status()
    assert found.failures == {"failed": 1, "died": 1, "overdue": 1}
    assert (found.restarts, found.lost_machines, found.outages, found.shards_set_aside) == (1, 1, 1, 1)
    assert found.last_failure == "slow"
    assert found.set_aside[3] == "x" * 300, "of a traceback the last line, of that a part"
    assert [(row.slot, row.state) for row in found.workers] == [(0, "overdue"), (1, "lost")]
    stage.dashboard.tick()
    assert stage.progress.figures["failures"] == 4
    assert stage.progress.figures["workers"] == 1
    stage.see(Event("part", 0, 3, part=part_of(3)))
    assert stage.dashboard.status().shards_set_aside == 0, "a late worker had it after all"


def test_workers_say_what_they_do_and_how_fast(stage):
    stage.see(Event("starting", 0))
    assert stage.dashboard.status().workers[0].state == "starting"
    stage.open(1)
    assert stage.dashboard.status().workers[1].state == "idle"
    stage.run(0, 10, worker=1)
    stage.see(Event("leased", 1, 1, 1), Event("leased", 1, 2, 1), Event("begun", 1, 1), Event("begun", 1, 2))
    row = stage.dashboard.status().workers[1]
    assert (row.state, row.shard, row.place, row.tokens_per_s) == ("working", 1, "here", 25.0)
    assert stage.dashboard.status().shards_in_flight == 2
    stage.see(Event("progress", 1, 2, done=10))
    assert stage.dashboard.status().workers[1].shard == 2


def test_gpu_time_is_that_of_open_engines_times_their_gpus(tmp_path):
    stage = Stage(tmp_path / "out", ray="auto", gpus_per_worker=0.5)
    info = {"model": "m", "backend": "hf", "vocab_rows": 9, "context": 9, "dtype": "bf16", "head_dtype": "bf16"}
    info |= {"device": "NVIDIA H100", "capture_path": "p", "engine_version": "1"}
    stage.folder.create("teacher.json", TeacherInfo(**info).model_dump_json().encode())
    stage.open()
    stage.clock.now += 3600
    figures = stage.dashboard.figures()
    assert figures["gpu_hours"] == 0.5
    assert "worker_hours" not in figures


def test_of_a_cell_only_its_shards_count(tmp_path):
    stage = Stage(tmp_path / "out", shards=5, done=[0, 1], cell="2/2")
    found = stage.dashboard.status()
    assert (found.cell, found.shards, found.shards_done, found.tokens) == ("2/2", 2, 1, 250)
    stage.dashboard.close("done")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"status-2-of-2.json", "log-2-of-2.jsonl"}
    assert read_status(str(tmp_path / "out")) is None
    assert read_status(str(tmp_path / "out"), "2/2") is not None


def test_the_status_is_written_every_five_seconds(stage, tmp_path):
    stage.dashboard.tick()
    stage.dashboard._status_file.wait()
    first = read_status(str(tmp_path / "out"))
    assert first.phase == "running"
    stage.clock.now += 4
    stage.dashboard.tick()
    stage.dashboard._status_file.wait()
    assert read_status(str(tmp_path / "out")) == first
    stage.clock.now += 1
    stage.dashboard.tick()
    stage.dashboard._status_file.wait()
    assert read_status(str(tmp_path / "out")).seconds == 5.0
    stage.dashboard.enter("sealing")
    stage.dashboard._status_file.wait()
    assert read_status(str(tmp_path / "out")).phase == "sealing"


def test_a_driver_that_seals_for_long_is_heard_of(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.capture.monitor.dashboard._EVERY", 0.02)
    out = str(tmp_path / "out")
    stage.dashboard.enter("sealing")
    stage.dashboard._status_file.wait()
    first, until = read_status(out), time.monotonic() + 120
    while (later := read_status(out)).updated == first.updated and time.monotonic() < until:
        time.sleep(0.01)
    assert later.updated > first.updated
    assert later.phase == "sealing"
    stage.dashboard.close("done")
    assert read_status(out).phase == "done"


@pytest.mark.parametrize("error", [XtokenError("503"), OSError(28, "No space left on device")])
def test_storage_that_refuses_the_status_ends_nothing(stage, tmp_path, monkeypatch, error):
    refused = []

    def refuse(folder, name, data):
        refused.append(name)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", refuse)
        stage.dashboard.tick()
        stage.dashboard._status_file.wait()
    assert refused == ["status.json"]
    assert not (tmp_path / "out" / "status.json").exists()
    stage.dashboard.close("done")
    assert read_status(str(tmp_path / "out")).phase == "done"


def test_storage_that_hangs_holds_nothing_up(stage, tmp_path, monkeypatch):
    answer, asked = threading.Event(), []
    replace = Folder.replace

    def hang(folder, name, data):
        asked.append(name)
        assert answer.wait(120)
        replace(folder, name, data)

    monkeypatch.setattr(Folder, "replace", hang)
    for _ in range(3):
        stage.dashboard.tick()
        stage.clock.now += 10
    assert asked == ["status.json"], "one at a time"
    answer.set()
    stage.dashboard.close("done")
    assert read_status(str(tmp_path / "out")).phase == "done"


@pytest.mark.parametrize(
    ("error", "phase"),
    [
        (None, "done"),
        (XtokenError("bad"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "interrupted"),
    ],
)
def test_the_outcome_is_told_by_the_error(stage, tmp_path, error, phase):
    def end():
        with stage.dashboard:
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)):
            end()
    written = read_status(str(tmp_path / "out"))
    assert (written.phase, written.error) == (phase, "" if error is None else str(error))
    assert lines(tmp_path / "out")[-1]["outcome"] == phase


def test_the_first_outcome_counts(stage, tmp_path):
    with stage.dashboard:
        stage.dashboard.close("failed", "set aside")
    assert read_status(str(tmp_path / "out")).phase == "failed"
    assert [line["event"] for line in lines(tmp_path / "out")] == ["run", "end"]


def test_the_log_has_a_line_per_event_but_not_for_progress(stage, tmp_path):
    stage.open()
    stage.run(0, 10)
    stage.see(Event("leased", 0, 1, 2), Event("failed", 0, 1, 2, error="it tastes\nbad"))
    stage.dashboard.close("failed", "no more")
    found = lines(tmp_path / "out")
    kinds = ["run", "starting", "opened", "leased", "begun", "part", "leased", "failed", "end"]
    assert [line["event"] for line in found] == kinds
    assert found[0]["shards"] == 4
    assert found[2]["place"] == "here"
    assert found[5] | {"time": ""} == {
        "time": "", "event": "part", "worker": 0, "shard": 0, "tokens": 250, "file_bytes": 9
    }  # fmt: skip
    assert found[7]["error"] == "it tastes\nbad"
    assert found[7]["attempt"] == 2
    assert all(line["time"].endswith("Z") for line in found)


def test_a_line_that_a_kill_tore_stays_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"event": "run"}\n{"event": "le')
    Stage(out).dashboard.close("done")
    found = (out / "log.jsonl").read_text().splitlines()
    assert found[:2] == ['{"event": "run"}', '{"event": "le']
    assert [json.loads(line)["event"] for line in found[2:]] == ["run", "end"]


def test_a_log_elsewhere_and_one_that_cannot_be(tmp_path):
    Stage(tmp_path / "out", log=str(tmp_path / "my.log")).dashboard.close("done")
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert [line["event"] for line in lines(tmp_path, "my.log")] == ["run", "end"]
    with pytest.raises(XtokenError, match=r"the log .*nowhere/my\.log cannot be written"):
        Stage(tmp_path / "out", log=str(tmp_path / "nowhere" / "my.log"))
    with pytest.raises(ValueError, match="name a local one"):
        PrecomputeConfig.from_flat(corpus="c", teacher="t", out="o", log="s3://bucket/log")


def test_on_other_storage_there_is_a_status_and_no_log():
    out = f"memory://board-{uuid.uuid4().hex}"
    folder = Folder(out)
    config = PrecomputeConfig.from_flat(corpus="c", teacher="bytes", backend="fake", out=out)
    Dashboard(folder, plan_of(2), config.run, config.teacher, {}, Told(), Clock()).close("done")
    assert folder.names() == ["status.json"]
    assert read_status(out).phase == "done"


def test_a_thousand_workers_are_small(tmp_path):
    stage = Stage(tmp_path / "out", shards=3000)
    for worker in range(1000):
        stage.see(Event("starting", worker), Event("opened", worker, place=f"node-{worker // 8:04d}.cluster.local"))
        for shard in range(3 * worker, 3 * worker + 3):
            stage.see(Event("leased", worker, shard, 1), Event("begun", worker, shard))
    stage.see(Event("part", 0, 0, part=part_of(0)), seconds=10)
    stage.dashboard.close("interrupted")
    assert (tmp_path / "out" / "status.json").stat().st_size < 160_000
    written = read_status(str(tmp_path / "out"))
    assert (len(written.workers), written.shards_in_flight) == (1000, 2999)


def test_a_dashboard_watches_a_real_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXECUTORS))
    job = importlib.import_module("executor_jobs").ToyJob(str(tmp_path), {1: "die once", 2: "poison"})
    stage = Stage(tmp_path / "out")
    with stage.dashboard:
        failed = LocalExecutor(2).run(job, range(4), stage.dashboard)
    assert list(failed) == [2]
    written = read_status(str(tmp_path / "out"))
    assert (written.phase, written.shards_done, written.shards_set_aside, written.shards_in_flight) == ("done", 3, 1, 0)
    assert (written.failures["failed"], written.failures["died"]) == (3, 1)
    assert written.restarts >= 1
    assert "it tastes bad" in written.set_aside[2]
    kinds = [line["event"] for line in lines(tmp_path / "out")]
    assert kinds.count("part") == 3
    assert kinds.count("set_aside") == 1


def test_a_rate_looks_back_a_window_and_no_further():
    rate = Rate(0.0, 60.0)
    assert rate.per_second(0.0) == 0.0
    rate.add(10.0, 100)
    assert rate.per_second(10.0) == 10.0
    assert rate.per_second(50.0) == 2.0
    for second in range(50, 200):
        rate.add(float(second), 7)
    assert rate.per_second(200.0) == pytest.approx(7.0, rel=0.1)
    assert rate.per_second(400.0) == 0.0
