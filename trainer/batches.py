"""From stored targets to micro-batches: order by seed and epoch, bounded memory, exact resume.

Order: the row groups of all parts are shuffled; as many as hold ``WINDOW_SAMPLES`` are decoded together and their
samples shuffled among each other. Each row group is thus read once per epoch and memory stays bounded, at the price
that samples of distant windows never meet in one step. Steps run on over the end of an epoch.

Shapes: B samples, L padded inputs, P predicting positions of a micro-batch, C chunks, K entries summed over chunks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import VerificationError, XtokenError
from schemas.manifest import TokenizerInfo
from trainer.losses.base import Array, ChunkColumns
from trainer.targets import GroupRef, RowGroup, Targets

WINDOW_SAMPLES = 1024
BASE_COLUMNS = ("student_ids", "chunk_student_end")
NORMALISED_WITHIN = 1e-3  # float32 log-probabilities of up to 256 cells sum to 1 far closer than this


@dataclass(frozen=True)
class Layout:
    """How samples become inputs.

    Attributes:
        context: token shown before each sample, or None: then a sample's first token is not predicted.
        max_tokens: student tokens kept of a sample.
        vocabulary: ids of the student's tokenizer.
        chunks: columns of the loss.
    """

    context: int | None
    max_tokens: int
    vocabulary: int
    chunks: ChunkColumns


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        sequence: int32, the context token (if any) and the student tokens; position j predicts token j + 1.
        position_C: int64, the position that predicts the chunk's first token; valid chunks only.
        columns: the loss's columns for these chunks.
        cut: tokens of the stored sample beyond ``Layout.max_tokens``.
    """

    sample_id: str
    sequence: NDArray[np.int32]
    position_C: NDArray[np.int64]
    columns: Mapping[str, Array]
    cut: int = 0

    @property
    def inputs(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.sequence) - 1


@dataclass(frozen=True)
class Micro:
    """Samples of one forward pass, padded on the right.

    Attributes:
        input_BL: int64. length_B: int64, inputs per sample.
        place_P: int64, flat places in [B, L] that predict a token. label_P: int64, these tokens.
        row_C: int64, ascending: index into P of each chunk's position.
        columns: the loss's columns, chunks of all samples in order.
        chunks: which columns are per chunk and which per entry.
    """

    sample_ids: tuple[str, ...]
    input_BL: NDArray[np.int64]
    length_B: NDArray[np.int64]
    place_P: NDArray[np.int64]
    label_P: NDArray[np.int64]
    row_C: NDArray[np.int64]
    columns: Mapping[str, Array]
    chunks: ChunkColumns

    def chunk_slice(self, low: int, high: int) -> dict[str, Array]:
        """The loss's columns of chunks ``low`` to ``high``."""
        picked = {name: self.columns[name][low:high] for name in self.chunks.per_chunk}
        for count_name, names in self.chunks.entries.items():
            count_C = self.columns[count_name].astype(np.int64)
            first, last = int(count_C[:low].sum()), int(count_C[:high].sum())
            picked[count_name] = count_C[low:high]
            picked |= {name: self.columns[name][first:last] for name in names}
        return picked


@dataclass(frozen=True)
class Position:
    """Where a loader stands: samples already taken from an epoch."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: its micro-batches, its denominators, tokens cut off, and where the loader stands after it."""

    micros: list[Micro]
    tokens: int
    predicted: int
    chunks: int
    cut: int
    after: Position

    @property
    def sample_ids(self) -> list[str]:
        """All samples of the step."""
        return [sample_id for micro in self.micros for sample_id in micro.sample_ids]


def context_token(tokenizer: TokenizerInfo) -> int | None:
    """The token before every sample: BOS where the tokenizer adds one, else eos as document separator, else none."""
    return tokenizer.bos_id if tokenizer.adds_bos and tokenizer.bos_id is not None else tokenizer.eos_id


def with_context(ids: NDArray[np.int32], layout: Layout) -> NDArray[np.int32]:
    """Context token and at most ``max_tokens`` tokens."""
    context = [] if layout.context is None else [layout.context]
    return np.concatenate([np.asarray(context, np.int32), ids[: layout.max_tokens]])


