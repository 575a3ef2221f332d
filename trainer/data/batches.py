"""From stored targets to optimizer steps: read ahead in threads, bounded memory, exact resume.

What a step is made of follows from the plan alone (see ``trainer.data.plan``). The caller's thread cuts steps, which
takes a look at sizes only; decoding row groups and laying samples out are tasks of a pool, so an error of theirs is
raised where the step is asked for, and nothing runs on behind the caller's back but what it has begun.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro, split_micros
from xtoken.trainer.data.plan import Plan, Position
from xtoken.trainer.data.samples import Sample, read_samples
from xtoken.trainer.data.sources import OwnedGroup, Sources
from xtoken.trainer.data.stream import Share, Stream, result_of

# Steps laid out before they are asked for: one that is ready while the next is made.
STEPS_AHEAD = 2
CLOSE_SECONDS = 10
T = TypeVar("T")


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: its micro-batches and denominators, and where the streams stand after it.

    Attributes:
        tokens: student tokens. predicted: those that count for CE. cut: tokens beyond ``Layout.max_tokens``.
        inputs: tokens that the forward passes read. padded: with their padding.
        untaught: conversations left out, as none of their first ``Layout.max_tokens`` tokens is taught.
        chunks: valid chunks per teacher. held: samples per teacher.
        totals: per teacher, what its term is divided by (see ``TeacherTargets.total``).
        positions: of each of the loader's streams.
    """

    micros: list[Micro]
    tokens: int
    predicted: int
    chunks: tuple[int, ...]
    held: tuple[int, ...]
    cut: int
    positions: tuple[Position, ...]
    inputs: int
    padded: int
    untaught: int
    totals: tuple[float, ...]

    @property
    def sample_ids(self) -> list[str]:
        """All samples of the step."""
        return [sample_id for micro in self.micros for sample_id in micro.sample_ids]


@dataclass(frozen=True)
class _Begun:
    """A step whose samples are chosen, and the micro-batches of each stream in the making."""

    shares: list[Share]
    micros: "list[Future[list[Micro]]]"


class Loader:
    """Endless optimizer steps over target folders, for one rank. Use it as a context manager, or ``close`` it.

    Args:
        sources: the folders.
        layout: how samples become inputs.
        step_tokens: student tokens per step of all streams together, each stream's part to the nearest sample; at
            least one, and no more samples than its epoch has.
        micro_tokens: inputs per forward pass, padding included.
        seed: seed of the order.
        streams: how many streams the samples are dealt to.
        mine: the streams that this rank reads.
        positions: where each of ``mine`` goes on.
        packing: lay several samples into a row of at most ``layout.max_tokens`` inputs.
        threads: decode and lay out in so many threads.

    Raises:
        XtokenError: fewer samples than streams.
    """

    def __init__(
        self,
        sources: Sources,
        layout: Layout,
        *,
        step_tokens: int,
        micro_tokens: int,
        seed: int,
        streams: int = 1,
        mine: Sequence[int] = (0,),
        positions: Sequence[Position] | None = None,
        packing: bool = False,
        threads: int = 1,
    ) -> None:
        self.sources, self.layout = sources, layout
        self._share_tokens, self._micro_tokens = max(1, step_tokens // streams), micro_tokens
        self._pack_tokens = layout.max_tokens if packing else None
        self.positions = tuple(positions or (Position() for _ in mine))
        assert len(self.positions) == len(mine), f"{len(self.positions)} positions for {len(mine)} streams"
        plan = Plan(sources, seed, streams)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._streams = [
            Stream(plan, stream, position, self._size, self._decode, 2 * threads)
            for stream, position in zip(mine, self.positions, strict=True)
        ]
        self._ahead: deque[_Begun] = deque()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Begin nothing more, and wait (not for ever) for what runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        _settle([micros for begun in self._ahead for micros in begun.micros])
        _settle([unit for stream in self._streams for unit in stream.begun])

    def step(self) -> StepBatch:
        """This rank's part of the next optimizer step.

        Raises:
            XtokenError, VerificationError: a row group cannot be read, or its samples hold nothing to predict.
        """
        while len(self._ahead) < STEPS_AHEAD and self._can_begin():
            self._ahead.append(self._begin())
        begun = self._ahead[0]
        micros = [result_of(micros) for micros in begun.micros]
        self._ahead.popleft()
        for share, made in zip(begun.shares, micros, strict=True):
            if not made:
                ids = ", ".join(sample.sample_id for sample in share.samples[:5])
                raise XtokenError(f"samples {ids} hold no token that the student can predict; {self._way_out()}")
        batch = self._batch(begun.shares, [micro for made in micros for micro in made])
        self.positions = batch.positions
        return batch

    def _way_out(self) -> str:
        if self.layout.chat:
            return f"none is taught among their first {self.layout.max_tokens}: raise --max-tokens"
        return "align a longer text"

    def _can_begin(self) -> bool:
        return not self._ahead or all(stream.ready(self._share_tokens) for stream in self._streams)

    def _begin(self) -> _Begun:
        shares = [stream.share(self._share_tokens) for stream in self._streams]
        return _Begun(shares, [self._pool.submit(self._lay_out, share.samples) for share in shares])

    def _lay_out(self, samples: list[Sample]) -> list[Micro]:
        return split_micros(samples, self._micro_tokens, self.layout.losses, self._pack_tokens)

    def _decode(self, unit: OwnedGroup) -> "Future[list[Sample]]":
        return self._pool.submit(_read_unit, self.sources, unit, self.layout)

    def _size(self, sample: Sample) -> int:
        if self.layout.chat and not sample.positions:
            return 0  # it is left out, and nothing reads its tokens
        return len(sample.sequence) - (self.layout.context is not None)

    def _batch(self, shares: Sequence[Share], micros: list[Micro]) -> StepBatch:
        samples = [sample for share in shares for sample in share.samples]
        teachers = range(len(self.layout.losses))
        return StepBatch(
            micros,
            sum(share.tokens for share in shares),
            sum(len(micro.label_P) for micro in micros),
            tuple(sum(len(micro.targets[i].first_C) for micro in micros) for i in teachers),
            tuple(sum(sample.targets[i] is not None for sample in samples) for i in teachers),
            sum(sample.cut for sample in samples),
            tuple(share.position for share in shares),
            sum(sample.inputs for sample in samples if sample.positions),
            sum(micro.input_BL.size for micro in micros),
            sum(not sample.positions for sample in samples) if self.layout.chat else 0,
            tuple(sum(micro.targets[i].total for micro in micros) for i in teachers),
        )


def _settle(begun: "list[Future[T]]") -> None:
    # one that was cancelled before it ran never tells a waiter
    wait([future for future in begun if not future.cancelled()], timeout=CLOSE_SECONDS)


def _read_unit(sources: Sources, unit: OwnedGroup, layout: Layout) -> list[Sample]:
    return read_samples(list(sources.read(unit, layout)), layout)
