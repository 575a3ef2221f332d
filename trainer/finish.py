"""What a run measures on the way and leaves at its end."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import write_text
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress, Silent
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate import EvalSample, measure_student
from xtoken.trainer.evaluate.completions import complete
from xtoken.trainer.evaluate.spelling import token_bytes
from xtoken.trainer.learned_w import save_weights
from xtoken.trainer.objective import Objective
from xtoken.trainer.ranks import gathered
from xtoken.trainer.record import read_lines
from xtoken.trainer.student.adapters import merged, save_adapter
from xtoken.trainer.student.model import rounded, save_student

if TYPE_CHECKING:
    from xtoken.trainer.start import Training

# Of conversations: what the summary adds up, and the figure of a step that holds it.
_CHAT = {"taught_tokens": "predicted", "untaught_samples": "untaught_samples"}
COMPLETIONS, HELD_OUT, ADAPTER = "completions.jsonl", "held-out.jsonl", "adapter"


@dataclass(frozen=True)
class HeldOut:
    """What the student is measured on before, meanwhile and after."""

    tokenizer: TokenizerInfo
    samples: Sequence[EvalSample]
    targets: Targets | None


def evaluate_run(training: "Training", held_out: HeldOut, when: str, progress: Progress) -> dict[str, Any] | None:
    """Figures on held-out data, made once for each ``when`` and step; None where there is none.

    Ranks share the data and return the same. Completions are written by all of them: a sharded model runs on all or
    none.
    """
    if not held_out.samples and held_out.targets is None:
        return None
    step = training.counted.step
    known = training.metrics.evaluation(when, step if when == "step" else None)
    if known is not None:
        return known
    progress = progress if training.ranks.first else Silent()
    figures, rows, written = training.inside(_measure, held_out, training, when != "step", progress)
    if training.ranks.first and when != "step":
        _replace(training, HELD_OUT, when, rows)
        _replace(training, COMPLETIONS, when, written)
    training.metrics.write({"step": step, "eval": when, **figures})
    return figures


Rows = list[dict[str, Any]]


def _measure(
    objective: Objective, held_out: HeldOut, training: "Training", complete_too: bool, progress: Progress
) -> tuple[dict[str, Any], Rows, Rows]:
    student, samples, config = objective.student, held_out.samples, training.config
    rows: Rows = []
    on = (samples, held_out.targets, config.data.max_tokens)
    figures = measure_student(student, held_out.tokenizer, *on, progress, rows, training.ranks)
    written: Rows = []
    if complete_too and config.report.completions and samples:
        spelling = token_bytes(Targets(config.data.targets[0]))
        written = list(complete(student, held_out.tokenizer, spelling, samples, config.report.completions))
    return figures, rows, written


def _replace(training: "Training", name: str, when: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows of ``when`` behind those of other times, whole or not at all."""
    path = training.run.root / name
    kept = [row for row in read_lines(path, "when", str) if row["when"] != when]
    lines = [*map(json.dumps, kept), *(json.dumps({"when": when, **row}) for row in rows)]
    write_text(path, "".join(f"{line}\n" for line in lines))


def save_result(training: "Training") -> dict[str, Any]:
    """Write the trained model, with adapters merged and beside it, and what losses learned.

    Raises:
        XtokenError: that failed; the last checkpoint holds the weights, and the same command writes them.
    """
    model = training.student.model
    once = dict(model.named_parameters()) | dict(model.named_buffers())  # tied ones under one name
    state = gathered({name: one for name, one in model.state_dict().items() if name in once}, training.ranks.first)
    if not training.ranks.first:
        return {}
    try:
        return _write_result(training, state)
    except (OSError, XtokenError) as error:
        raise XtokenError(
            f"the trained model could not be written ({error}). Its weights are in {training.run.checkpoints}; mend "
            "this and run the same command again, which writes the model without training"
        ) from error


def _write_result(training: "Training", state: dict[str, Tensor]) -> dict[str, Any]:
    asked, run, model = training.config.student, training.run, training.student.model
    adapted = asked.lora is not None
    tokenizer = training.tokenizer_files or asked.tokenizer_source
    whole, dtype = merged(model, state) if adapted else state, training.save_dtype
    if dtype == next(model.parameters()).dtype:
        save_student(model, tokenizer, run.model, whole)
    else:
        save_student(model, tokenizer, run.model, rounded(model, whole, dtype), dtype)
    found: dict[str, Any] = {"model": str(run.model)}
    if adapted:
        save_adapter(model, run.root / ADAPTER, state)
        found["adapter"] = str(run.root / ADAPTER)
    learned = save_weights(training.objective.losses, training.sources.folders, run.root)
    return found | ({"learned_w": learned} if learned else {})


def summary_of(training: "Training") -> dict[str, Any]:
    """The figures of a run as far as it got; see ``xtoken.trainer.loop.train``."""
    counted, metrics = training.counted, training.metrics
    last = [line for line in metrics.lines if "loss" in line][-10:]
    summary: dict[str, Any] = {"steps": counted.step, "epochs": last[-1]["epoch"] if last else 0}
    summary |= {name: getattr(counted, name) for name in ("tokens", "chunks", "seconds")}
    if last:
        means = ("loss", "kd", "ce")
        summary |= {name: sum(line[name] for line in last) / len(last) for name in means if name in last[-1]}
        if len(training.objective.losses) > 1:
            summary |= _teacher_summary(training, last)
    summary["cut_tokens"] = sum(line.get("cut_tokens", 0) for line in metrics.lines)
    if training.layout.chat:
        summary |= {name: sum(line.get(key, 0) for line in metrics.lines) for name, key in _CHAT.items()}
    summary |= {"left_out": len(counted.left_out)} if counted.left_out else {}
    summary |= {"damaged_checkpoints": training.damaged} if training.damaged else {}
    summary |= {"notes": training.notes} if training.notes else {}
    evaluations = {when: metrics.evaluation(when) for when in ("before", "after")}
    return summary | {when: figures for when, figures in evaluations.items() if figures}


def _teacher_summary(training: "Training", last: list[dict[str, Any]]) -> dict[str, Any]:
    """What each teacher held and taught; how many samples they share."""
    sources, config = training.sources, training.config
    rows = [
        {
            "teacher": folder.manifest.teacher.model,
            "loss": loss,
            "samples": held,
            "samples_seen": seen,
            "kd": sum(line["teacher_kd"][i] for line in last) / len(last),
        }
        for i, (folder, loss, held, seen) in enumerate(
            zip(sources.folders, config.losses, sources.held, training.counted.held, strict=True)
        )
    ]
    return {"teachers": rows, "samples": sources.samples, "samples_of_all_teachers": sources.shared}
