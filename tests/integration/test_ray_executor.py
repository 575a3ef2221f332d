"""The Ray executor on a real cluster of several raylets, with workers that fail, die and hang, and machines that go."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import HERE, ROOT, alive, cluster, kill_machine, wait_until
from ray_jobs import TOKENS, NotingJob, Watching, note, notes

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.executors.ray_driver import RayExecutor
from xtoken.pipeline.store.files import DiskFull
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent


@pytest.fixture(scope="module")
def nodes():
    with cluster(cpus=4) as started:
        yield started


def run(nodes, job, shards, workers=2, watch=None, **options):
    watch = watch or Watching()
    failed = RayExecutor(nodes.address, workers, **{"gpus_per_worker": 0, **options}).run(job, shards, watch)
    assert watch.ticks
    return watch, failed


def pids(folder: Path) -> list[int]:
    return [int(name.split("_")[2]) for name in notes(folder, "open_")]


def test_shards_run_once_poison_is_quarantined_and_dead_workers_have_heirs(nodes, tmp_path, capfd):
    job = NotingJob(str(tmp_path), {2: "poison", 3: "die once", 7: "wait run_3_2"})
    watch, failed = run(nodes, job, range(8))
    assert watch.parts() == [0, 1, 3, 4, 5, 6, 7]
    assert list(failed) == [2]
    assert failed[2].endswith("ValueError: it tastes bad")
    assert notes(tmp_path, "run_2") == ["run_2_1", "run_2_2", "run_2_3"]
    assert notes(tmp_path, "run_3") == ["run_3_1", "run_3_2"]
    assert [watch.count(kind) for kind in ("died", "lost", "failed", "set_aside")] == [1, 0, 3, 1]
    opened = notes(tmp_path, "open_")
    assert len(opened) == 3
    assert {name.split("_")[1] for name in opened} == {"0", "1"}, "the heir keeps its slot"
    wait_until(lambda: not any(alive(pid) for pid in pids(tmp_path)))
    assert capfd.readouterr().out == "", "Ray's own messages stay off stdout"


def test_a_stalled_worker_loses_its_shard_and_what_it_commits_later_counts_once(nodes, tmp_path):
    # 0 stalls until its second attempt, which begins once its lease is over, has committed
    job = NotingJob(str(tmp_path), {0: "stall commit_0", 1: "wait seen_overdue"})
    watch, failed = run(nodes, job, range(2), watch=Watching(tmp_path), lease_seconds=6)
    assert failed == {}
    assert watch.parts() == [0, 1]
    assert notes(tmp_path, "run_") == ["run_0_1", "run_0_2", "run_1_1"]
    assert [watch.count(kind) for kind in ("overdue", "died")] == [1, 0]


def test_a_job_that_cannot_be_opened_and_a_full_disk_end_the_run_at_once(nodes, tmp_path):
    with pytest.raises(XtokenError, match="no such model"):
        run(nodes, NotingJob(str(tmp_path), opening="bad model"), range(4), workers=1)
    with pytest.raises(DiskFull, match="no room"):
        run(nodes, NotingJob(str(tmp_path), {1: "full"}), range(4), workers=1)
    assert notes(tmp_path, "run_") == ["run_0_1", "run_1_1"]
    wait_until(lambda: not any(alive(pid) for pid in pids(tmp_path)))


def test_a_worker_that_cannot_open_ends_no_run_that_others_can_do(nodes, tmp_path):
    job = NotingJob(str(tmp_path), {0: "wait refused_3"}, opening="bad slot 1")
    watch, failed = run(nodes, job, range(4))
    assert (watch.parts(), failed) == ([0, 1, 2, 3], {})
    assert [watch.count(kind) for kind in ("opened", "set_aside")] == [1, 0]
    died = [event.error for event in watch.events if event.kind == "died"]
    assert 1 <= len(died) <= 3, "it is given up after the third"
    assert all("cannot open: its GPU is taken" in error for error in died)


def test_a_lease_comes_back_to_the_worker_that_had_it_when_storage_was_out_of_reach(nodes, tmp_path):
    watch, failed = run(nodes, NotingJob(str(tmp_path), {1: "out once"}), range(3), workers=1)
    assert (watch.parts(), failed) == ([0, 1, 2], {})
    assert notes(tmp_path, "run_1") == ["run_1_1"], "no fault of the shard's"
    assert [watch.count(kind) for kind in ("outage", "opened")] == [1, 1]


def test_another_version_on_a_node_is_refused(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.executors.ray_driver.code_version", lambda: "0.0.1")
    with pytest.raises(XtokenError, match=r"has xtoken .*started by xtoken 0\.0\.1; install xtoken 0\.0\.1 on every"):
        run(nodes, NotingJob(str(tmp_path)), range(4), workers=1)
    assert notes(tmp_path, "open_") == []


def test_a_worker_that_dies_while_loading_is_tried_three_times(nodes, tmp_path):
    with pytest.raises(XtokenError, match="while loading, 3 times in a row"):
        run(nodes, NotingJob(str(tmp_path), opening="die"), range(4), workers=1)
    assert len(notes(tmp_path, "open_")) == 3


def test_machines_come_and_go_while_the_run_is_on(nodes, tmp_path):
    """As many workers as there are GPUs: one machine, then two, one is killed, then comes a third, one is drained."""
    first = nodes.add_node(num_cpus=1, num_gpus=1)
    second = []
    job = NotingJob(str(tmp_path), dict.fromkeys(range(4), "wait go"))

    def joins() -> None:
        second.append(nodes.add_node(num_cpus=1, num_gpus=1))

    class Script(Watching):
        """One thing happens after the other, each once the run has seen the one before."""

        def see(self, event):
            super().see(event)
            if event.kind == "begun" and self.count("begun") == 1:
                joins()
            elif event.kind == "begun" and self.count("begun") == 2:
                kill_machine(nodes, first)
            elif event.kind == "lost" and self.count("lost") == 1:
                joins()
            elif event.kind == "begun" and self.count("begun") == 3:
                nodes.remove_node(second[0])
            elif event.kind == "lost" and self.count("lost") == 2:
                note(str(tmp_path), "go")

    watch, failed = run(nodes, job, range(4), workers=None, watch=Script(), gpus_per_worker=None)
    assert failed == {}
    assert watch.parts() == [0, 1, 2, 3]
    assert notes(tmp_path, "commit_") == [f"commit_{shard}" for shard in range(4)]
    assert [watch.count(kind) for kind in ("lost", "died", "failed")] == [2, 0, 0]
    assert len({note.read_text().split()[0] for note in tmp_path.glob("open_*")}) == 3
    nodes.remove_node(second[1])


def test_a_tensor_parallel_worker_has_all_its_gpus_on_one_node(nodes, tmp_path):
    added = [nodes.add_node(num_cpus=2, num_gpus=2) for _ in range(2)]
    try:
        job = NotingJob(str(tmp_path), {0: "wait run_1_1", 1: "wait run_0_1"})
        watch, failed = run(nodes, job, range(2), workers=None, gpus_per_worker=None, tensor_parallel=2)
        assert (watch.parts(), failed) == ([0, 1], {})
        opened = [path.read_text().split() for path in tmp_path.glob("open_*")]
        assert {node for node, _ in opened} == {node.node_id for node in added}
        assert [gpus for _, gpus in opened] == ["0,1", "0,1"]
        with pytest.raises(XtokenError, match=r"needs 4 GPUs of one node, and the largest node .* has 2"):
            run(nodes, job, range(2), workers=None, gpus_per_worker=None, tensor_parallel=4)
    finally:
        for node in added:
            nodes.remove_node(node)


def test_a_connection_that_is_there_is_used_and_its_metrics_show_the_run(nodes, tmp_path):
    """In a process of its own, for Ray's counters live as long as their process."""
    code = (
        "import json, sys, ray; from ray_cluster import metrics_of_run\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "found = metrics_of_run(sys.argv[2])\n"
        "assert ray.is_initialized()\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, nodes.address, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["xtoken_tokens_total"] == 5 * TOKENS
    assert found["xtoken_shards_total committed"] == 5
    assert found["xtoken_shards_total set_aside"] == 1
    assert found["xtoken_failures_total failed"] == 3
    # One worker may be done with all of them before the other has started.
    by_worker = [value for name, value in found.items() if name.startswith("xtoken_worker_tokens_total ")]
    assert by_worker
    assert sum(by_worker) == 5 * TOKENS
    assert found["xtoken_workers open"] == 0


def test_a_capture_made_on_ray_is_the_one_made_here_byte_for_byte(nodes, tmp_path):
    texts = [f"Document {number}: " + "some words, and 1234 numbers. " * (number + 3) for number in range(12)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    here, there = (
        PrecomputeConfig.from_flat(
            corpus=str(corpus), teacher="bytes", backend="fake", k=8, max_tokens=64, shard_bytes=700, workers=2,
            out=str(tmp_path / name), ray=ray,
        )
        for name, ray in (("here", None), ("there", nodes.address))
    )  # fmt: skip
    parts = precompute(here, Silent()).parts
    assert len(parts) > 3
    assert precompute(there, Silent()).parts == parts
    assert verify(there.out) == verify(here.out)
    for path in (tmp_path / "here" / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / "data" / path.name).read_bytes()


def test_ray_local_starts_a_ray_of_its_own_and_ends_it(tmp_path):
    """In a process of its own: this one has a cluster."""
    code = (
        "import sys; from ray_jobs import NotingJob, Watching\n"
        "from xtoken.pipeline.executors.ray_driver import RayExecutor\n"
        "import ray; assert RayExecutor('local', 3, None).run(NotingJob(sys.argv[1]), range(6), Watching()) == {}\n"
        "assert not ray.is_initialized()"
    )
    command, paths = [sys.executable, "-c", code, str(tmp_path)], {"PYTHONPATH": f"{ROOT}/.dev:{HERE}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **paths})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert notes(tmp_path, "run_") == [f"run_{shard}_1" for shard in range(6)]


def test_an_address_where_nothing_answers(tmp_path):
    with socket.socket() as mute:  # it has the port, so nobody else does, and answers nothing
        mute.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(XtokenError, match=r"--ray 127\.0\.0\.1:\d+: nothing answers there"):
            RayExecutor(address, 1, None).run(NotingJob(str(tmp_path)), [0], Watching())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_workers_end_with_their_driver(nodes, tmp_path, number, code):
    code_of_driver = (
        "import sys; from ray_jobs import NotingJob, Watching\n"
        "from xtoken.pipeline.executors.ray_driver import RayExecutor\n"
        "job = NotingJob(sys.argv[2], dict.fromkeys(range(2), 'wait never'))\n"
        "RayExecutor(sys.argv[1], 2, 0).run(job, range(2), Watching())"
    )
    command = [sys.executable, "-c", code_of_driver, nodes.address, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/.dev:{HERE}"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as driver:
        wait_until(lambda: len(notes(tmp_path, "run_")) == 2)
        assert all(alive(pid) for pid in pids(tmp_path))
        driver.send_signal(number)
        assert driver.wait(120) == code
    wait_until(lambda: not any(alive(pid) for pid in pids(tmp_path)))
