"""Toy jobs that note in files what happens to them, in a module that Ray workers can import."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from xtoken.pipeline.executors.protocol import Event, OneByOne, ignore_progress
from xtoken.pipeline.store.files import DiskFull
from xtoken.schemas.errors import Unreachable, XtokenError
from xtoken.schemas.manifest import Part

TOKENS = 10


@dataclass(frozen=True)
class NotingJob:
    """``shards``: shard -> what happens there.

    fine; poison; die, die once; full; out once (storage out of reach); "wait NAME": get on until somebody writes that
    file; "stall NAME": the first attempt gets on no more, but for that file.
    """

    folder: str
    shards: dict[int, str] = field(default_factory=dict)
    opening: str = "fine"
    ahead: int = 1

    def open(self, slot: int = 0) -> "NotingWorker":
        import ray

        node = ray.get_runtime_context().get_node_id()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        note(self.folder, f"open_{slot}_{os.getpid()}", f"{node} {gpus}")
        if self.opening == "bad slot 1" and slot == 1:
            note(self.folder, f"refused_{len(notes(Path(self.folder), 'refused_')) + 1}")
            raise XtokenError("its GPU is taken")
        if self.opening == "bad model":
            raise XtokenError("no such model")
        if self.opening == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return NotingWorker(self)


@dataclass(frozen=True)
class NotingWorker(OneByOne):
    job: NotingJob

    def run(self, shard: int, attempt: int, on_progress=ignore_progress) -> Part:
        note(self.job.folder, f"run_{shard}_{attempt}", str(os.getpid()))
        what, _, name = self.job.shards.get(shard, "fine").partition(" ")
        if what == "poison":
            raise ValueError("it tastes bad")
        if what == "full":
            raise DiskFull("no room")
        if what == "out" and not notes(Path(self.job.folder), f"out_{shard}"):
            note(self.job.folder, f"out_{shard}")
            raise Unreachable("503")
        if what == "die" and (attempt == 1 or name != "once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "wait" or (what == "stall" and attempt == 1):
            self._until((Path(self.job.folder) / name).exists, on_progress if what == "wait" else ignore_progress)
        return self._commit(shard)

    def _until(self, condition: Callable[[], bool], on_progress) -> None:
        end = time.monotonic() + 300
        while not condition() and time.monotonic() < end:
            on_progress(1)
            time.sleep(0.05)

    def _commit(self, shard: int) -> Part:
        """The first attempt that is here makes the part."""
        try:
            with (Path(self.job.folder) / f"commit_{shard}").open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            pass
        return Part(
            index=shard, samples=1, tokens=TOKENS, rows=1, entries=1, text_bytes=1, file_bytes=1, sha256=f"{shard:064x}"
        )


class Watching:
    """A ``Watch`` that remembers, and notes the kinds of events where jobs can see them."""

    def __init__(self, folder: Path | None = None, on: dict[str, Callable[[], None]] | None = None) -> None:
        self.events: list[Event] = []
        self.ticks = 0
        self._folder = folder
        self._on = dict(on or {})

    def see(self, event: Event) -> None:
        self.events.append(event)
        if self._folder is not None:
            note(str(self._folder), f"seen_{event.kind}")
        action = self._on.pop(event.kind, None)
        if action is not None:
            action()

    def tick(self) -> None:
        self.ticks += 1

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    def parts(self) -> list[int]:
        return sorted(event.shard for event in self.events if event.kind == "part")


def note(folder: str, name: str, text: str = "") -> None:
    (Path(folder) / name).write_text(text)


def notes(folder: Path, prefix: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))
