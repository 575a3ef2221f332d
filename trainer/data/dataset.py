"""Targets as a torch dataset, for training loops of others: ``xtoken.targets_dataset``.

Shapes: B rows, L inputs of a row.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from xtoken.schemas.configs.train import DataGroup, LossGroup, LossOptions
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro, make_micro
from xtoken.trainer.data.packing import packed_shapes
from xtoken.trainer.data.plan import Plan, Position
from xtoken.trainer.data.samples import Sample, context_token, read_samples
from xtoken.trainer.data.sources import OwnedGroup, Sources, refuse_unlike
from xtoken.trainer.data.stream import Stream
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup

Batch = dict[str, Any]
_AHEAD = 2  # row groups of the next window that are decoded from the start


@dataclass(frozen=True)
class Asked:
    """Which targets teach which losses; decides, with a vocabulary and a device, what the losses are.

    Attributes:
        urls: of the targets. losses: one for each. options: of all losses, as JSON.
        contents: content hash of each.
    """

    urls: tuple[str, ...]
    losses: tuple[str, ...]
    options: str
    contents: tuple[str, ...]

    def opened(self, vocabulary: int, device: torch.device) -> tuple[Loss, ...]:
        """The losses of a student that predicts so many tokens."""
        return _opened(self, vocabulary, device)


@lru_cache(maxsize=8)
def _opened(asked: Asked, vocabulary: int, device: torch.device) -> tuple[Loss, ...]:
    options, found = LossOptions.model_validate_json(asked.options), []
    for url, name, content in zip(asked.urls, asked.losses, asked.contents, strict=True):
        targets = Targets(url)
        if targets.hash != content:
            raise XtokenError(f"{url} holds other targets than when the dataset was opened; open it again")
        if vocabulary < targets.needed_width:
            raise XtokenError(
                f"the student predicts {vocabulary} tokens, and those of {url} go up to {targets.needed_width - 1}; "
                "give a model of the tokenizer that the targets were aligned for"
            )
        manifest = targets.manifest
        sizes = vocabulary, manifest.teacher_tokenizer.size
        setup = LossSetup(
            targets.w.within(vocabulary), targets.vocab, *sizes, device, options, manifest.tau, manifest.merge
        )
        found.append(open_loss(name, setup))
    return tuple(found)


@lru_cache(maxsize=4)
def _sources(asked: Asked, process: int) -> Sources:
    """The folders opened once in a process, for all epochs; a process that was forked opens its own."""
    del process
    return Sources([Targets(url) for url in asked.urls])


@dataclass(frozen=True)
class BatchTargets:
    """What a batch is taught: given to ``xtoken.distillation_loss`` as it is.

    Attributes:
        micro: the samples as the losses read them.
        asked: which losses.
        vocabulary: ids of the student's tokenizer.
    """

    micro: Micro
    asked: Asked
    vocabulary: int

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """The samples, row after row."""
        return self.micro.sample_ids

    @property
    def predicted(self) -> int:
        """Tokens that cross-entropy counts."""
        return len(self.micro.label_P)

    @property
    def totals(self) -> tuple[float, ...]:
        """What the sums of cross-entropy and of each teacher's loss are divided by: tokens, then chunks."""
        return (float(self.predicted), *(one.total for one in self.micro.targets))


