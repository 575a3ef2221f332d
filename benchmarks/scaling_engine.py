"""The engines of benchmarks.scaling: one that sleeps for its GPU's time, and a crowd of workers that only talk."""

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead import InstantTeacher
from xtoken.pipeline.capture.plan import load_plan
from xtoken.pipeline.capture.worker import CaptureWorker, open_tokenizer
from xtoken.pipeline.executors.protocol import Lease, Message
from xtoken.pipeline.executors.ray_actor import Report
from xtoken.pipeline.store.codes import read_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import VOCAB_FILE, read_table
from xtoken.pipeline.teachers.base import Batch, TeacherRows
from xtoken.pipeline.teachers.fake_teacher import open_teacher
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import Part

ROWS = 8192
_IN_FLIGHT = 2  # batches that an engine holds at once, so that it never waits for the next


class SleepingTeacher(InstantTeacher):
    """Hands out rows of a block, each batch when a GPU of ``rate`` tokens per second would be done with it."""

    def __init__(self, path: Path, k: int, rate: float) -> None:
        super().__init__(path, k)
        self._rate = rate

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """See ``Teacher``; time in which no batch is ready is lost, as on a GPU."""
        flight: deque[tuple[float, Batch]] = deque()
        done, more = 0.0, True
        while more or flight:
            while more and len(flight) < _IN_FLIGHT:
                batch = next(batches, ())
                if batch is None:
                    break
                more = bool(batch)
                if more:
                    done = max(done, time.monotonic()) + sum(len(ids) for _, ids in batch) / self._rate
                    flight.append((done, batch))
            if flight:
                due, batch = flight.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                yield from zip([key for key, _ in batch], self.rows([ids for _, ids in batch]), strict=True)


@dataclass(frozen=True)
class SleepingJob:
    """``CaptureJob`` with another engine."""

    config: PrecomputeConfig
    rows: str
    rate: float
    ahead: int = 3

    def open(self, slot: int = 0) -> CaptureWorker:  # noqa: ARG002
        """See ``Job``."""
        folder = Folder(self.config.out)
        plan = load_plan(folder)
        assert plan is not None
        codes = read_codes(read_table(folder.url(VOCAB_FILE)))
        teacher = SleepingTeacher(Path(self.rows), self.config.codec.k, self.rate)
        return CaptureWorker(self.config, plan, open_tokenizer(self.config.teacher), teacher, None, codes)


def write_rows(path: Path, config: PrecomputeConfig, table: TokenTable) -> None:
    """A block of rows of the toy teacher, for engines to hand out."""
    ids = np.random.default_rng(0).integers(0, table.size, ROWS + 1).astype(np.int32)
    rows = open_teacher(config.teacher, config.codec, table).rows([ids])[0]
    space = np.zeros(0) if rows.space_logprob is None else rows.space_logprob
    np.savez(path, ids=rows.ids, logprob=rows.logprob, target_logprob=rows.target_logprob, space_logprob=space)


@dataclass
class _Member:
    """One worker of a crowd: what it has to say, and what it is to do."""

    messages: list[Message] = field(default_factory=list)
    taken: int = 0
    pressing: asyncio.Event = field(default_factory=asyncio.Event)
    leases: asyncio.Queue[Lease] = field(default_factory=asyncio.Queue)
    task: Any = None

    def send(self, message: Message) -> None:
        """As ``Mailbox`` does."""
        self.messages.append(message)
        self.pressing.set()


class Crowd:
    """An actor that answers for hundreds of workers, each of which says what a real one says while it sleeps."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens = seconds, tokens
        self._members: dict[int, _Member] = {}

    async def messages(self, slot: int, seen: int, patience: float) -> Report:
        """See ``RayWorker``."""
        member = self._members.setdefault(slot, _Member())
        if member.task is None:
            member.task = asyncio.create_task(self._work(member))
        del member.messages[: max(0, seen - member.taken)]
        member.taken = max(seen, member.taken)
        if not member.messages:
            member.pressing.clear()
            try:
                await asyncio.wait_for(member.pressing.wait(), patience)
            except TimeoutError:
                return Report([Message("progress", 0, done=1)], "", None)
        return Report(list(member.messages), "", None)

    async def lease(self, slot: int, call: int, leases: list[Lease]) -> None:  # noqa: ARG002
        """See ``RayWorker``."""
        for lease in leases:
            self._members[slot].leases.put_nowait(lease)

    async def _work(self, member: _Member) -> None:
        member.send(Message("open", place="here"))
        while True:
            lease = await member.leases.get()
            member.send(Message("begun", lease.shard))
            await asyncio.sleep(self._seconds)
            counts = dict.fromkeys(("samples", "rows", "entries", "text_bytes", "file_bytes"), 1)
            part = Part(index=lease.shard, tokens=self._tokens, sha256=f"{lease.shard:064x}", **counts)
            member.send(Message("part", lease.shard, part=part))
