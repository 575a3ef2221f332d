"""A capture job in whose workers something breaks at documents that hold a word, until a file is removed.

In a module that worker processes can import.
"""

import os
import signal
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.worker import CaptureJob, CaptureWorker
from xtoken.pipeline.capture.worker_threads import Prepared
from xtoken.pipeline.store.writer import Sample
from xtoken.pipeline.teachers.base import Batch, Teacher, TeacherRows
from xtoken.pipeline.tokens import Encoded, TextTokenizer, TokenTable
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import Part

_WAIT_SECONDS = 120.0


class Panic(BaseException):
    """What a library written in Rust raises when it panics: no Exception."""


@dataclass(frozen=True)
class FaultyJob:
    """A ``xtoken.pipeline.executors.protocol.Job``; it may be sent to worker processes.

    Attributes:
        config: of the capture.
        folder: where workers, shards begun and hits are noted, a file each; the file ``fixed`` ends the faults.
        word: documents that hold it are hit.
        tokenizer, engine: what happens there: raise, panic, die; or nothing.
        waits: words at which the engine waits: ``commit N`` (the first attempt only: for the record of a part),
            ``published N`` (until two attempts have published it), ``overdue`` (for such an event in the log).
        pace: seconds that each batch takes in addition.
    """

    config: PrecomputeConfig
    folder: str
    word: str = ""
    tokenizer: str = ""
    engine: str = ""
    waits: Mapping[str, str] = field(default_factory=dict)
    pace: float = 0.0

    @classmethod
    def maker(cls, fields: dict[str, Any]) -> "Callable[[PrecomputeConfig], FaultyJob]":
        """For ``precompute(make_job=...)``."""
        return partial(cls, **fields)

    @property
    def ahead(self) -> int:
        """As many as a capture's."""
        return CaptureJob(self.config).ahead

    def open(self, slot: int = 0) -> CaptureWorker:
        """A capture's worker with a tokenizer and a teacher that break."""
        worker = CaptureJob(self.config).open(slot)
        (Path(self.folder) / f"pid-{os.getpid()}").touch()
        worker.prepare = partial(self._prepare, worker.prepare)  # type: ignore[method-assign]
        worker.publish = partial(self._publish, worker.publish)  # type: ignore[method-assign]
        worker._tokenizer = FaultyTokenizer(worker._tokenizer, self)
        worker.teacher = FaultyTeacher(worker.teacher, worker._tokenizer.table, self)
        return worker

    def _prepare(self, prepare: Callable[[int], Prepared], shard: int) -> Prepared:
        (Path(self.folder) / f"begun-{os.getpid()}-{shard}").touch()
        return prepare(shard)

    def _publish(self, publish: Callable[..., Part], prepared: Prepared, samples: Sequence[Sample]) -> Part:
        part = publish(prepared, samples)
        (Path(self.folder) / f"published-{os.getpid()}-{prepared.shard}").touch()
        return part

    def wait(self, condition: str) -> None:
        """Until it holds, or for so long that the test fails by its figures."""
        if condition.startswith("commit") and not _first(Path(self.folder) / "stalled"):
            return
        until = time.monotonic() + _WAIT_SECONDS
        while not self._holds(*condition.split()) and time.monotonic() < until:
            time.sleep(0.02)

    def _holds(self, what: str, part: str = "") -> bool:
        out = Path(self.config.out)
        if what == "commit":
            return (out / "commits" / f"part-{int(part):05d}.json").exists()
        if what == "published":
            return len(list(Path(self.folder).glob(f"published-*-{part}"))) > 1
        return '"overdue"' in (out / "log.jsonl").read_text()

    def break_down(self, what: str, where: str) -> None:
        """Do ``what``, having counted it."""
        folder = Path(self.folder)
        if not what or (folder / "fixed").exists():
            return
        (folder / f"{where}-{what}-{time.monotonic_ns()}").touch()
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise Panic("index out of bounds") if what == "panic" else RuntimeError(f"the {where} is broken")


def _first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class FaultyTokenizer:
    """A ``TextTokenizer`` that breaks at texts with the word, and is another one in all else."""

    def __init__(self, inner: TextTokenizer, job: FaultyJob) -> None:
        self._inner = inner
        self._job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, **how: Any) -> Encoded:
        """See ``TextTokenizer``."""
        self._look(text)
        return self._inner.encode(text, **how)

    def encode_batch(self, texts: Sequence[str], *args: Any, **how: Any) -> list[Encoded]:
        """See ``TextTokenizer``."""
        for text in texts:
            self._look(text)
        return self._inner.encode_batch(texts, *args, **how)

    def _look(self, text: str) -> None:
        if self._job.word in text:
            self._job.break_down(self._job.tokenizer, "tokenizer")


class FaultyTeacher:
    """A ``Teacher`` that breaks at sequences whose bytes hold the word, and is another one in all else."""

    def __init__(self, inner: Teacher, table: TokenTable, job: FaultyJob) -> None:
        self._inner = inner
        self._table = table
        self._job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """See ``Teacher``."""
        for ids in batch:
            self._look(ids)
        return self._inner.rows(batch)

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """See ``Teacher``."""
        return self._inner.stream(map(self._looked, batches))

    def _looked(self, batch: Batch | None) -> Batch | None:
        time.sleep(self._job.pace if batch else 0.0)
        for _, ids in batch or ():
            self._look(ids)
        return batch

    def _look(self, ids: NDArray[np.int32]) -> None:
        job, table = self._job, self._table
        text = b"".join(table.data[table.offsets[at] : table.offsets[at + 1]].tobytes() for at in ids.tolist())
        if job.engine and job.word.encode() in text:
            job.break_down(job.engine, "engine")
        for word, condition in job.waits.items():
            if word.encode() in text:
                job.wait(condition)