def read_sample(group: RowGroup, row: int, layout: Layout) -> Sample:
    """Build a sample from a stored row, dropping chunks that are cut, unpredicted or without teacher row.

    Raises:
        VerificationError: the row's lists do not fit each other, or hold an id outside the vocabulary.
    """
    ids, end_C = group.values("student_ids", row), group.values("chunk_student_end", row).astype(np.int64)
    columns = {name: group.values(name, row) for name in layout.chunks.names}
    if not _fits(ids, end_C, columns, layout):
        raise VerificationError(
            f"sample {group.sample_ids[row]!r} in part {group.ref.part} of the targets contradicts itself; "
            "run 'xtoken verify' on the targets and write them again"
        )
    start_C = np.concatenate([[0], end_C[:-1]]).astype(np.int64)[: len(end_C)]
    shift = 0 if layout.context is not None else -1
    valid_C = (end_C > start_C) & (end_C <= layout.max_tokens) & (start_C + shift >= 0) & _has_entries(columns, layout)
    kept = _select(columns, valid_C, layout.chunks)
    sequence = with_context(ids.astype(np.int32), layout)
    cut = max(0, len(ids) - layout.max_tokens)
    return Sample(group.sample_ids[row], sequence, (start_C + shift)[valid_C], kept, cut)


def _fits(ids: Array, end_C: NDArray[np.int64], columns: Mapping[str, Array], layout: Layout) -> bool:
    if len(ids) and (ids.min() < 0 or ids.max() >= layout.vocabulary):
        return False
    if len(end_C) and (end_C[0] < 0 or end_C[-1] > len(ids) or (np.diff(end_C) < 0).any()):
        return False
    if any(len(columns[name]) != len(end_C) for name in (*layout.chunks.per_chunk, *layout.chunks.entries)):
        return False
    for count_name, names in layout.chunks.entries.items():
        count_C = columns[count_name]
        if any(len(columns[name]) != count_C.sum() for name in names) or (count_C < 0).any():
            return False
    return "pkl_count" not in columns or _normalised(columns)


def _normalised(columns: Mapping[str, Array]) -> bool:
    """P-KL's cells sum to 1 in every chunk with entries; without that a KL could fall below zero."""
    count_C = columns["pkl_count"].astype(np.int64)
    owner_K = np.repeat(np.arange(len(count_C)), count_C)
    kept_C = np.bincount(owner_K, np.exp(columns["pkl_logprob"].astype(np.float64)), len(count_C))
    sum_C = kept_C + np.exp(columns["pkl_rest_logprob"].astype(np.float64))
    return bool((np.abs(sum_C - 1)[count_C > 0] < NORMALISED_WITHIN).all())


def _has_entries(columns: Mapping[str, Array], layout: Layout) -> NDArray[np.bool_]:
    counts = [columns[name].astype(np.int64) for name in layout.chunks.entries]
    return np.sum(counts, axis=0) > 0 if counts else np.zeros(1, np.bool_)


def _select(columns: Mapping[str, Array], valid_C: NDArray[np.bool_], chunks: ChunkColumns) -> dict[str, Array]:
    kept = {name: columns[name][valid_C] for name in (*chunks.per_chunk, *chunks.entries)}
    for count_name, names in chunks.entries.items():
        valid_K = np.repeat(valid_C, columns[count_name].astype(np.int64))
        kept |= {name: columns[name][valid_K] for name in names}
    return kept


def make_micro(samples: Sequence[Sample], chunks: ChunkColumns) -> Micro:
    """Pad samples (each with at least one input) into one forward pass."""
    length_B = np.array([sample.inputs for sample in samples], np.int64)
    width = int(length_B.max())
    input_BL = np.zeros((len(samples), width), np.int64)
    for row, sample in enumerate(samples):
        input_BL[row, : sample.inputs] = sample.sequence[:-1]
    first_B = np.cumsum(length_B) - length_B
    places = [row * width + np.arange(n, dtype=np.int64) for row, n in enumerate(length_B)]
    columns = {name: np.concatenate([sample.columns[name] for sample in samples]) for name in chunks.names}
    return Micro(
        tuple(sample.sample_id for sample in samples),
        input_BL,
        length_B,
        np.concatenate(places),
        np.concatenate([sample.sequence[1:] for sample in samples]).astype(np.int64),
        np.concatenate([first + sample.position_C for first, sample in zip(first_B, samples, strict=True)]),
        columns,
        chunks,
    )


