"""lm-eval without its output. Importing this module imports lm-eval, so only ``xtoken.trainer.evaluate.tasks`` does."""

import difflib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any
from unittest import mock

import datasets
import tqdm
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.objective import Student

_CPU_BATCH = 4
_BOOTSTRAPS = 1000  # resamples for the stderr of metrics that are not means; drawn in this process
_TRUST = "say --trust-remote-code if you trust it"


class _Model(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """The student as lm-eval sees it; every forward pass moves the progress."""

    def __init__(self, student: Student, tokenizer: Any, progress: Progress) -> None:
        batch = "auto" if student.device.type == "cuda" else _CPU_BATCH
        super().__init__(
            pretrained=student.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch,
            mixed_precision_dtype=student.autocast,
        )
        self.progress = progress

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        self.progress.advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        self.progress.advance(len(context))
        return super()._model_generate(context, *args, **kwargs)


def load(config: EvalConfig) -> list[Any]:
    """Task and group objects of all names, with their data.

    Raises:
        XtokenError: a name is unknown, its task cannot be loaded, or would run foreign code without trust.
    """
    with _quiet(), _no_hub_code(config.trust_remote_code):
        manager = _manager(config)
        known = set(manager.all_tasks)
        for name in config.tasks:
            if name not in known:
                near = difflib.get_close_matches(name, manager.all_tasks, 5)
                like = f"did you mean {', '.join(near)}?" if near else "'lm-eval ls tasks' lists all"
                raise XtokenError(f"task {name!r} is unknown to lm-eval and to --task-path; {like}")
        return [one for name in dict.fromkeys(config.tasks) for one in _named(manager, name, config.trust_remote_code)]


def _manager(config: EvalConfig) -> TaskManager:
    """lm-eval's tasks and those of ``task_path``; the latter alone where they will do, which saves seconds."""
    if config.task_path is not None:
        own = TaskManager(include_path=config.task_path, include_defaults=False)
        if set(config.tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=config.task_path)


def _named(manager: TaskManager, name: str, trusted: bool) -> list[Any]:
    """A group, a task, or the tasks of a tag."""
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # a task may be code: whatever it raises is about this task
        raise XtokenError(
            f"task {name!r} cannot be loaded: {_reason(error)}; its data must be reachable or in the local cache"
        ) from error
    for task in loaded["tasks"].values():
        _check_code(task, trusted)
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def score(
    config: EvalConfig, tokenizer: Any, tasks: list[Any], student: Student, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of loaded tasks, see ``xtoken.trainer.evaluate.tasks.open_tasks``.

    Raises:
        XtokenError: a task and the model do not go together.
    """
    training = student.model.training
    progress.start("tasks", None, "sequences")
    try:
        with _quiet(), _no_hub_code(config.trust_remote_code):
            results = simple_evaluate(
                model=_Model(student, tokenizer, progress),
                tasks=tasks,
                num_fewshot=config.shots,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=config.apply_chat_template,
                limit=config.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                confirm_run_unsafe_code=config.trust_remote_code,
            )
    except (ImportError, LookupError, ValueError, AssertionError) as error:
        raise XtokenError(f"--tasks {','.join(config.tasks)}: lm-eval stopped with {_reason(error)}") from error
    finally:
        student.model.train(training)
    progress.finish()
    return _rows(results)


def _check_code(task: Any, trusted: bool) -> None:
    """Refuse what would run foreign code, before hours of scoring."""
    if getattr(task, "UNSAFE_CODE", False) and not trusted:
        raise XtokenError(f"task {task.task_name!r} runs the code that the model writes; {_TRUST}")
    functions: Mapping[str, Any] = getattr(task, "_metric_fn_list", {})
    unknown = [name for name, function in functions.items() if function is None]
    if unknown and task.config.process_results is None:
        raise XtokenError(
            f"task {task.task_name!r} has metric {unknown[0]!r}, which lm-eval does not know and fetches as code from "
            f"the hub; {_TRUST}"
        )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"


def _rows(results: Any) -> list[dict[str, Any]]:
    """Figures of all tasks and groups, as lm-eval orders them."""
    rows = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else key,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "n": _questions(results, task),
                    "shots": results["n-shot"].get(task),
                }
            )
    return rows


def _questions(results: Any, task: str) -> int:
    """Questions scored for a task, or for all tasks below a group."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_questions(results, below) for below in results["group_subtasks"].get(task, []))


class _NoBar(tqdm.tqdm):  # type: ignore[misc]  # nor has tqdm
    """lm-eval's bars, which cannot be switched off, would break into ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextmanager
def _quiet() -> Iterator[None]:
    """No prints, bars, warnings or log lines below an error of lm-eval and of what it calls."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module in ("tqdm", "lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface"):
            stack.enter_context(mock.patch.object(sys.modules[module], "tqdm", _NoBar))
        # a pool of as many processes as there are cores, forked from one that runs torch, for the stderr alone
        stack.enter_context(mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


@contextmanager
def _no_hub_code(trusted: bool) -> Iterator[None]:
    """Without trust the package ``evaluate``, which runs metrics as code from the hub, cannot be imported."""
    if trusted:
        yield
        return
    with mock.patch.dict(sys.modules, {"evaluate": None}):
        yield
