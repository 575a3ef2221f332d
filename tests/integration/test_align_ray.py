"""Align on a real Ray cluster of two machines: the bytes of one worker here, whatever runs where and dies when."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from align_runs import AlignRun, same_targets
from fault_runs import Run, children, command_of, commits, documents, ended, running, settings, wait_for, write_corpus
from ray_cluster import cluster
from typer.testing import CliRunner

from xtoken import cli

PATIENCE = 180.0  # seconds: workers import numba, and cores are shared


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with cluster(cpus=2) as started:
        started.add_node(num_cpus=2, num_gpus=0)
        yield started


@pytest.fixture(scope="module")
def capture(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    corpus = write_corpus(folder / "corpus.jsonl", documents()[:60])
    Run(settings(corpus, tokenizer_file("smollm2"), folder / "capture"), folder).finish()
    return folder / "capture"


@pytest.fixture(scope="module")
def whole(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "targets"
    AlignRun(capture, out, "--workers", 1).finish()
    return out


def test_targets_made_on_ray_are_those_made_here_byte_for_byte(
    nodes: Any, capture: Path, whole: Path, tmp_path: Path
) -> None:
    AlignRun(capture, tmp_path / "ray", "--workers", 3, "--ray", nodes.address).finish()
    same_targets(whole, tmp_path / "ray")
    AlignRun(capture, tmp_path / "two", "--workers", 2).finish()
    same_targets(whole, tmp_path / "two")


def test_killed_workers_and_a_killed_driver_cost_nothing(
    nodes: Any, capture: Path, whole: Path, tmp_path: Path, figure: Any
) -> None:
    run, killed = AlignRun(capture, tmp_path / "out", "--workers", 2, "--ray", nodes.address), set[int]()
    with running(run) as process:
        for at in (1, 2):
            wait_for(lambda at=at: len(commits(run.out)) >= at, PATIENCE)
            wait_for(lambda: _workers(nodes) - killed, PATIENCE)
            victim = min(_workers(nodes) - killed)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        wait_for(lambda: len(commits(run.out)) >= 3, PATIENCE)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=180)
        left = len(commits(run.out))
        wait_for(lambda: not _workers(nodes), PATIENCE)  # they end with their driver
    ended(run.start())
    same_targets(whole, run.out)
    figure(f"align on Ray: {len(killed)} workers and a driver killed with -9, {left} parts committed then, same bytes")


def _workers(nodes: Any) -> set[int]:
    """Actors that live on the machines of this cluster."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in (nodes.head_node, *nodes.worker_nodes)]
    found = {pid for raylet in raylets for pid in children(raylet)}
    return {pid for pid in found if command_of(pid).startswith("ray::RayWorker")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "memory://there"], "worker processes do not share memory://"),
        (["--out", "o", "--ray", "ray://host:1"], "ray job submit"),
        (["--out", "o", "--ray", "somewhere"], "say local, auto or HOST:PORT"),
    ],
)
def test_what_workers_elsewhere_cannot_use_is_refused(capture: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli.app, ["align", str(capture), "--student", "bytes", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
