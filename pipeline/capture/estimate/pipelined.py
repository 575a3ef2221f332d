"""The speed of an engine that is kept busy, by a worker's own threads.

A GPU scores the few thousand tokens of a pilot in one step, most of which is latency. Its rate is taken from a stream
of steps instead, packed as those of a capture and then forgotten, without the first: what starts up in them is paid
once.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.worker import CaptureWorker
from xtoken.pipeline.capture.worker_threads import Piece, Prepared, Stages
from xtoken.pipeline.executors.protocol import Lease, Message
from xtoken.pipeline.store.writer import Sample
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.manifest import Part

STEPS, WARM_STEPS = 20, 2  # of the engine: all, and those that are not counted


def busy_rate(worker: CaptureWorker, pieces: Sequence[Piece]) -> float:
    """Rows per second of a worker that scores samples over and over until its engine has done enough steps.

    Raises:
        XtokenError: as ``Teacher.stream``, or a sample that cannot be packed.
    """
    step = worker.step_tokens
    steps = _Timed(worker, repeated(pieces, STEPS * step))
    messages: list[Message] = []
    stages = Stages(steps, worker.teacher, most_waiting=worker.most_waiting)
    stages.serve(iter([Lease(0)]), messages.append)
    errors = [message.error for message in messages if message.error is not None]
    if errors:
        raise errors[0]
    return rate_when_warm(steps.packed, WARM_STEPS * step)


def repeated(pieces: Sequence[Piece], tokens: int) -> list[Piece]:
    """The pieces, over and over, until they have so many tokens."""
    sizes = [len(piece.ids) for piece in pieces]
    rounds, rest = divmod(tokens, sum(sizes))
    more = int(np.searchsorted(np.cumsum(sizes), rest)) + 1
    return list(islice(cycle(pieces), rounds * len(pieces) + more))


def rate_when_warm(packed: Iterable[tuple[float, int]], warm: int) -> float:
    """Rows per second from the last moment at which at most ``warm`` rows were there, until the end.

    Args:
        packed: the time, in seconds, at which each sample was there, and its rows; in order.
        warm: rows that are not counted.
    """
    times, rows = (np.array(values) for values in zip(*packed, strict=True))
    done = np.cumsum(rows)
    began = max(0, int(np.searchsorted(done, warm, side="right")) - 1)
    return float((done[-1] - done[began]) / max(times[-1] - times[began], 1e-9))


@dataclass
class _Timed:
    """``Steps`` of a worker over one shard of given samples, of which nothing is kept but when they were packed."""

    worker: CaptureWorker
    pieces: Sequence[Piece]
    packed: list[tuple[float, int]] = field(default_factory=list)

    def prepare(self, shard: int) -> Prepared:
        return self.worker.prepared(shard, self.pieces, Counter())

    def answered(self, prepared: Prepared, answers: Sequence[NDArray[np.int32]]) -> Prepared:
        del answers
        return prepared

    def sample(self, piece: Piece, rows: TeacherRows | None) -> Sample:
        sample = self.worker.sample(piece, rows)
        if rows is not None:
            self.packed.append((time.monotonic(), len(rows.target_logprob)))
        return sample

    def publish(self, prepared: Prepared, samples: Sequence[Sample]) -> Part:
        del samples
        nothing = dict.fromkeys(("samples", "tokens", "rows", "entries", "text_bytes", "file_bytes"), 0)
        return Part(index=prepared.shard, sha256="0" * 64, **nothing)
