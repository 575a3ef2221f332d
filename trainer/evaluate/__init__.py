"""Figures about a model: bits per byte of held-out text, nearness to the teacher on held-out targets, tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import write_text
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.evaluate.samples import EvalSample, Question, TaughtSpan

if TYPE_CHECKING:
    from xtoken.trainer.data.targets import Targets
    from xtoken.trainer.objective import Student
    from xtoken.trainer.ranks import Ranks

__all__ = ["EvalSample", "Question", "TaughtSpan", "evaluate", "held_out_targets", "measure_student"]


def evaluate(
    config: EvalConfig,
    tokenizer: TokenizerInfo,
    samples: Sequence[EvalSample],
    progress: Progress,
    rows: list[dict[str, Any]] | None = None,
    others: Sequence[TokenizerInfo] = (),
) -> dict[str, Any]:
    """Measure ``config.model``, loaded once, on ``samples``, ``config.targets`` and ``config.tasks``.

    Args:
        tokenizer: the model's, or of several models the first one's.
        samples: ``config.text``, tokenized.
        rows: see ``measure_student``; they also go to ``config.out``, where it is given.
        others: the tokenizers of the other models, which ``config.combine`` joins to one.

    Returns:
        See ``measure_student``; with tasks also ``tasks``, see ``xtoken.trainer.evaluate.tasks.open_tasks``.

    Raises:
        XtokenError: the model cannot be loaded or does not fit the tokenizer, nor the targets, or several models do not
            go together, or see ``open_tasks``.
    """
    from xtoken.trainer.evaluate.tasks import open_tasks

    tokenizers = [tokenizer, *others]
    if len(config.model) > 1:
        _refuse_mixed(config, tokenizers)

    if config.text is not None and not samples:
        raise XtokenError(f"the held-out text {config.text} holds no tokens; give a longer one")
    targets = held_out_targets(config.targets, tokenizer) if config.targets else None
    if len(config.model) > 1:
        _refuse_conversations(config, samples, targets)
    score_tasks = open_tasks(config) if config.tasks else None
    student = _load(config, tokenizers, samples, targets)
    figures: dict[str, Any] = {}
    rows = [] if rows is None else rows
    if samples or targets is not None:
        figures |= measure_student(student, tokenizer, samples, targets, config.max_tokens, progress, rows)
    if config.out is not None:
        write_text(Path(config.out), "".join(f"{json.dumps(row)}\n" for row in rows))
        figures["out"] = config.out
    if score_tasks is not None:
        figures["tasks"] = score_tasks(student, progress)
    return figures


def _load(
    config: EvalConfig, tokenizers: Sequence[TokenizerInfo], samples: Sequence[EvalSample], targets: "Targets | None"
) -> "Student":
    from xtoken.trainer.objective import Student
    from xtoken.trainer.student.model import (
        check_context,
        check_width,
        head_width,
        load_student,
        pick_autocast,
        pick_device,
    )

    device, models = pick_device(config.device), []
    for name in config.model:
        model = load_student(name, device, config.trust_remote_code)
        check_width(model, _needed_width(samples, targets), name)
        if samples or targets is not None:
            check_context(model, config.max_tokens, name)
        models.append(model)
    size = min(tokenizers[0].size, *map(head_width, models))
    return Student(_joined(models, config, tokenizers, size), device, pick_autocast("auto", device), size)


def _joined(models: Sequence[Any], config: EvalConfig, tokenizers: Sequence[TokenizerInfo], size: int) -> Any:
    """One model, or several as one."""
    from xtoken.trainer.data.samples import context_token

    if len(models) == 1:
        return models[0]
    from xtoken.trainer.ensemble import Ensemble

    assert config.combine in ("prob", "logit")
    return Ensemble(models, config.combine, size, [context_token(one) for one in tokenizers])


def _refuse_mixed(config: EvalConfig, tokenizers: Sequence[TokenizerInfo]) -> None:
    """Raise XtokenError for models that cannot be one, before any is loaded."""
    from xtoken.trainer.data.samples import context_token
    from xtoken.trainer.ensemble.tokens import refuse_unequal

    refuse_unequal(config.model, tokenizers)
    contexts = [context_token(one) for one in tokenizers]
    for name, own in zip(config.model, contexts, strict=True):
        if (own is None) != (contexts[0] is None):
            raise XtokenError(
                f"{config.model[0]} and {name} do not begin a text alike: one is shown a token in front of it, the "
                "other none; give both the same tokenizer files"
            )
        if own != contexts[0] and config.tasks:
            raise XtokenError(
                f"--tasks: {config.model[0]} is shown token {contexts[0]} in front of a text and {name} {own}, and "
                "lm-eval shows all models the same; give both the same tokenizer files, or leave --tasks out"
            )


def _refuse_conversations(config: EvalConfig, samples: Sequence[EvalSample], targets: "Targets | None") -> None:
    """Raise XtokenError: what stands before a conversation is each model's own template."""
    held = {"--text": config.text} if any(sample.taught is not None for sample in samples) else {}
    held |= {"--targets": config.targets} if targets is not None and targets.manifest.chat is not None else {}
    for flag, name in held.items():
        raise XtokenError(
            f"{flag} {name} holds conversations, and --combine {config.combine} joins models on plain text; measure "
            "the models one by one"
        )


