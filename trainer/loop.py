"""Training a student from stored targets: no teacher, no capture, no text."""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress, Silent
from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.diagnosis import diagnose
from xtoken.trainer.evaluate import EvalSample, held_out_targets
from xtoken.trainer.finish import HeldOut, evaluate_run, save_result, summary_of
from xtoken.trainer.lock import only_trainer, refuse_held
from xtoken.trainer.mixing import MOST
from xtoken.trainer.optim import drop_gradients_of_body, learning_rate, set_learning_rate
from xtoken.trainer.ranks import Ranks, open_ranks
from xtoken.trainer.run import Run, begun_with, refuse_foreign
from xtoken.trainer.signals import Preempted, preemption
from xtoken.trainer.start import Training, open_targets, start
from xtoken.trainer.step import Figures, StepCounts, count_step, run_step
from xtoken.trainer.student.adapters import require_adapters
from xtoken.trainer.student.model import pick_device
from xtoken.trainer.trackers import Trackers, require_trackers
from xtoken.trainer.watch import Verdict

_LOG = logging.getLogger("xtoken")
_FULL = ("No space left", "Disk quota exceeded")
AGREE_EVERY = 10  # steps between looks at the teacher's most probable token: they cost a search of every row


@dataclass(frozen=True)
class _Outside:
    """What a run tells the world, and what the world tells it."""

    held_out: HeldOut
    progress: Progress
    trackers: Trackers | None
    preempted: Preempted
    shown: dict[str, float] = field(default_factory=dict)


def train(
    config: TrainConfig, student_tokenizer: TokenizerInfo, eval_samples: Sequence[EvalSample], progress: Progress
) -> dict[str, Any]:
    """Train to the end, going on from ``config.out`` where the same run left checkpoints.

    Under torchrun all ranks call it, and all return the same.

    Returns:
        ``steps``, ``epochs``, ``tokens``, ``chunks`` (of all teachers), ``cut_tokens`` (beyond max_tokens, never
        seen; of conversations also ``taught_tokens`` and ``untaught_samples``, left out as nothing of them is taught
        within max_tokens), ``seconds``, ``loss``, ``kd``, ``ce`` (nats, mean of the last ten steps), ``model``
        (folder); with several teachers ``teachers``: each one's loss, samples and mean KD; with ``learn_w`` the file
        of each learned W under ``learned_w``; with held-out data ``before`` and ``after`` (see ``measure_student``).
        A run that SIGTERM ended early says ``preempted``: it has saved, and the same command goes on.

    Raises:
        XtokenError: targets, student, tokenizer and options do not fit each other, ``out`` holds another run, a loss
            is NaN or inf, or far above what is usual, or the disk is full. The last checkpoint stays.
    """
    require_trackers(config.report)
    if config.student.lora is not None:
        require_adapters()
    with open_ranks(pick_device(config.student.device)) as ranks, preemption() as preempted, ExitStack() as stack:
        config = _sized(config, ranks, progress)
        folders = open_targets(config, student_tokenizer)
        root = config.report.eval_targets
        targets = held_out_targets(root, student_tokenizer) if root else None
        run, notes, finished = _open_run(config, folders, student_tokenizer, ranks, stack)
        if finished is not None:
            return finished
        held_out = HeldOut(student_tokenizer, eval_samples, targets)
        try:
            if ranks.first:
                stack.callback(shutil.rmtree, run.rehearsal, ignore_errors=True)
            training = start(config, student_tokenizer, folders, run, ranks)
            stack.callback(lambda: training.loader.close())
            stack.callback(training.saver.close)
            training.notes[:0] = notes
            if ranks.first:
                for note in training.notes:
                    _LOG.warning("%s", note)
            trackers = _open_trackers(training, stack)
            progress = progress if ranks.first else Silent()
            return _to_the_end(training, _Outside(held_out, progress, trackers, preempted))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise XtokenError(_no_memory(config, ranks, error)) from error
        except OSError as error:
            if not any(reason in str(error) for reason in _FULL):
                raise
            raise XtokenError(
                f"the disk of {config.out} is full ({error}); make room and run the same command"
            ) from error


def _sized(config: TrainConfig, ranks: Ranks, progress: Progress) -> TrainConfig:
    """With tokens of steps and passes, where they were left out; they are said, and recorded with all else."""
    sized = config.sized(ranks.device.type, ranks.share(begun_with(config.out) if ranks.first else None))
    if ranks.first and sized != config:
        step_tokens, micro_tokens = sized.sizes
        progress.note(f"--step-tokens {step_tokens} --micro-tokens {micro_tokens}")
    return sized


def _no_memory(config: TrainConfig, ranks: Ranks, error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "")
    less = "" if config.student.activation_checkpointing else " and --activation-checkpointing"
    return (
        f"the memory of {ranks.device} is too small for this student at --micro-tokens {config.sizes[1]} "
        f"({said}); a smaller number{less} take less and change no loss: the same command with them goes on from the "
        "last checkpoint"
    )


