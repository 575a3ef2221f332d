"""What a run holds while it goes, built in an order that fails early: targets, run folder, model, checkpoint."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.configs.train import LossGroup, StudentGroup, TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.checkpoint import Policy, Restored, refuse_dtypes, restore_checkpoint
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.plan import Position
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.data.sources import Sources, refuse_unlike
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup
from xtoken.trainer.metrics import Metrics
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.opening import open_model
from xtoken.trainer.optim import build_optimizer, named_parameters, optimizer_tensors, restore_optimizer
from xtoken.trainer.ranks import Ranks, fill, gathered, replicate, shard
from xtoken.trainer.run import Run
from xtoken.trainer.saver import Saver, room_to_copy
from xtoken.trainer.student.model import pick_autocast, pick_save_dtype
from xtoken.trainer.watch import Watch

T = TypeVar("T")


@dataclass
class Counted:
    """What is done so far; with the loader's positions, all that a checkpoint holds beside tensors.

    Attributes:
        step: optimizer steps. drawn: batches taken for them; more than steps where some were left out.
        tokens, chunks: of all teachers. seconds: of training. held: samples per teacher.
        left_out: the numbers of batches that a rollback left out.
    """

    held: list[int]
    step: int = 0
    drawn: int = 0
    tokens: int = 0
    chunks: int = 0
    seconds: float = 0.0
    left_out: list[int] = field(default_factory=list)


@dataclass
class Training:
    """A run on this rank; ``objective`` is the student with its losses, ``wrapped`` what DDP or FSDP made of it.

    Attributes:
        notes: what the user should know of this run, a sentence each.
        tokenizer_files: see ``rehearse_save``; None on ranks that do not write.
        save_dtype: of the trained model's weights.
        told: terms of the objective whose weight has been said to be capped.
    """

    config: TrainConfig
    ranks: Ranks
    run: Run
    student: Student
    objective: Objective
    wrapped: Any
    optimizer: torch.optim.Optimizer
    sources: Sources
    layout: Layout
    packing: bool
    watch: Watch
    mixing: Mixing
    metrics: Metrics
    length_V: NDArray[np.int32]
    counted: Counted
    notes: list[str]
    tokenizer_files: Path | None
    save_dtype: torch.dtype
    loader: Loader = field(init=False)
    damaged: list[str] = field(default_factory=list)
    told: set[int] = field(default_factory=set)
    saver: Saver = field(default_factory=Saver)

    @property
    def sharded(self) -> bool:
        """Whether weights exist only while the wrapped module runs."""
        return self.ranks.size > 1 and self.config.student.parallel == "fsdp"

    def inside(self, work: Callable[..., T], *args: Any) -> T:
        """``work(objective, ...)`` where all weights exist; all ranks of a sharded model must call it."""
        found: T = (self.wrapped if self.sharded else self.objective)(work, *args)
        return found

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint, as a rule while the next steps run; all ranks must call it.

        Args:
            wait: return when it is whole.
        """
        self.saver.join()  # before there is another copy of everything
        tensors = {"model": self._weights(), "optimizer": optimizer_tensors(self._named(), self.optimizer)}
        beside = self.sharded or (not wait and room_to_copy(tensors))
        if beside:
            tensors = {group: gathered(members, self.ranks.first, own=True) for group, members in tensors.items()}
        state = vars(self.counted) | {"watch": self.watch.state(), "positions": self._positions()} | self.mixing.state()
        if self.ranks.first:
            policy = Policy(self.config.checkpoint.keep, self.config.checkpoint.keep_every)
            self.saver.begin(self.run.checkpoints, self.counted.step, tensors, deepcopy(state), policy)
        if wait or not beside:
            self.saver.join()

    def restore(self, before: int | None = None) -> bool:
        """Go on from the newest checkpoint (before a step); whether there is one. All ranks must call it."""
        self.saver.join()
        found = restore_checkpoint(self.run.checkpoints, before) if self.ranks.first else None
        restored: Restored | None = self.ranks.share(found)
        if restored is None:
            return False
        weights = self._weights()
        stored = restored.tensors("model", like=weights)
        for name, tensor in weights.items():
            fill(tensor, stored[name])
        restore_optimizer(self._named(), self.optimizer, restored.tensors("optimizer"))
        state = dict(restored.state)
        positions = {int(stream): Position(*place) for stream, place in state.pop("positions").items()}
        self.watch.restore(state.pop("watch"))
        if "mixing" in state:
            self.mixing.restore(state.pop("mixing"))
        vars(self.counted).update(state)
        self.damaged += restored.damaged
        self.loader.close()
        self.loader = open_loader(self, [positions[stream] for stream in self.mine])
        return True

    @property
    def mine(self) -> list[int]:
        """The streams of this rank."""
        return list(range(self.ranks.rank, self.run.streams, self.ranks.size))

    def _positions(self) -> dict[str, list[int]]:
        here = dict(zip(self.mine, self.loader.positions, strict=True))
        everywhere = [one for part in self.ranks.gather(here) for one in part.items()]
        return {str(stream): [place.epoch, place.taken] for stream, place in sorted(everywhere)}

    def _named(self) -> dict[str, torch.nn.Parameter]:
        named = named_parameters(self.student.model, self.objective.losses)
        return {name: one for name, one in named.items() if one.requires_grad}

    def _weights(self) -> dict[str, Tensor]:
        """What training changes: parameters (tied ones once), persistent buffers, and what losses learn."""
        model = self.student.model
        persistent = model.state_dict().keys()
        return self._named() | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def open_targets(config: TrainConfig, tokenizer: TokenizerInfo) -> list[Targets]:
    """The target folders, each fit for its loss, its options and this student.

    Raises:
        XtokenError: one is not.
    """
    folders = []
    for root, loss in zip(config.data.targets, config.losses, strict=True):
        targets = Targets(root)
        targets.require(loss)
        targets.require_options(loss, config.loss)
        targets.require_weighting(config.data.weighting)
        targets.require_student(tokenizer)
        if config.student.student is not None:
            targets.require_head(config.student.student)
        folders.append(targets)
    refuse_unlike(folders)
    return folders


