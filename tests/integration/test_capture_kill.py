"""Killing a capture at any moment and running it again gives what an undisturbed run gives, byte for byte."""

import argparse
import decimal
import inspect
import json
import os
import random
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.store import verify
from schemas.config import PrecomputeConfig
from schemas.manifest import CaptureManifest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10
DRIVER = Path(__file__).resolve().parent / "capture_driver.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Real text: three modules of the standard library, a document per 40 lines."""
    path = tmp_path_factory.mktemp("kill") / "corpus.jsonl"
    documents = []
    for module in (argparse, decimal, typing, inspect):
        lines = inspect.getsource(module).splitlines(keepends=True)
        documents += ["".join(lines[start : start + 40]) for start in range(0, len(lines), 40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


class Run:
    """precompute in a process group of its own."""

    def __init__(self, config: PrecomputeConfig, folder: Path) -> None:
        settings = folder / "settings.json"
        settings.write_text(config.model_dump_json())
        self.out = Path(config.out)
        self._command = [sys.executable, str(DRIVER), str(settings)]

    def start(self) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(self._command, env=environment, start_new_session=True, stderr=subprocess.PIPE)

    def finish(self) -> None:
        process = self.start()
        error = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, error

    def kill_at(self, parts: int, delay: float) -> bool:
        """SIGKILL the whole group ``delay`` seconds after ``parts`` commits; False when the run had ended by itself."""
        process = self.start()
        while process.poll() is None and len(commits(self.out)) < parts:
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return process.returncode == -signal.SIGKILL


def commits(out: Path) -> list[Path]:
    return list((out / "commits").glob("*.json"))


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "data").iterdir())}


def samples(out: Path) -> list[str]:
    found = [sample for path in sorted((out / "data").glob("*.parquet")) for sample in ids_of(path)]
    return sorted(found)


def ids_of(path: Path) -> list[str]:
    return list(pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist())


@pytest.fixture(scope="module")
def undisturbed(corpus, tokenizer_file) -> PrecomputeConfig:
    """Settings of a run that was left alone."""
    config = PrecomputeConfig(
        corpus=str(corpus),
        teacher=str(tokenizer_file("smollm2")),
        out=str(corpus.parent / "undisturbed"),
        backend="fake",
        max_tokens=256,
        shard_bytes=12_000,
        workers=2,
    )
    Run(config, corpus.parent).finish()
    return config


def same(config: PrecomputeConfig, other: Path) -> None:
    """The folder ``other`` holds exactly what the undisturbed run gave."""
    assert files(other) == files(Path(config.out))
    assert samples(other) == samples(Path(config.out))
    assert len(set(samples(other))) == len(samples(other))
    ours, theirs = (read_manifest(str(root), CaptureManifest) for root in (config.out, other))
    assert (ours.parts, ours.run_hash, ours.files) == (theirs.parts, theirs.run_hash, theirs.files)
    assert not [path for path in other.rglob("*") if path.name.endswith((".tmp", ".bad"))]
    verify(str(other))


def test_kill_9_at_ten_random_moments(undisturbed, tmp_path, figure):
    config = undisturbed
    parts = len(files(Path(config.out)))
    moments = random.Random(20260521)
    kills = rounds = 0
    committed_at_kill = []
    while kills < KILLS:
        rounds += 1
        assert rounds < 6 * KILLS
        out = tmp_path / f"out-{rounds}"
        run = Run(config.model_copy(update={"out": str(out)}), tmp_path)
        # a few kills per folder, so that resumed runs are killed too
        for _ in range(4):
            # at a point of the work rather than of the clock: how fast this machine is must not decide what is hit;
            # a point that an earlier run has passed is a moment while the program starts
            if kills < KILLS and run.kill_at(moments.randrange(parts), moments.uniform(0.0, 0.4)):
                kills += 1
                committed_at_kill.append(len(commits(out)))
        run.finish()
        same(config, out)
    figure(f"capture: {kills} x kill -9 with {committed_at_kill} of {parts} parts committed, {rounds} runs, same bytes")


def test_killing_one_worker_costs_nothing(undisturbed, tmp_path):
    config = undisturbed
    out = tmp_path / "out"
    process = Run(config.model_copy(update={"out": str(out)}), tmp_path).start()
    deadline = time.monotonic() + 60
    while not commits(out):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victims = [pid for pid in children(process.pid) if "spawn_main" in command_of(pid)]
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error
    same(config, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_resumes(undisturbed, tmp_path, number):
    config = undisturbed
    out = tmp_path / "out"
    run = Run(config.model_copy(update={"out": str(out)}), tmp_path)
    process = run.start()
    deadline = time.monotonic() + 60
    while not commits(out):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does: driver and workers alike
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM), error
    deadline = time.monotonic() + 20
    while group_lives(process.pid):  # multiprocessing's own helper notices a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(out.rglob("*.tmp"))
    run.finish()
    same(config, out)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