def _open_run(
    config: TrainConfig, folders: Sequence[Targets], tokenizer: TokenizerInfo, ranks: Ranks, stack: ExitStack
) -> tuple[Run, list[str], dict[str, Any] | None]:
    """The first rank takes the folder until ``stack`` ends, or refuses it for all; the others find it made.

    Returns:
        The run, what the user should know of its folder, and what it returned if it is finished.
    """
    notes: list[str] = []
    finished: dict[str, Any] | None = None
    refusal: XtokenError | None = None
    run: Run | None = None
    if ranks.first:
        try:
            _refuse_foreign(config.out)
            note = stack.enter_context(only_trainer(Path(config.out)))
            notes += [note] if note else []
            run = Run(config, folders, tokenizer, ranks)
            finished = run.summary()
        except XtokenError as error:
            refusal = error
    refusal, finished = ranks.share((refusal, finished))
    if refusal is not None:
        raise refusal
    return run or Run(config, folders, tokenizer, ranks), notes, finished


def _refuse_foreign(out: str) -> None:
    """As ``refuse_foreign``; but what lies there may be what another trainer has only begun to write."""
    try:
        refuse_foreign(out)
    except XtokenError:
        if "://" not in out:
            refuse_held(Path(out))
        raise


def _open_trackers(training: Training, stack: ExitStack) -> Trackers | None:
    report, run = training.config.report, training.run
    if not training.ranks.first or not (report.tensorboard or report.wandb):
        return None
    settings = training.config.record()
    trackers = Trackers(run.root, report.tensorboard, report.wandb, run.root.name, settings, training.counted.step)
    stack.callback(trackers.close)
    return trackers


def _to_the_end(training: Training, outside: _Outside) -> dict[str, Any]:
    config, counted = training.config, training.counted
    _evaluate(training, outside, "before")
    if config.checkpoint.rollback and counted.step == 0:
        training.save()  # a rollback needs somewhere to go
    outside.progress.start("train", config.optim.steps, "steps", counted.step)
    saved = time.monotonic()
    while counted.step < config.optim.steps:
        if training.ranks.max(float(outside.preempted.asked)):
            return _preempted(training, outside)
        # behind the save of this step, which a grace period that ends in an evaluation would cost
        every = config.report.eval_every
        if every and counted.step and counted.step % every == 0:
            _evaluate(training, outside, "step")
        _train_step(training, outside)
        training.saver.look()
        if _due(training, saved) or counted.step == config.optim.steps:
            training.save()
            saved = time.monotonic()
    outside.progress.finish()
    _evaluate(training, outside, "after")
    training.saver.join()
    summary = summary_of(training) | save_result(training)
    if training.ranks.first:
        training.run.finish(summary)
    training.ranks.wait()
    return summary


def _due(training: Training, saved: float) -> bool:
    """Whether a checkpoint is due; ranks agree, so that all save after one step."""
    options = training.config.checkpoint
    since = 0.0 if options.save_seconds is None else training.ranks.max(time.monotonic() - saved)
    return options.due(training.counted.step, since)


def _preempted(training: Training, outside: _Outside) -> dict[str, Any]:
    """Save, so that the same command goes on from here."""
    step = training.counted.step
    training.save(wait=True)
    training.metrics.write({"step": step, "event": "preempted"})
    outside.progress.finish()
    return summary_of(training) | {"preempted": step, "steps_left": training.config.optim.steps - step}


def _evaluate(training: Training, outside: _Outside, when: str) -> None:
    """Held-out figures ``before``, at a ``step`` or ``after``, once each however often a run resumes."""
    if when == "before" and training.counted.step:
        return
    figures = evaluate_run(training, outside.held_out, when, outside.progress)
    if figures and outside.trackers is not None:
        outside.trackers.log(training.counted.step, {"held_out": figures})
    if figures and when == "step":
        outside.progress.start("train", training.config.optim.steps, "steps", training.counted.step)


def _train_step(training: Training, outside: _Outside) -> None:
    """One optimizer step, or a rollback."""
    config, optim, began = training.config, training.config.optim, time.monotonic()
    batch = _draw(training)
    counts = count_step(batch, training.ranks)
    step = training.counted.step + 1
    training.optimizer.zero_grad(set_to_none=True)
    seed = f"{config.data.seed}/{training.counted.drawn}"
    agree = step % AGREE_EVERY == 0
    figures = run_step(
        training.wrapped, batch, counts, training.mixing, training.ranks, seed=seed, step=step, agree=agree
    )
    if step <= optim.freeze_steps:
        drop_gradients_of_body(training.student.model)
    norm = _clip(training)
    verdict = training.watch.look(figures.ce, figures.kd, norm, counts.predicted, sum(counts.chunks))
    if verdict is not None:
        _turn_back(training, batch, verdict, seed)
        return
    lr = learning_rate(step, optim)
    set_learning_rate(training.optimizer, lr / optim.lr)
    training.optimizer.step()
    if figures.norms is not None:
        training.mixing.observe(figures.norms)
        _tell_capped(training)
    line = _count(training, batch, counts, figures, time.monotonic() - began) | {"lr": lr, "grad_norm": norm}
    training.metrics.write(line)
    _show(outside, line)


