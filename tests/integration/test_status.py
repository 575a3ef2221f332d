"""xtoken status from another process: of a run at work, interrupted, killed, resumed, and on object storage."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

from xtoken import cli
from xtoken.pipeline.capture.monitor.status import status
from xtoken.schemas.ui.answer import Interrupted

ROOT = Path(cli.__file__).resolve().parent
PATIENCE = 120.0
# The command, but for a status that is written often: a fast machine must not be done before it tells of work.
COMMAND = "import xtoken.pipeline.capture.monitor.dashboard as board; board._EVERY = 0.2; import cli; cli.main()"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eighty shards of text."""
    line = json.dumps({"text": "It was a dark and stormy night, and 1234 sheep slept. " * 60})
    (tmp_path / "corpus.jsonl").write_text(f"{line}\n" * 160)
    return tmp_path / "corpus.jsonl"


def words(corpus: Path, out: str) -> list[str]:
    flags = ["--teacher", "bytes", "--backend", "fake", "--k", "16", "--shard-bytes", "6000", "--out", out]
    return [sys.executable, "-c", COMMAND, "precompute", str(corpus), *flags]


@contextmanager
def driver(corpus: Path, out: str) -> Iterator["subprocess.Popen[str]"]:
    """A run in a process of its own, which is killed if it outlives the block."""
    process = subprocess.Popen(words(corpus, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(out: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status of which something holds."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if (Path(out) / "status.json").exists() and holds(found := status(out)):
            return found
        time.sleep(0.05)
    raise AssertionError(f"it never came: {status(out)}")


def at_work(found: dict[str, Any]) -> bool:
    return bool(found["phase"] == "running" and found["shards_done"] and found["workers_open"])


def test_a_run_interrupted_killed_and_resumed(corpus: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with driver(corpus, out) as process:
        found = wait_for(out, at_work)
        assert (found["says"], found["shards"], found["workers_open"]) == ("at work", 80, 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == Interrupted.exit_code
    assert status(out)["phase"] == "interrupted"

    with driver(corpus, out) as process:
        wait_for(out, lambda found: at_work(found) and found["drivers"][0]["pid"] == process.pid)
        process.kill()
        process.wait(PATIENCE)
    later = status(out, datetime.now(UTC) + timedelta(seconds=93))
    assert later["phase"] == "silent"
    assert f"the driver of {process.pid} on " in later["says"]
    assert "has ended or hangs; the same command resumes" in later["says"]

    done = subprocess.run([*words(corpus, out), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["worker_hours"] > 0
    found = status(out)
    assert (found["phase"], found["shards_done"], found["share_done"]) == ("done", 80, 1.0)
    events = [json.loads(line)["event"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert events.count("run") == 3
    assert events.count("end") == 2, "the one that was killed could not say so"
    assert 80 - 6 <= events.count("part") <= 80, "a part may be committed and its news be killed"


def test_on_object_storage(corpus: Path, s3_server: S3Server) -> None:
    out = "s3://alpha-store/status-capture"
    run = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | s3_server.environment("alpha"),
    )
    done = run([*words(corpus, out), "--limit", "20", "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["went_wrong"] == {}
    found = json.loads(run([sys.executable, str(ROOT / "cli.py"), "status", out, "--json"]).stdout)
    assert (found["phase"], found["shards_done"]) == ("done", 10)
    assert found["drivers"][0]["phase"] == "done"
    names = s3_server.filesystem("alpha").ls("alpha-store/status-capture", detail=False)
    assert "alpha-store/status-capture/status.json" in names
    assert "alpha-store/status-capture/log.jsonl" not in names