def _needed_width(samples: Sequence[EvalSample], targets: "Targets | None") -> int:
    ids = max((int(sample.ids.max()) + 1 for sample in samples if len(sample.ids)), default=0)
    return max(ids, targets.needed_width if targets else 0)


def held_out_targets(root: str, tokenizer: TokenizerInfo) -> "Targets":
    """Open targets to compare with the teacher.

    Raises:
        XtokenError: they serve no P-KL at first rows and temperature 1, or another student's tokenizer.
    """
    from xtoken.trainer.data.targets import Targets

    targets = Targets(root)
    targets.require("p-kl")
    targets.require_student(tokenizer)
    if targets.manifest.merge != "first" or targets.manifest.tau != 1:
        raise XtokenError(
            f"{root} was aligned with --merge {targets.manifest.merge} --tau {targets.manifest.tau:g}; the KL to the "
            "teacher is measured on first rows at tau 1: align the held-out capture without these options"
        )
    return targets


def measure_student(
    student: "Student",
    tokenizer: TokenizerInfo,
    samples: Sequence[EvalSample],
    targets: "Targets | None",
    max_tokens: int,
    progress: Progress,
    rows: list[dict[str, Any]] | None = None,
    ranks: "Ranks | None" = None,
) -> dict[str, Any]:
    """Figures of a loaded student.

    Args:
        rows: gets one row per held-out sample: ``id``, ``source``, ``bits`` and ``bytes``.
        ranks: measure it together; all must call this, and all return the same.

    Returns:
        With samples ``bits_per_byte`` over predicted tokens and ``bytes``, these by ``by_source`` where sources are
        known and by ``by_kind`` of conversations;
        with targets ``kl`` (mean P-KL per chunk, nats), ``top1_agreement`` (share) and ``chunks``, these by
        ``by_category`` of the chunk's text, and ``teacher_bits_per_byte``.

    Raises:
        XtokenError: there is nothing to measure on.
    """
    from xtoken.trainer.evaluate.agreement import agreement
    from xtoken.trainer.evaluate.bits_per_byte import bits_per_byte
    from xtoken.trainer.ranks import ALONE

    if not samples and targets is None:
        raise XtokenError("the held-out text holds no tokens; give a longer one")
    ranks, training = ranks or ALONE, student.model.training
    student.model.eval()
    figures: dict[str, Any] = {}
    try:
        if samples:
            figures |= bits_per_byte(student, tokenizer, samples, progress, rows, ranks)
        if targets is not None:
            figures |= agreement(student, tokenizer, targets, max_tokens, progress, ranks)
    finally:
        student.model.train(training)
    return figures