def start(config: TrainConfig, tokenizer: TokenizerInfo, folders: list[Targets], run: Run, ranks: Ranks) -> Training:
    """Build a run from its beginning, or from its last checkpoint.

    Raises:
        XtokenError: model, targets and options do not fit each other.
    """
    for targets in folders:  # the sha256 of their side tables is checked before the model loads
        _ = targets.w, targets.vocab
    asked, data = config.student, config.data
    opened = open_model(config, tokenizer, folders, run, ranks)
    model, head, notes, vocabulary = opened.model, opened.head, opened.notes, opened.vocabulary
    assert head is not None, "the first rank has said what it found"
    autocast = pick_autocast(asked.autocast, ranks.device)
    losses = tuple(
        open_loss(name, _setup(config.loss, targets, name, vocabulary, ranks.device))
        for name, targets in zip(config.losses, folders, strict=True)
    )
    student = Student(model, ranks.device, autocast, vocabulary, head, opened.flat)
    objective = Objective(student, losses, use_liger(asked, config.losses, ranks.device, head.fusable))
    wrapped = _wrap(objective, asked.parallel, ranks, opened.some_left_out)
    optimizer = build_optimizer(model, config.optim, losses)
    weights = tuple(data.weights) or (1.0,) * len(folders)
    chat = folders[0].manifest.chat
    context = context_token(tokenizer) if chat is None else None
    layout = Layout(context, data.max_tokens, vocabulary, losses, weights, data.weighting, chat is not None)
    made: dict[str, Any] = {"sources": Sources(folders), "layout": layout, "packing": opened.packing}
    counted = Counted([0] * len(folders))
    metrics = Metrics(run.metrics, ranks.first)
    length_V = folders[0].vocab.length_V
    training = Training(
        **(made | {"config": config, "ranks": ranks, "run": run, "student": student, "objective": objective}),
        wrapped=wrapped,
        optimizer=optimizer,
        watch=Watch(config.checkpoint.spike),
        mixing=_mixing(config.loss, weights),
        metrics=metrics,
        length_V=length_V,
        counted=counted,
        notes=notes,
        tokenizer_files=opened.tokenizer_files,
        save_dtype=pick_save_dtype(asked),
    )
    refuse_dtypes(training._weights())
    training.loader = open_loader(training, None)
    training.restore()
    metrics.back_to(counted.step, counted.left_out)
    return training


def _mixing(options: LossGroup, weights: Sequence[float]) -> Mixing:
    shares = [weight / sum(weights) for weight in weights]
    return Mixing(options.mix, options.kd_weight, options.ce_weight, shares, options.gradmag_every)


def open_loader(training: Training, positions: Sequence[Position] | None) -> Loader:
    """This rank's share of the data, from the beginning or from positions of its streams."""
    data = training.config.data
    step_tokens, micro_tokens = training.config.sizes
    return Loader(
        training.sources,
        training.layout,
        step_tokens=step_tokens,
        micro_tokens=micro_tokens,
        seed=data.seed,
        streams=training.run.streams,
        mine=training.mine,
        positions=positions,
        packing=training.packing,
        threads=data.decoders,
    )


def _wrap(objective: Objective, parallel: str, ranks: Ranks, some_left_out: bool) -> Any:
    if ranks.size == 1:
        return objective
    if parallel == "fsdp":
        return shard(objective, ranks, objective.student.autocast)
    return replicate(objective, some_left_out)


def use_liger(student: StudentGroup, losses: Sequence[str], device: torch.device, fusable: bool) -> bool:
    """Whether Liger's kernel computes the loss: CE alone, on CUDA, of a head that is ``fusable`` with it.

    Raises:
        XtokenError: it was asked for and cannot.
    """
    if student.kernel == "eager":
        return False
    named = dict.fromkeys(losses)
    fits = list(named) == ["ce"] and device.type == "cuda"
    if student.kernel == "liger" and not fits:
        raise XtokenError(
            f"--kernel liger computes --loss ce on CUDA, and this is {','.join(named)} on {device.type}; "
            "use --kernel auto"
        )
    if student.kernel == "liger" and not fusable:
        raise XtokenError(
            f"--kernel liger needs the matrix of the head, and {student.source} makes its logits in a way of its own; "
            "use --kernel auto"
        )
    if not fits or not fusable:
        return False
    try:
        import liger_kernel.transformers.functional  # noqa: F401
    except ImportError as error:
        if student.kernel == "liger":
            raise XtokenError("--kernel liger needs liger-kernel; install it: pip install 'xtoken[liger]'") from error
        return False
    return True


def _setup(options: LossGroup, targets: Targets, loss: str, vocabulary: int, device: torch.device) -> LossSetup:
    manifest = targets.manifest
    return LossSetup(
        targets.w.within(vocabulary),
        targets.vocab,
        vocabulary,
        manifest.teacher_tokenizer.size,
        device,
        options,
        manifest.tau,
        manifest.merge,
        options.learn_w and loss == "p-kl",
    )
