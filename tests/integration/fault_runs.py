"""What tests of faults share: a corpus of real text, captures in processes of their own, and what must hold after."""

import argparse
import decimal
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).resolve().parent / "capture_driver.py"
LINES = 40


def documents() -> list[str]:
    """Real text: modules of the standard library, a document per 40 lines."""
    found = []
    for module in (argparse, decimal, typing, inspect):
        lines = inspect.getsource(module).splitlines(keepends=True)
        found += ["".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]
    return found


def write_corpus(path: Path, texts: list[str]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(corpus: Path, teacher: Path, out: Path | str, **more: Any) -> PrecomputeConfig:
    """A capture by the fake teacher with a real tokenizer, in shards of a few documents."""
    fields = {"backend": "fake", "max_tokens": 256, "shard_bytes": 12_000, "workers": 2, **more}
    return PrecomputeConfig.from_flat(corpus=str(corpus), teacher=str(teacher), out=str(out), **fields)


class Run:
    """precompute in a process group of its own.

    Args:
        config: its settings.
        folder: for the file that hands them over.
        job: fields of ``fault_jobs.FaultyJob``.
        environment: more variables.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        folder: Path,
        job: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        path = folder / f"settings-{len(list(folder.glob('settings-*')))}.json"
        path.write_text(json.dumps({"config": config.to_flat(), "job": job}))
        self.out = Path(config.out)
        self._command = [sys.executable, str(DRIVER), str(path)]
        self._environment = dict(environment or {})

    def start(self) -> "subprocess.Popen[bytes]":
        """The driver, which leads a group of its own."""
        environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")} | self._environment
        return subprocess.Popen(self._command, env=environment, start_new_session=True, stderr=subprocess.PIPE)

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        """Run to the end, which must have that exit code; what it said on stderr."""
        return ended(self.start(), code, seconds)

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


def ended(process: "subprocess.Popen[bytes]", code: int = 0, seconds: float = 300) -> str:
    """Wait for a driver, which must end with that exit code and without a traceback of ours; what it said."""
    try:
        error = process.communicate(timeout=seconds)[1].decode()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, error
    return error


@contextmanager
def running(run: Run) -> Iterator["subprocess.Popen[bytes]"]:
    """A driver that does not outlive the block."""
    process = run.start()
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(what: Callable[[], object], seconds: float = 180) -> None:
    """Until something is true."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited for {seconds} s"
        time.sleep(0.01)


def events(out: Path) -> Counter[str]:
    """How often each kind of event is in a local capture's log, over all its runs."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return Counter(str(json.loads(line)["event"]) for line in lines if line.endswith("}"))


def commits(out: Path) -> list[Path]:
    """Commit records of a local capture."""
    return list((out / "commits").glob("*.json"))


def fetch(folder: Folder, to: Path) -> Path:
    """A local copy of a capture on a server, all that lies there included."""
    folder.fs.invalidate_cache()
    folder.fs.get(folder.at("").rstrip("/"), str(to), recursive=True)
    return to


def files(out: Path) -> dict[str, bytes]:
    """What lies in the folder of the parts."""
    return {path.name: path.read_bytes() for path in sorted((out / "data").iterdir())}


def samples(out: Path) -> list[str]:
    """The ids in all parts, sorted."""
    found = [sample for path in sorted((out / "data").glob("*.parquet")) for sample in ids_of(path)]
    return sorted(found)


def ids_of(path: Path) -> list[str]:
    """The samples of one part."""
    return list(pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist())


def orphans(out: Path) -> list[str]:
    """What attempts left that are not parts or records."""
    return sorted(path.name for path in out.rglob("*") if path.name.endswith((".tmp", ".bad")))


def same_as(undisturbed: Path, out: Path) -> None:
    """``out`` holds exactly what the undisturbed run gave: no sample twice, none missing, no torn file, no orphan."""
    assert files(out) == files(undisturbed)
    assert samples(out) == samples(undisturbed)
    assert len(set(samples(out))) == len(samples(out))
    theirs, ours = (read_manifest(str(root), CaptureManifest) for root in (undisturbed, out))
    assert (ours.parts, ours.run_hash, ours.files) == (theirs.parts, theirs.run_hash, theirs.files)
    assert ours.set_aside == {}
    assert orphans(out) == []
    verify(str(out))


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def command_of(pid: int) -> str:
    """Its command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def workers_of(driver: int) -> list[int]:
    """Worker processes of a driver on this machine."""
    return [pid for pid in children(driver) if "spawn_main" in command_of(pid)]


def group_lives(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
