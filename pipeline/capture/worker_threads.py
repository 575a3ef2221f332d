"""A capture worker's four stages, overlapped so that the engine never waits for Python or for storage.

One thread reads and tokenizes shards ahead, the caller's thread keeps the engine fed, one thread packs rows, one writes
Parquet, uploads and commits. Queues between them are short, so memory does not grow with the corpus. When the engine
raises, every shard in it is suspect: they fail, and the worker ends, for nobody knows what state the engine is in; a
second attempt at a shard has the engine to itself, so that the guilty one is found.
"""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.executors.protocol import Lease, Message, Send, portable
from xtoken.pipeline.store.writer import Sample
from xtoken.pipeline.teachers.base import EngineLost, Question, Teacher, TeacherRows
from xtoken.schemas.manifest import Part

Audit = Callable[[int], None]
"""Looks at a committed shard by other means; called while the engine rests."""

_SHARDS_WAITING = 1  # packed, while one before them is published
_PROGRESS_SECONDS = 0.5
_BEAT_SECONDS, _MOST_BEATS = 20.0, 180  # during an audit; one that takes longer than an hour hangs


class Piece(Protocol):
    """What becomes one sample."""

    @property
    def sample_id(self) -> str:
        """The sample's."""
        ...

    @property
    def ids(self) -> NDArray[np.int32]:
        """Its tokens, int32 [T]."""
        ...

    @property
    def ends(self) -> NDArray[np.int32]:
        """Bytes of its text up to each token's end, int32 [T]."""
        ...

    @property
    def text(self) -> str:
        """What both tokenizers see of it."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the corpus that are done with it."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A shard that is ready for the engine.

    Attributes:
        pieces: of its documents, in order.
        prompts: int32 [T] of each, context included.
        batches: indices of the pieces that have rows, in batches of like lengths.
        counts: for the commit record.
        left_out: what is no sample, for the record of that.
        prompts_to_answer: what the teacher is to answer first; then there are no pieces yet.
        questions: the same as the engine is asked.
    """

    shard: int
    pieces: Sequence[Piece]
    prompts: list[NDArray[np.int32]]
    batches: list[list[int]]
    counts: Counter[str]
    left_out: Sequence[Mapping[str, str]] = ()
    prompts_to_answer: Sequence[Any] = ()
    questions: Sequence[Question] = ()


class Steps(Protocol):
    """What the stages do, one method each."""

    def prepare(self, shard: int) -> Prepared | Part:
        """Read and tokenize a shard; what is committed already, by whomever, is not done again."""
        ...

    def answered(self, prepared: Prepared, answers: Sequence[NDArray[np.int32]]) -> Prepared:
        """The shard with the teacher's answers to its questions, in their order."""
        ...

    def sample(self, piece: Piece, rows: TeacherRows | None) -> Sample:
        """Pack the rows of one piece."""
        ...

    def publish(self, prepared: Prepared, samples: Sequence[Sample]) -> Part:
        """Write, verify and commit a shard."""
        ...


@dataclass(eq=False)
class _Shard:
    """A shard on its way through the stages."""

    lease: Lease
    prepared: Prepared
    unanswered: int = 0  # windows in the engine
    fed: bool = False  # nothing of it is left to be given to the engine
    done: int = 0  # bytes of text scored
    reported: float = 0.0  # when progress was sent last
    rows: dict[int, Sample] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)  # committed or failed
    part: Part | None = None  # once it is committed
    held: bool = False  # its message waits for the audit: a driver without open shards ends its workers


_Key = tuple[_Shard, int]
_Batch = Sequence[tuple[_Key, NDArray[np.int32]]]
_Scored = tuple[_Shard, int, TeacherRows] | tuple[_Shard, None, None] | None


class TokenQueue(queue.Queue[_Scored]):
    """What the engine is done with; its size is counted in tokens, and one sample may go beyond the most."""

    def _init(self, maxsize: int) -> None:
        del maxsize
        self._items: deque[_Scored] = deque()
        self._tokens = 0

    def _qsize(self) -> int:
        return self._tokens

    def _put(self, item: _Scored) -> None:
        self._items.append(item)
        self._tokens += _weight(item)

    def _get(self) -> _Scored:
        item = self._items.popleft()
        self._tokens -= _weight(item)
        return item


def _weight(item: _Scored) -> int:
    """Tokens of a sample's rows; 1 of what has none."""
    return 1 if item is None or item[1] is None else len(item[0].prepared.prompts[item[1]])


