"""A real Ray cluster of several raylets on this machine; its GPUs are numbers only."""

import contextlib
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from free_ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SETTINGS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
    "metrics_report_interval_ms": 500,
}


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """A head node with CPUs and no GPUs; ``add_node`` and ``remove_node`` of what it gives change it."""
    import ray
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": cpus,
        "num_gpus": 0,
        "include_dashboard": False,
        "metrics_export_port": free_ports(1)[0],
        "_system_config": SETTINGS,
    }
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": f"{ROOT}/.dev:{HERE}"}
    with patch.dict(os.environ, environment):
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


def kill_machine(started: Any, node: Any) -> None:
    """What a machine that loses power does, as far as one machine can: its raylet and its workers are gone at once."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    started.worker_nodes.remove(node)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], Any], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(0.05)


def metrics_of_run(folder: str) -> dict[str, float]:
    """Run six shards, one of them poison, over the connection that is there; what Prometheus would read of it."""
    from ray_jobs import NotingJob, Watching

    from xtoken.pipeline.executors.ray_driver import RayExecutor

    job = NotingJob(folder, {0: "poison", 5: "wait run_0_3"})
    assert list(RayExecutor("auto", 2, 0).run(job, range(6), Watching())) == [0]
    wait_until(lambda: _read_metrics().get("xtoken_shards_left") == 0)
    return _read_metrics()


def _read_metrics() -> dict[str, float]:
    """This process's metrics by name and our tag's value."""
    import ray

    found, worker = {}, ray.get_runtime_context().get_worker_id()
    for port in (node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                match = re.match(r"ray_(xtoken_\w+)\{(.*)\} (\S+)$", line)
                if match is not None and worker in match[2]:
                    tag = re.search(r'(?:^|,)(?:outcome|kind|state|worker)="([^"]*)"', match[2])
                    found[" ".join([match[1], *([tag[1]] if tag is not None else [])])] = float(match[3])
    return found