def _tell_capped(training: Training) -> None:
    """Once in a process: a term whose gradient is so small that --mix gradmag does not bring it to size."""
    capped = set(training.mixing.capped()) - training.told
    if capped and training.ranks.first:
        names = ["CE" if i == 0 else training.config.data.targets[i - 1] for i in sorted(capped)]
        _LOG.warning(
            "--mix gradmag: the gradient of %s is so small that its weight would be above %g times yours; it stays "
            "there. The metrics file holds gradients and weights",
            ", ".join(names),
            MOST,
        )
    training.told |= capped


def _draw(training: Training) -> StepBatch:
    """The next batch that no rollback left out."""
    counted = training.counted
    while True:
        batch = training.loader.step()
        counted.drawn += 1
        if counted.drawn not in counted.left_out:
            return batch


def _clip(training: Training) -> float:
    norm: Any = torch.nn.utils.clip_grad_norm_(training.student.model.parameters(), training.config.optim.clip)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _turn_back(training: Training, batch: StepBatch, verdict: Verdict, seed: str) -> None:
    """Go back to the last checkpoint and leave the batch out, while ``--rollback`` allows it.

    Raises:
        XtokenError: it does not; the error names the samples at fault.
    """
    counted, config = training.counted, training.config
    training.optimizer.zero_grad(set_to_none=True)
    diagnosis = diagnose(training, batch, verdict, seed)
    if len(counted.left_out) >= config.checkpoint.rollback:
        raise diagnosis.error()
    left_out, step = [*counted.left_out, counted.drawn], counted.step + 1
    if not training.restore(before=step):
        raise diagnosis.error()
    training.counted.left_out = left_out
    training.metrics.back_to(training.counted.step, left_out)
    event = {"event": "rollback", "from_step": step, "left_out": left_out[-1], "why": verdict.sentence}
    training.metrics.write({"step": training.counted.step, **event})
    training.save()


def _count(
    training: Training, batch: StepBatch, counts: StepCounts, figures: Figures, seconds: float
) -> dict[str, Any]:
    """Add a step to what is done; its line of metrics."""
    counted, ranks = training.counted, training.ranks
    counted.step, counted.seconds = counted.step + 1, counted.seconds + seconds
    counted.tokens, counted.chunks = counted.tokens + counts.tokens, counted.chunks + sum(counts.chunks)
    counted.held = [done + new for done, new in zip(counted.held, counts.held, strict=True)]
    text_bytes = ranks.sum([sum(int(training.length_V[micro.label_P].sum()) for micro in batch.micros)])[0]
    line: dict[str, Any] = {
        "step": counted.step,
        "epoch": max(place.epoch for place in training.loader.positions),
        "tokens": counted.tokens,
        "predicted": counts.predicted,
        "chunks": sum(counts.chunks),
        "cut_tokens": counts.cut,
        "padding": 1 - counts.inputs / counts.padded,
        "seconds": seconds,
        "tokens_per_s": counts.tokens / seconds,
        "bits_per_byte": figures.ce * counts.predicted / math.log(2) / max(1.0, text_bytes),
    }
    if training.layout.chat:
        line |= {"taught": counts.predicted / max(1, counts.tokens), "untaught_samples": counts.untaught}
    found = asdict(figures)
    line |= {name: found[name] for name in ("loss", "kd", "ce") if found[name] is not None}
    if figures.agreement is not None:
        line["top1_agreement"] = figures.agreement
    if training.mixing.mode == "gradmag" and figures.weights:
        line |= _per_term("weight", figures.weights)
        line |= _per_term("gradient", figures.norms or ())
    if len(counts.held) > 1:
        line |= {"teacher_kd": list(figures.teachers), "teacher_samples": list(counts.held)}
    return line


def _per_term(what: str, value_T: Sequence[float]) -> dict[str, Any]:
    """A figure of CE and of each teacher, as metrics name them."""
    if not value_T:
        return {}
    ce, *teachers = value_T
    found: dict[str, Any] = {f"ce_{what}": ce}
    return found | ({f"kd_{what}": teachers[0]} if len(teachers) == 1 else {f"teacher_kd_{what}": teachers})


_SHOWN = {
    "tokens_per_s": "tokens/s",
    "loss": "loss",
    "kd": "KD/chunk",
    "ce": "CE",
    "top1_agreement": "top-1",
    "bits_per_byte": "bits/byte",
    "taught": "taught",
    "grad_norm": "norm",
}


def _show(outside: _Outside, line: dict[str, Any]) -> None:
    """The progress line keeps its places: what a step does not have is what the last one had."""
    outside.shown.update((label, line[name]) for name, label in _SHOWN.items() if name in line)
    outside.progress.advance(1, **{label: outside.shown[label] for label in _SHOWN.values() if label in outside.shown})
    if outside.trackers is not None:
        outside.trackers.log(line["step"], {"train": {k: v for k, v in line.items() if k != "step"}})
