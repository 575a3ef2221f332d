"""Tasks of lm-eval on a loaded student; lm-eval itself is imported only when there are any."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Progress

if TYPE_CHECKING:
    from xtoken.trainer.objective import Student

Scorer = Callable[["Student", Progress], list[dict[str, Any]]]


def open_tasks(config: EvalConfig) -> Scorer:
    """Load ``config.tasks`` (names of tasks, groups or tags), their data and the tokenizer of the model's folder.

    Task files may name Python functions, those of ``config.task_path`` included. Metrics and tasks that fetch code or
    run what the model writes need ``config.trust_remote_code``. With ``config.apply_chat_template`` questions are
    messages in the model's chat template, and examples earlier turns of the conversation.

    Returns:
        What scores a student: one row per task (group) and metric, with ``task``, ``metric`` (lm-eval's filter behind
        a comma, where it has one), ``value``, ``stderr`` (None where lm-eval knows none), ``n`` questions and
        ``shots`` (a task that says 0 of its own keeps 0).

    Raises:
        XtokenError: lm-eval is not installed, a task is unknown or cannot be loaded, or the model has no Hugging Face
            tokenizer, or one without the chat template that is to be applied.
    """
    if config.task_path is not None and not Path(config.task_path).is_dir():
        raise XtokenError(f"--task-path {config.task_path} is not a folder; give the one that holds the task files")
    try:
        from xtoken.trainer.evaluate.harness import load, score
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("trainer", "schemas"):
            raise
        raise XtokenError(
            f"--tasks needs lm-eval, and the module {error.name!r} is not installed; pip install 'xtoken[tasks]'"
        ) from error
    return functools.partial(score, config, _tokenizer(config), load(config))


def _tokenizer(config: EvalConfig) -> Any:
    from transformers import AutoTokenizer

    source = config.tokenizer or config.model[0]
    auto: Any = AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # as many ways as there are files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise XtokenError(
            f"--tasks needs the Hugging Face tokenizer of {source!r}, which cannot be loaded: {reason}; "
            "give --tokenizer ID or FOLDER, or leave --tasks out"
        ) from error
    if config.apply_chat_template and not tokenizer.chat_template:
        raise XtokenError(
            f"--apply-chat-template: the tokenizer of {source!r} has no chat template; put one beside it as "
            "chat_template.jinja, or leave the flag out"
        )
    return tokenizer