def split_micros(samples: Sequence[Sample], micro_tokens: int, chunks: ChunkColumns) -> list[Micro]:
    """Micro-batches of at most ``micro_tokens`` padded inputs (or one sample), longest first to pad little."""
    ordered = sorted((s for s in samples if s.inputs > 0), key=lambda sample: -sample.inputs)
    piles: list[list[Sample]] = []
    for sample in ordered:
        if piles and (len(piles[-1]) + 1) * piles[-1][0].inputs <= micro_tokens:
            piles[-1].append(sample)
        else:
            piles.append([sample])
    return [make_micro(pile, chunks) for pile in piles]


class Loader:
    """Endless optimizer steps over a target folder.

    Args:
        targets: the folder.
        layout: how samples become inputs.
        step_tokens: student tokens per step, at least one sample, and no sample twice in a step.
        micro_tokens: padded inputs per forward pass.
        seed: seed of the order.
        position: where to go on.
    """

    def __init__(
        self,
        targets: Targets,
        layout: Layout,
        *,
        step_tokens: int,
        micro_tokens: int,
        seed: int,
        position: Position = Position(),
    ) -> None:
        self.targets, self.layout = targets, layout
        self.step_tokens, self.micro_tokens, self.seed = step_tokens, micro_tokens, seed
        self.position = position
        self._samples = self._from(position)
        self._next: tuple[Sample, Position] | None = None

    def step(self) -> StepBatch:
        """The next optimizer step."""
        samples: list[Sample] = []
        tokens = 0
        while len(samples) < self.targets.samples:
            self._next = self._next or next(self._samples)
            sample, after = self._next
            size = self._size(sample)
            if samples and tokens + size > self.step_tokens:
                break
            samples.append(sample)
            tokens, self.position, self._next = tokens + size, after, None
        micros = split_micros(samples, self.micro_tokens, self.layout.chunks)
        if not micros:
            ids = ", ".join(sample.sample_id for sample in samples[:5])
            raise XtokenError(f"samples {ids} hold no token that the student can predict; align a longer text")
        predicted, chunks = sum(len(m.label_P) for m in micros), sum(len(m.row_C) for m in micros)
        return StepBatch(micros, tokens, predicted, chunks, sum(sample.cut for sample in samples), self.position)

    def _size(self, sample: Sample) -> int:
        return len(sample.sequence) - (self.layout.context is not None)

    def _from(self, position: Position) -> Iterator[tuple[Sample, Position]]:
        """Samples from a position on, each with the position after it."""
        epoch, skip = position.epoch, position.taken
        while True:
            taken = 0
            for window in self._windows(epoch):
                rows = sum(ref.rows for ref in window)
                if taken + rows > skip:
                    for offset, sample in self._window_samples(window, epoch, max(0, skip - taken)):
                        yield sample, Position(epoch, taken + offset + 1)
                taken += rows
            epoch, skip = epoch + 1, 0

    def _windows(self, epoch: int) -> list[list[GroupRef]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.targets.groups))
        windows: list[list[GroupRef]] = [[]]
        for ref in (self.targets.groups[i] for i in order):
            if sum(group.rows for group in windows[-1]) >= WINDOW_SAMPLES:
                windows.append([])
            windows[-1].append(ref)
        return windows

    def _window_samples(self, window: list[GroupRef], epoch: int, skip: int) -> Iterator[tuple[int, Sample]]:
        groups = [self.targets.read(ref, (*BASE_COLUMNS, *self.layout.chunks.names)) for ref in window]
        places = [(group, row) for group in groups for row in range(group.ref.rows)]
        seed = [self.seed, epoch, window[0].part, window[0].group]
        order = np.random.default_rng(seed).permutation(len(places))
        for offset in range(skip, len(places)):
            group, row = places[order[offset]]
            yield offset, read_sample(group, row, self.layout)
