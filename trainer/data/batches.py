"""From stored targets to optimizer steps: order by seed and epoch, bounded memory, exact resume.

Order: the row groups of all parts are shuffled; as many as hold ``WINDOW_SAMPLES`` are decoded together and their
samples shuffled among each other. Each row group is thus read once per epoch and memory stays bounded, at the price
that samples of distant windows never meet in one step. Steps run on over the end of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from schemas.errors import XtokenError
from trainer.data.micro import Micro, split_micros
from trainer.data.samples import Layout, Sample, read_sample
from trainer.data.sources import OwnedGroup, Sources

WINDOW_SAMPLES = 1024


@dataclass(frozen=True)
class Position:
    """Where a loader stands: samples already taken from an epoch."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: its micro-batches and denominators, and where the loader stands after it.

    Attributes:
        tokens: student tokens. predicted: those that count for CE. cut: tokens beyond ``Layout.max_tokens``.
        chunks: valid chunks per teacher. held: samples per teacher.
    """

    micros: list[Micro]
    tokens: int
    predicted: int
    chunks: tuple[int, ...]
    held: tuple[int, ...]
    cut: int
    after: Position

    @property
    def sample_ids(self) -> list[str]:
        """All samples of the step."""
        return [sample_id for micro in self.micros for sample_id in micro.sample_ids]


class Loader:
    """Endless optimizer steps over target folders.

    Args:
        sources: the folders.
        layout: how samples become inputs.
        step_tokens: student tokens per step, at least one sample, and no sample twice in a step.
        micro_tokens: padded inputs per forward pass.
        seed: seed of the order.
        position: where to go on.
    """

    def __init__(
        self,
        sources: Sources,
        layout: Layout,
        *,
        step_tokens: int,
        micro_tokens: int,
        seed: int,
        position: Position = Position(),
    ) -> None:
        self.sources, self.layout = sources, layout
        self.step_tokens, self.micro_tokens, self.seed = step_tokens, micro_tokens, seed
        self.position = position
        self._samples = self._from(position)
        self._next: tuple[Sample, Position] | None = None

    def step(self) -> StepBatch:
        """The next optimizer step."""
        samples: list[Sample] = []
        tokens = 0
        while len(samples) < self.sources.samples:
            self._next = self._next or next(self._samples)
            sample, after = self._next
            size = self._size(sample)
            if samples and tokens + size > self.step_tokens:
                break
            samples.append(sample)
            tokens, self.position, self._next = tokens + size, after, None
        micros = split_micros(samples, self.micro_tokens, self.layout.losses)
        if not micros:
            ids = ", ".join(sample.sample_id for sample in samples[:5])
            raise XtokenError(f"samples {ids} hold no token that the student can predict; align a longer text")
        return StepBatch(
            micros,
            tokens,
            sum(len(micro.label_P) for micro in micros),
            tuple(sum(len(m.lessons[i].first_C) for m in micros) for i in range(len(self.layout.losses))),
            tuple(sum(s.targets[i] is not None for s in samples) for i in range(len(self.layout.losses))),
            sum(sample.cut for sample in samples),
            self.position,
        )

    def _size(self, sample: Sample) -> int:
        return len(sample.sequence) - (self.layout.context is not None)

    def _from(self, position: Position) -> Iterator[tuple[Sample, Position]]:
        """Samples from a position on, each with the position after it."""
        epoch, skip = position.epoch, position.taken
        while True:
            taken = 0
            for window in self._windows(epoch):
                rows = sum(len(group.rows) for group in window)
                if taken + rows > skip:
                    for offset, sample in self._window_samples(window, epoch, max(0, skip - taken)):
                        yield sample, Position(epoch, taken + offset + 1)
                taken += rows
            epoch, skip = epoch + 1, 0

    def _windows(self, epoch: int) -> list[list[OwnedGroup]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sources.groups))
        windows: list[list[OwnedGroup]] = [[]]
        for group in (self.sources.groups[i] for i in order):
            if sum(len(one.rows) for one in windows[-1]) >= WINDOW_SAMPLES:
                windows.append([])
            windows[-1].append(group)
        return windows

    def _window_samples(self, window: list[OwnedGroup], epoch: int, skip: int) -> Iterator[tuple[int, Sample]]:
        samples = [
            read_sample(stored, self.layout) for group in window for stored in self.sources.read(group, self.layout)
        ]
        first = window[0]
        seed = [self.seed, epoch, first.ref.part, first.ref.group, *([first.source] if first.source else [])]
        order = np.random.default_rng(seed).permutation(len(samples))
        for offset in range(skip, len(samples)):
            yield offset, samples[order[offset]]