class TargetsDataset(IterableDataset[Sample]):
    """Samples of targets in a shuffled order that follows from the seed; ``collate`` makes a batch of some.

    One epoch per ``iter``; the next one has another order. Under ``torch.distributed`` (or with ``RANK`` and
    ``WORLD_SIZE`` in the environment) and with workers of a DataLoader each gets its own share, so the loader must not
    be split again: do not hand it to ``accelerator.prepare``.

    ``state_dict`` is exact in a loader without workers; with workers torchdata's ``StatefulDataLoader`` keeps it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        losses: Sequence[str],
        options: LossOptions,
        max_tokens: int,
        pack: bool,
        seed: int,
        weights: Sequence[float],
        weighting: str,
        share: tuple[int, int],
    ) -> None:
        self._seed, self._share, self._pack = seed, share, pack
        folders = [Targets(url) for url in urls]
        for folder, loss in zip(folders, losses, strict=True):
            folder.require(loss)
            folder.require_options(loss, options)
            folder.require_weighting(weighting)
        refuse_unlike(folders)
        students = {folder.manifest.student.hash: folder for folder in folders}
        if len(students) > 1:
            raise XtokenError(f"{' and '.join(folder.root for folder in students.values())} are of other tokenizers")
        first = folders[0].manifest
        hashes = tuple(folder.hash for folder in folders)
        self.asked = Asked(tuple(urls), tuple(losses), options.model_dump_json(), hashes)
        self.vocabulary = first.student.size
        self._context = context_token(first.student) if first.chat is None else None
        self._rest: dict[str, Any] = {"max_tokens": max_tokens, "weights": tuple(weights), "weighting": weighting}
        self._chat = first.chat is not None
        self._position = Position()
        self._streams: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        stream, streams = self._stream()
        if self._streams not in (None, streams):
            raise XtokenError(
                f"the state was saved by {self._streams} readers (ranks times workers), and there are {streams}; go on "
                "with as many"
            )
        self._streams = streams
        return self._samples(stream, streams)

    def _samples(self, stream: int, streams: int) -> Iterator[Sample]:
        layout, sources, epoch = self._layout(), _sources(self.asked, os.getpid()), self._position.epoch
        if sources.samples < streams:
            raise XtokenError(
                f"{sources.samples} samples cannot be shared by {streams} readers (ranks times workers); take fewer"
            )
        with ThreadPoolExecutor(1, thread_name_prefix="targets") as pool:

            def decode(unit: OwnedGroup) -> "Future[list[Sample]]":
                return pool.submit(_read, sources, unit, layout)

            plan = Plan(sources, self._seed, streams)
            of_epoch = sum(len(unit.rows) for unit in plan.units(epoch)[stream])
            reader = Stream(plan, stream, self._position, _one, decode, _AHEAD)
            try:
                while self._position.taken < of_epoch:
                    # of one sample, and of those before it that nothing is taught of
                    share = reader.share(1)
                    if share.position.epoch > epoch:
                        break
                    self._position = share.position
                    yield from (sample for sample in share.samples if sample.positions)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        self._position = Position(epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, by its number from 0; nothing happens within the one that is read."""
        if epoch != self._position.epoch:
            self._position = Position(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where this reader stands."""
        place = self._position
        return {"epoch": place.epoch, "taken": place.taken, "streams": self._streams or self._stream()[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where ``state_dict`` stood."""
        self._position, self._streams = Position(state["epoch"], state["taken"]), state["streams"]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch: what the model is called with, and ``targets`` for the loss.

        ``input_ids``, int64 [B, L]: a sample to a row, padded on the right; attention looks to the left and needs no
        mask. Where the dataset packs, a row is of several samples that ``position_ids`` tell apart, which transformers'
        models look at only with ``use_cache=False``: that is in the batch, too.
        """
        sizes = [sample.inputs for sample in samples]
        rows, width = [[at] for at in range(len(samples))], max(sizes)
        if self._pack:
            (shape,) = packed_shapes(sizes, sum(sizes) * len(sizes), max(self._rest["max_tokens"], width))
            rows, width = shape.rows, shape.width
        micro = make_micro([[samples[at] for at in row] for row in rows], width, self._layout().losses)
        batch: Batch = {"input_ids": torch.from_numpy(micro.input_BL), "use_cache": False}
        if self._pack:
            batch["position_ids"] = torch.from_numpy(micro.position_BL)
        return batch | {"targets": BatchTargets(micro, self.asked, self.vocabulary)}

    def _layout(self) -> Layout:
        losses = self.asked.opened(self.vocabulary, torch.device("cpu"))
        return Layout(self._context, vocabulary=self.vocabulary, losses=losses, chat=self._chat, **self._rest)

    def _stream(self) -> tuple[int, int]:
        rank, ranks = self._share
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return rank * workers + number, ranks * workers


def _one(sample: Sample) -> int:
    """What a sample counts for: shares are of one."""
    return int(sample.positions > 0)


def _read(sources: Sources, unit: OwnedGroup, layout: Layout) -> list[Sample]:
    return read_samples(list(sources.read(unit, layout)), layout)


def targets_dataset(
    targets: str | Sequence[str],
    loss: str | Sequence[str] = "p-kl",
    *,
    max_tokens: int = 1024,
    pack: bool = False,
    seed: int = 0,
    weights: Sequence[float] = (),
    weighting: str = "static",
    share: tuple[int, int] | None = None,
    **options: Any,
) -> TargetsDataset:
    """Samples for a training loop of your own; see ``TargetsDataset``.

    ::

        dataset = xtoken.targets_dataset("llama.targets", loss="p-kl")
        for batch in DataLoader(dataset, batch_size=8, collate_fn=dataset.collate):
            targets = batch.pop("targets")
            xtoken.distillation_loss(model(**batch).logits, targets).loss.backward()

    Args:
        targets: folder or URL that ``xtoken align`` wrote, or one per teacher.
        loss: as ``xtoken train --loss``, or one per folder.
        max_tokens: student tokens per sample; the rest of a sample is cut off.
        pack: lay several samples into a row of at most ``max_tokens`` inputs. The model must keep them apart by their
            position ids, as transformers' models do under its ``sdpa`` and ``eager`` attention.
        seed: of the order.
        weights, weighting: of teachers, as the flags of ``xtoken train``.
        share: this reader's rank and how many there are; left out: as torch.distributed or the environment says.
        options: of the loss, by the names of ``xtoken train``'s flags: ``kl="reverse"``, ``alm_tau=5``.

    Raises:
        XtokenError: targets, loss and options do not fit each other.
    """
    urls = [targets] if isinstance(targets, str) else list(targets)
    named = [loss] if isinstance(loss, str) else list(loss)
    if len(named) not in (1, len(urls)):
        raise XtokenError(f"loss names {len(named)} losses for {len(urls)} target folders; give one, or one each")
    if unknown := [name for name in options if name not in LossOptions.model_fields]:
        known = ", ".join(LossOptions.model_fields)
        raise XtokenError(f"targets_dataset has no option {unknown[0]!r}; of the loss it takes {known}")
    rank, ranks = share = _share() if share is None else share
    if not 0 <= rank < ranks:
        raise XtokenError(f"share is ({rank}, {ranks}): give this reader's rank, from 0, and how many there are")
    try:
        data = DataGroup(targets=urls, weights=list(weights), weighting=weighting, max_tokens=max_tokens, seed=seed)
        chosen = LossGroup(loss=named, **options)
    except ValueError as error:
        raise XtokenError(f"targets_dataset: {error}") from error
    return TargetsDataset(
        [url.rstrip("/") for url in data.targets],
        losses=named * len(urls) if len(named) == 1 else named,
        options=LossOptions(**{name: getattr(chosen, name) for name in LossOptions.model_fields}),
        max_tokens=data.max_tokens,
        pack=pack,
        seed=data.seed,
        weights=data.weights or (1.0,) * len(urls),
        weighting=data.weighting,
        share=share,
    )


def _share() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