class Stages:
    """One worker's threads and the queues between them."""

    def __init__(self, steps: Steps, teacher: Teacher, audit: Audit | None = None, *, most_waiting: int) -> None:
        """The stages of one worker.

        Args:
            steps: what they do.
            teacher: the engine.
            audit: of the first shard that is committed.
            most_waiting: tokens that the engine is done with and that are not packed yet; two steps of the engine keep
                it busy while Python is late by one.
        """
        self._steps = steps
        self._teacher = teacher
        self._audit = audit
        self._prepared: queue.Queue[_Shard | None] = queue.Queue(maxsize=1)
        self._scored = TokenQueue(maxsize=most_waiting)
        self._packed: queue.Queue[_Shard | None] = queue.Queue(maxsize=_SHARDS_WAITING)
        self._in_engine: list[_Shard] = []
        self._send: Send = _nobody

    def serve(self, leases: Iterator[Lease], send: Send) -> None:
        """See ``xtoken.pipeline.executors.protocol.Worker``; the engine is used by the calling thread only."""
        self._send = send
        threading.Thread(target=self._read_ahead, args=(leases,), name="xtoken-reader", daemon=True).start()
        packer = threading.Thread(target=self._pack_all, name="xtoken-packer", daemon=True)
        publisher = threading.Thread(target=self._publish_all, name="xtoken-publisher", daemon=True)
        packer.start()
        publisher.start()
        try:
            self._run_engine()
        except Exception as error:
            for shard in self._in_engine:
                self._fail(shard, error)
            if not self._in_engine and not isinstance(error, EngineLost):  # the audit refuses the rows
                send(Message("broken", error=portable(error)))
        finally:
            self._scored.put(None)
            packer.join()
            publisher.join()

    def _run_engine(self) -> None:
        audited = self._audit is None
        while not audited:
            shard = self._prepared.get()
            if shard is None:
                return
            shard.held = True
            self._stream(self._feed_one(shard))
            shard.closed.wait()
            if shard.part is not None:
                self._look_at(shard)
                self._send(Message("part", shard.lease.shard, part=shard.part))
                audited = True
        self._stream(self._feed_all())

    def _look_at(self, shard: _Shard) -> None:
        """Audit a committed shard; the driver learns that the worker lives, for loading a model can outlast a lease."""
        assert self._audit is not None
        done = threading.Event()
        beat = threading.Thread(target=self._beat, args=(shard, done), name="xtoken-beat", daemon=True)
        beat.start()
        try:
            self._audit(shard.lease.shard)
        finally:
            done.set()
            beat.join()

    def _beat(self, shard: _Shard, done: threading.Event) -> None:
        for _ in range(_MOST_BEATS):
            if done.wait(_BEAT_SECONDS):
                return
            self._send(Message("progress", shard.lease.shard, done=shard.done))

    def _stream(self, batches: Iterator[_Batch | None]) -> None:
        for key, rows in self._teacher.stream(batches):
            shard, index = cast(_Key, key)
            shard.unanswered -= 1
            self._scored.put((shard, index, rows))
            self._progress(shard, index)
            self._finish(shard)

    def _feed_all(self) -> Iterator[_Batch | None]:
        """Batches of shard after shard; None while the next one is not ready and the engine has work left."""
        while True:
            shard: _Shard | None
            try:
                shard = self._prepared.get(block=not self._in_engine)
            except queue.Empty:
                yield None
                continue
            if shard is None:
                return
            alone = shard.lease.attempt > 1
            while alone and self._in_engine:
                yield None
            yield from self._feed_one(shard)
            while alone and self._in_engine:
                yield None

    def _feed_one(self, shard: _Shard) -> Iterator[_Batch | None]:
        self._in_engine.append(shard)
        if shard.prepared.questions:
            shard.prepared = self._answered(shard)
        prepared = shard.prepared
        for batch in prepared.batches:
            if shard.closed.is_set():  # failed while being packed
                break
            shard.unanswered += len(batch)
            yield [((shard, index), prepared.prompts[index]) for index in batch]
        shard.fed = True
        self._finish(shard)

    def _answered(self, shard: _Shard) -> Prepared:
        """Have the teacher write the answers; the driver learns that the worker lives."""
        prepared, found = shard.prepared, dict[int, NDArray[np.int32]]()
        for number, ids in self._teacher.generate(prepared.questions):
            found[number] = ids
            self._alive(shard)
        return self._steps.answered(prepared, [found[number] for number in range(len(prepared.questions))])

    def _finish(self, shard: _Shard) -> None:
        """Pass a shard on once all of it is answered."""
        if shard.fed and shard.unanswered == 0 and shard in self._in_engine:
            self._in_engine.remove(shard)
            self._scored.put((shard, None, None))

    def _progress(self, shard: _Shard, index: int) -> None:
        shard.done += shard.prepared.pieces[index].size
        self._alive(shard)

    def _alive(self, shard: _Shard) -> None:
        now = time.monotonic()
        if now - shard.reported > _PROGRESS_SECONDS:
            shard.reported = now
            self._send(Message("progress", shard.lease.shard, done=shard.done))

    def _fail(self, shard: _Shard, error: BaseException) -> None:
        if not shard.closed.is_set():
            shard.closed.set()
            self._send(Message("failed", shard.lease.shard, error=portable(error)))

    def _read_ahead(self, leases: Iterator[Lease]) -> None:
        for lease in leases:
            self._send(Message("begun", lease.shard))
            try:
                prepared = self._steps.prepare(lease.shard)
            except BaseException as error:  # a panic of the tokenizer's is not an Exception
                self._send(Message("failed", lease.shard, error=portable(error)))
                continue
            if isinstance(prepared, Part):
                self._send(Message("part", lease.shard, part=prepared))
            else:
                self._prepared.put(_Shard(lease, prepared))
        self._prepared.put(None)

    def _pack_all(self) -> None:
        while (scored := self._scored.get()) is not None:
            shard, index, rows = scored
            if shard.closed.is_set():
                continue
            if index is None or rows is None:
                self._packed.put(shard)
                continue
            try:
                shard.rows[index] = self._steps.sample(shard.prepared.pieces[index], rows)
            except BaseException as error:
                self._fail(shard, error)
        self._packed.put(None)

    def _publish_all(self) -> None:
        while (shard := self._packed.get()) is not None:
            try:
                self._publish(shard)
            except BaseException as error:
                self._fail(shard, error)

    def _publish(self, shard: _Shard) -> None:
        pieces = shard.prepared.pieces
        samples = [shard.rows.get(at) or self._steps.sample(piece, None) for at, piece in enumerate(pieces)]
        shard.part = self._steps.publish(shard.prepared, samples)
        shard.rows.clear()
        shard.closed.set()
        if not shard.held:
            self._send(Message("part", shard.lease.shard, part=shard.part))


def _nobody(message: Message) -> None:
    del message
