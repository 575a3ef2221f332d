"""Training a student from stored targets: no teacher, no capture, no text."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from schemas.errors import XtokenError
from schemas.manifest import TokenizerInfo
from schemas.progress import Progress
from schemas.train_config import TrainConfig
from trainer.checkpoint import restore_checkpoint, save_checkpoint
from trainer.data.batches import Loader, Position, StepBatch
from trainer.data.samples import Layout, context_token
from trainer.data.sources import Sources
from trainer.data.targets import Targets
from trainer.evaluate import EvalSample, held_out_targets, measure_student
from trainer.learned_w import save_weights
from trainer.losses import open_loss
from trainer.losses.base import Loss, LossSetup
from trainer.metrics import Metrics
from trainer.optim import build_optimizer, learning_rate, set_learning_rate
from trainer.run import Run
from trainer.step import Figures, Mixing, Student, run_step
from trainer.student.model import (
    check_context,
    check_width,
    head_width,
    load_student,
    pick_autocast,
    pick_device,
    save_student,
)


@dataclass
class _Training:
    """Everything a run holds while it goes; ``step``, ``tokens``, ``chunks`` count what is done, ``held`` samples per
    teacher."""

    config: TrainConfig
    run: Run
    student: Student
    losses: tuple[Loss, ...]
    optimizer: torch.optim.Optimizer
    loader: Loader
    metrics: Metrics
    step: int
    tokens: int
    chunks: int
    seconds: float
    held: list[int]
    damaged: list[str]


@dataclass(frozen=True)
class _HeldOut:
    """What the student is measured on before and after."""

    tokenizer: TokenizerInfo
    samples: Sequence[EvalSample]
    targets: Targets | None


def train(
    config: TrainConfig, student_tokenizer: TokenizerInfo, eval_samples: Sequence[EvalSample], progress: Progress
) -> dict[str, Any]:
    """Train to the end, going on from ``config.out`` where the same run left checkpoints.

    Returns:
        ``steps``, ``epochs``, ``tokens``, ``chunks`` (of all teachers), ``cut_tokens`` (beyond max_tokens, never
        seen), ``seconds``, ``loss``, ``kd``, ``ce`` (nats, mean of the last ten steps), ``model`` (folder); with
        several teachers ``teachers``: each one's loss, samples and mean KD; with ``learn_w`` the file of each learned
        W under ``learned_w``; with held-out data ``before`` and ``after`` (see ``measure_student``).

    Raises:
        XtokenError: targets, student, tokenizer and options do not fit each other, ``out`` holds another run, the
            loss stopped being a number, or the disk is full. The last checkpoint stays.
    """
    targets = _open_targets(config, student_tokenizer)
    held_out = _HeldOut(student_tokenizer, eval_samples, _eval_targets(config, student_tokenizer))
    run = Run(config, targets, student_tokenizer)
    finished = run.summary()
    if finished is not None:
        return finished
    try:
        return _to_the_end(_start(config, targets, student_tokenizer, run), held_out, progress)
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):
            raise
        raise XtokenError(f"the disk of {config.out} is full ({error}); make room and run the same command") from error


def _open_targets(config: TrainConfig, tokenizer: TokenizerInfo) -> list[Targets]:
    """The target folders, each fit for its loss, its options and this student."""
    folders = []
    for root, loss in zip(config.targets, config.losses, strict=True):
        targets = Targets(root)
        targets.require(loss)
        targets.require_options(loss, config)
        targets.require_student(tokenizer)
        folders.append(targets)
    return folders


def _to_the_end(training: _Training, held_out: _HeldOut, progress: Progress) -> dict[str, Any]:
    before = _evaluate(training, held_out, "before", progress)
    _train_steps(training, progress)
    after = _evaluate(training, held_out, "after", progress)
    save_student(training.student.model, training.config.source, training.run.model)
    summary = _summary(training) | {k: v for k, v in (("before", before), ("after", after)) if v}
    learned = save_weights(training.losses, training.loader.sources.folders, training.run.root)
    summary |= {"learned_w": learned} if learned else {}
    training.run.finish(summary)
    return summary


def _eval_targets(config: TrainConfig, tokenizer: TokenizerInfo) -> Targets | None:
    return held_out_targets(config.eval_targets, tokenizer) if config.eval_targets else None


def _start(config: TrainConfig, folders: list[Targets], tokenizer: TokenizerInfo, run: Run) -> _Training:
    device = pick_device(config.device)
    for targets in folders:  # the sha256 of their side tables is checked before the model loads
        _ = targets.w, targets.vocab
    needed = max(targets.needed_width for targets in folders)
    model = load_student(config.source, device, config.trust_remote_code)
    check_width(model, needed, config.source)
    check_context(model, config.max_tokens, config.source)
    model.train()
    torch.manual_seed(config.seed)
    vocabulary = min(tokenizer.size, head_width(model))
    losses = tuple(
        open_loss(name, _setup(config, targets, name, vocabulary, device))
        for name, targets in zip(config.losses, folders, strict=True)
    )
    optimizer = build_optimizer(model, config, losses)
    restored = restore_checkpoint(run.checkpoints, model, optimizer, losses)
    state: dict[str, Any] = (
        restored.state
        if restored
        else {"tokens": 0, "chunks": 0, "seconds": 0.0, "held": [0] * len(folders), "position": {}}
    )
    step = restored.step if restored else 0
    weights = tuple(config.weights) or (1.0,) * len(folders)
    layout = Layout(context_token(tokenizer), config.max_tokens, vocabulary, losses, weights, config.weighting)
    loader = Loader(
        Sources(folders),
        layout,
        step_tokens=config.step_tokens,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
        position=Position(**state.pop("position")),
    )
    student = Student(model, device, pick_autocast(config.autocast, device), vocabulary)
    metrics = Metrics(run.metrics, step)
    damaged = restored.damaged if restored else []
    return _Training(config, run, student, losses, optimizer, loader, metrics, step, damaged=damaged, **state)


def _setup(config: TrainConfig, targets: Targets, loss: str, vocabulary: int, device: torch.device) -> LossSetup:
    manifest = targets.manifest
    return LossSetup(
        targets.w.within(vocabulary),
        targets.vocab,
        vocabulary,
        manifest.teacher_tokenizer.size,
        device,
        config,
        manifest.tau,
        manifest.merge,
        config.learn_w and loss == "p-kl",
    )


def _train_steps(training: _Training, progress: Progress) -> None:
    config = training.config
    progress.start("train", config.steps, "steps", training.step)
    while training.step < config.steps:
        line = _train_step(training)
        training.metrics.write(line)
        progress.advance(1, **{name: line[name] for name in ("loss", "kd", "ce", "tokens_per_s") if name in line})
        if training.step % config.save_every == 0 or training.step == config.steps:
            _save(training)
    progress.finish()


def _train_step(training: _Training) -> dict[str, Any]:
    """One optimizer step; returns its line of metrics."""
    config, began = training.config, time.monotonic()
    batch, step = training.loader.step(), training.step + 1
    training.optimizer.zero_grad(set_to_none=True)
    mixing = Mixing(config.mix, config.kd_weight, config.ce_weight)
    figures = run_step(training.student, batch, training.losses, mixing)
    norm = float(torch.nn.utils.clip_grad_norm_(training.student.model.parameters(), config.clip))
    _check_finite(training, batch, figures, norm)
    lr = learning_rate(step, config)
    set_learning_rate(training.optimizer, lr / config.lr)
    training.optimizer.step()
    seconds = time.monotonic() - began
    training.step, training.seconds = step, training.seconds + seconds
    training.tokens, training.chunks = training.tokens + batch.tokens, training.chunks + sum(batch.chunks)
    training.held = [done + new for done, new in zip(training.held, batch.held, strict=True)]
    losses = {name: value for name, value in asdict(figures).items() if value is not None and name != "teachers"}
    if len(batch.held) > 1:
        losses |= {"teacher_kd": list(figures.teachers), "teacher_samples": list(batch.held)}
    return {
        "step": step,
        "epoch": batch.after.epoch,
        "tokens": training.tokens,
        "chunks": sum(batch.chunks),
        "cut_tokens": batch.cut,
        "seconds": seconds,
        "tokens_per_s": batch.tokens / seconds,
        "lr": lr,
        "grad_norm": norm,
        **losses,
    }


def _check_finite(training: _Training, batch: StepBatch, figures: Figures, norm: float) -> None:
    if math.isfinite(figures.loss) and math.isfinite(norm):
        return
    ids = batch.sample_ids
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    raise XtokenError(
        f"step {training.step + 1}: loss {figures.loss}, KD {figures.kd}, CE {figures.ce}, gradient norm {norm} on "
        f"samples {', '.join(ids[:10])}{more}; the last checkpoint stays, look at these samples or lower --lr"
    )


def _save(training: _Training) -> None:
    state = {name: getattr(training, name) for name in ("tokens", "chunks", "seconds", "held")}
    state["position"] = asdict(training.loader.position)
    run, model, optimizer = training.run, training.student.model, training.optimizer
    save_checkpoint(run.checkpoints, training.step, model, optimizer, training.losses, state, training.config.keep)


def _evaluate(training: _Training, held_out: _HeldOut, when: str, progress: Progress) -> dict[str, float] | None:
    """Figures ``before`` or ``after``, measured once per run; None without held-out data."""
    if not held_out.samples and held_out.targets is None:
        return None
    figures = training.metrics.evaluation(when)
    if figures is None and (when == "after" or training.step == 0):
        max_tokens = training.config.max_tokens
        figures = measure_student(
            training.student, held_out.tokenizer, held_out.samples, held_out.targets, max_tokens, progress
        )
        training.metrics.write({"step": training.step, "eval": when, **figures})
    return figures


def _summary(training: _Training) -> dict[str, Any]:
    last = [line for line in training.metrics.lines if "loss" in line][-10:]
    summary: dict[str, Any] = {"steps": training.step, "epochs": last[-1]["epoch"], "model": str(training.run.model)}
    summary |= {name: getattr(training, name) for name in ("tokens", "chunks", "seconds")}
    summary |= {name: sum(line[name] for line in last) / len(last) for name in ("loss", "kd", "ce") if name in last[-1]}
    if len(training.losses) > 1:
        summary |= _teacher_summary(training, last)
    summary["cut_tokens"] = sum(line.get("cut_tokens", 0) for line in training.metrics.lines)
    return summary | ({"damaged_checkpoints": training.damaged} if training.damaged else {})


def _teacher_summary(training: _Training, last: list[dict[str, Any]]) -> dict[str, Any]:
    """What each teacher held and taught; how many samples they share."""
    sources, config = training.loader.sources, training.config
    rows = [
        {
            "teacher": folder.manifest.teacher.model,
            "loss": loss,
            "samples": held,
            "samples_seen": seen,
            "kd": sum(line["teacher_kd"][i] for line in last) / len(last),
        }
        for i, (folder, loss, held, seen) in enumerate(
            zip(sources.folders, config.losses, sources.held, training.held, strict=True)
        )
    ]
    return {"teachers": rows, "samples": sources.samples, "samples_of_all_teachers": sources.shared}
