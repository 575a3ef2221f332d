"""Toy jobs for executor tests, in a module that worker processes can import."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from xtoken.pipeline.capture import LocalExecutor
from xtoken.pipeline.executors.protocol import Event, OneByOne, ignore_progress
from xtoken.pipeline.store.files import DiskFull
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import Part


@dataclass(frozen=True)
class ToyJob:
    """``shards``: shard -> what happens there; ``opening``: what happens on open. Everything is noted in files."""

    folder: str
    shards: dict[int, str] = field(default_factory=dict)
    opening: str = "fine"
    ahead: int = 1

    def open(self, slot: int = 0) -> "ToyWorker":
        note(self.folder, f"slot-{slot}-{os.getpid()}")
        note(self.folder, f"open-{os.getpid()}")
        if self.opening.startswith("bad slot "):  # slot 0 works once the others have failed as often as they may
            self.open_one_of(slot, int(self.opening.removeprefix("bad slot ")))
        if self.opening == "bad model":
            raise XtokenError("no such model")
        if self.opening == "defect":
            raise ValueError("a defect")
        if self.opening == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return ToyWorker(self)

    def open_one_of(self, slot: int, bad: int) -> None:
        """Refuse the bad slot; the others are slow to open until it was refused once."""
        if slot == bad:
            note(self.folder, f"refused-{os.getpid()}")
            raise XtokenError(f"GPU {bad} is taken")
        wait_for(self.folder, "refused-", 1)


@dataclass(frozen=True)
class ToyWorker(OneByOne):
    job: ToyJob

    def run(self, shard: int, attempt: int, on_progress=ignore_progress) -> Part:
        on_progress(shard + 100)
        note(self.job.folder, f"run-{shard}-{attempt}")
        what = self.job.shards.get(shard, "fine")
        if what == "poison":
            raise ValueError("it tastes bad")
        if what == "bad input":
            raise XtokenError("document 'd' is bad; mend it")
        if what == "full":
            raise DiskFull("no room")
        if what == "die" or (what == "die once" and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "slow":
            time.sleep(60)
        if what.startswith("wait "):  # until the run has heard of so many deaths (``Watching.folder``)
            wait_for(self.job.folder, "died-", int(what.removeprefix("wait ")))
        if what == "stall once" and attempt == 1:
            self._until_somebody_runs(shard)
        return Part(
            index=shard,
            samples=1,
            tokens=1,
            rows=1,
            entries=1,
            text_bytes=1,
            file_bytes=1,
            sha256=f"{os.getpid():064x}",
        )

    def _until_somebody_runs(self, shard: int) -> None:
        end = time.monotonic() + 120
        while not (Path(self.job.folder) / f"run-{shard}-2").exists() and time.monotonic() < end:
            time.sleep(0.05)


class Watching:
    """A ``Watch`` that remembers; deaths are noted in ``folder``, too, for workers that wait for them."""

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.events: list[Event] = []

    @property
    def parts(self) -> list[Part]:
        return [event.part for event in self.events if event.kind == "part"]

    @property
    def messages(self) -> list[tuple[int, int]]:
        return [(event.shard, event.done) for event in self.events if event.kind == "progress"]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def see(self, event: Event) -> None:
        self.events.append(event)
        if self.folder is not None and event.kind == "died":
            note(self.folder, f"died-{len(self.events)}")

    def tick(self) -> None:
        pass


def note(folder: str, name: str) -> None:
    (Path(folder) / name).touch()


def wait_for(folder: str, prefix: str, count: int) -> None:
    while sum(path.name.startswith(prefix) for path in Path(folder).iterdir()) < count:
        time.sleep(0.02)


if __name__ == "__main__":
    # a driver with two workers that never end by themselves
    LocalExecutor(2).run(ToyJob(sys.argv[1], dict.fromkeys(range(4), "slow")), range(4), Watching())
