"""Kill -9 of workers, drivers and raylets at random moments, over and over, and what is found afterwards."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_runs import Run, commits, events, orphans, running, same_as

from xtoken.schemas.configs.capture import PrecomputeConfig

WORKERS = 3
PACE = 0.15  # seconds of each batch, so that kills meet work
_NODES = 2
_PATIENCE = 300.0
KINDS = {"local": ("worker", "worker", "driver"), "ray": ("worker", "worker", "driver", "raylet")}


@dataclass
class Found:
    """Counters of a soak.

    Attributes:
        kills: by kind.
        in_flight: shards that killed workers had begun and not committed.
        orphans: temporary files that lay there after kills of drivers, and were gone after the run.
        runs: captures that ended, each compared with the undisturbed one.
        resumes: drivers started on what an earlier one had left.
        set_aside: runs that ended with a shard three times unlucky, and were run again.
        events: what the captures' logs say went on.
    """

    kills: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    orphans: int = 0
    runs: int = 0
    resumes: int = 0
    set_aside: int = 0
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter)


class Soak:
    """One executor's share of it.

    Args:
        undisturbed: settings of a capture that was left alone.
        folder: for everything that is written.
        seed: of the choice of kinds, victims and moments.
        nodes: a ``ray.cluster_utils.Cluster``; None runs on this machine's processes.
    """

    def __init__(self, undisturbed: PrecomputeConfig, folder: Path, seed: int, nodes: Any = None) -> None:
        self.found = Found()
        self._undisturbed = undisturbed
        self._folder = folder
        self._random = random.Random(seed)
        self._nodes = nodes
        self._notes = folder / "notes"
        self._notes.mkdir(parents=True)

    def run(self, kills: int, seconds: float) -> Found:
        """Until so many kills have been made, or time is up; every capture is brought to its end and compared."""
        began = time.monotonic()
        while sum(self.found.kills.values()) < kills and time.monotonic() - began < seconds:
            out = self._folder / f"out-{self.found.runs}"
            self._capture(out, kills, began + seconds)
            self.found.runs += 1
            self.found.events += events(out)
            same_as(Path(self._undisturbed.out), out)
        self.found.seconds = time.monotonic() - began
        return self.found

    def _capture(self, out: Path, kills: int, until: float) -> None:
        """One capture to its end, whatever it takes."""
        more = {"out": str(out), "workers": WORKERS, "ray": self._nodes.address if self._nodes else None}
        job = {"folder": str(self._notes), "pace": PACE}
        run = Run(self._undisturbed.changed(**more), self._folder, job)
        while True:
            with running(run) as process:
                while process.poll() is None and sum(self.found.kills.values()) < kills and time.monotonic() < until:
                    self._strike(process, out)
                process.communicate(timeout=_PATIENCE)
            if process.returncode == 0:
                return
            assert process.returncode in (4, -signal.SIGKILL), process.returncode
            self.found.set_aside += process.returncode == 4
            self.found.resumes += 1

    def _strike(self, process: "subprocess.Popen[bytes]", out: Path) -> None:
        """Wait for a random moment, then kill something; nothing where there is nothing to kill."""
        begun = len(list(self._notes.glob("begun-*")))
        wait(lambda: len(list(self._notes.glob("begun-*"))) > begun or process.poll() is not None)
        time.sleep(self._random.uniform(0.0, 1.5))
        if process.poll() is not None:
            return
        kind = self._random.choice(KINDS["ray" if self._nodes else "local"])
        workers = self._workers()
        if kind == "worker":
            if not workers:
                return
            victim = self._random.choice(workers)
            self._count([victim], out)
            os.kill(victim, signal.SIGKILL)
        elif kind == "driver":
            self._count(workers, out)
            os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
            process.wait()
            wait(lambda: not self._workers())
            assert not self._workers(), "workers outlive their driver"
            self.found.orphans += len(orphans(out))
        else:
            self._lose_machine(out)
        self.found.kills[kind] += 1

    def _lose_machine(self, out: Path) -> None:
        from ray_cluster import kill_machine

        self._count(self._workers(), out)
        kill_machine(self._nodes, self._random.choice(list(self._nodes.worker_nodes)))
        self._nodes.add_node(num_cpus=WORKERS)

    def _count(self, pids: list[int], out: Path) -> None:
        done = {int(path.stem.split("-")[1]) for path in commits(out)}
        begun = {int(path.name.split("-")[2]) for pid in pids for path in self._notes.glob(f"begun-{pid}-*")}
        self.found.in_flight += len(begun - done)

    def _workers(self) -> list[int]:
        """Live worker processes; of those killed earlier none has its number again yet."""
        pids = sorted(int(path.name.split("-")[1]) for path in self._notes.glob("pid-*"))
        return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(what: Callable[[], object]) -> None:
    """Until something is true, or long enough."""
    until = time.monotonic() + _PATIENCE
    while not what() and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def machines() -> Iterator[Any]:
    """A Ray cluster of a head without workers and some machines, all of them processes here."""
    from ray_cluster import cluster

    with cluster(cpus=0) as nodes:
        for _ in range(_NODES):
            nodes.add_node(num_cpus=WORKERS)
        yield nodes
