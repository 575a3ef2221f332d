"""How a vLLM engine starts, what it says when it cannot, and how its sudden end is noticed.

On a GPU the engine is a process of its own. vLLM's error for whatever happens there is "see root cause above", so what
such processes write on standard error is passed on and its end is kept.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from xtoken.pipeline.teachers.vllm_parent import followed

_KEPT = 1 << 16  # bytes of standard error
_LAST_WORDS_SECONDS = 2.0  # for what processes of an engine that ended have still to say
_LOOK_SECONDS = 1.0
_SAYS_NOTHING = re.compile(r"initialization failed|root cause|EngineDeadError|check the logs|raised in subprocess")
_VALIDATION = re.compile(r"\d+ validation errors? for \w+")
_ERROR = re.compile(r"(?:^|\s)(?:\w+\.)*(\w*(?:Error|Exception)): (\S.*)$")
_MEMORY = re.compile(
    r"out of memory|No available memory|Free memory on device|KV cache is needed|Error in memory profiling", re.I
)
_NO_OTHER_HEAD = "head_dtype different from the model dtype"
_LOG = logging.getLogger("xtoken")


class Overheard:
    """Standard error of processes that are started while ``listening``: passed on, and its last part kept."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._copier: threading.Thread | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Processes started inside are listened to as long as they live; this one only inside."""
        self._kept.clear()
        try:
            ours = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        heard, mouth = os.pipe()
        copier = threading.Thread(target=self._copy, args=(heard, os.dup(ours)), name="xtoken-stderr", daemon=True)
        copier.start()
        self._copier = copier
        os.dup2(mouth, 2)
        os.close(mouth)
        try:
            yield
        finally:
            os.dup2(ours, 2)
            os.close(ours)

    def _copy(self, heard: int, ours: int) -> None:
        while data := os.read(heard, _KEPT):
            self._kept += data
            del self._kept[:-_KEPT]
            with contextlib.suppress(OSError):
                os.write(ours, data)
        os.close(heard)
        os.close(ours)

    def root_cause(self) -> str | None:
        """What these processes died of, as far as they said; waits a moment for their last words."""
        if self._copier is not None:
            self._copier.join(_LAST_WORDS_SECONDS)
        return root_cause(bytes(self._kept).decode(errors="replace"))


def root_cause(said: str) -> str | None:
    """The last error in a log that names its cause instead of pointing at another one."""
    found = [match for line in said.splitlines() if (match := _ERROR.search(line.rstrip()))]
    causes = [f"{match[1]}: {match[2]}" for match in found if not _SAYS_NOTHING.search(f"{match[1]}: {match[2]}")]
    return causes[-1][:1000] if causes else None


class CannotStart(Exception):
    """vLLM could not start; the message is the root cause as far as it is known."""


def lacks_memory(message: str) -> bool:
    """Whether an error of vLLM's is about memory."""
    return _MEMORY.search(message) is not None


def start_llm(options: dict[str, Any], heard: Overheard | None = None) -> Any:
    """``vllm.LLM(**options)``, whose processes end when this one does.

    An output head that is quantized cannot multiply in another precision, which only vLLM itself finds out: then it is
    started again without that wish.

    Args:
        options: see ``engine_options``.
        heard: keeps what the engine's processes say.

    Raises:
        CannotStart: whatever vLLM says.
    """
    heard = heard or Overheard()
    try:
        return _start(options, heard)
    except CannotStart as error:
        if "hf_overrides" not in options or _NO_OTHER_HEAD not in str(error):
            raise
    _LOG.warning("the output head is quantized and multiplies in its own precision, not in float32")
    return _start({name: value for name, value in options.items() if name != "hf_overrides"}, heard)


def _start(options: dict[str, Any], heard: Overheard) -> Any:
    import vllm

    _let_vllm_look_around()
    try:
        with heard.listening(), followed():
            return vllm.LLM(**options)
    except Exception as error:  # nothing of it is ours, and every release has other reasons
        said = _first_line(error)
        if not said or _SAYS_NOTHING.search(said):
            said = heard.root_cause() or said
        raise CannotStart(said or type(error).__name__) from error


def _first_line(error: Exception) -> str:
    """The first line of an error that says something; pydantic's first line only counts what follows."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 2 and _VALIDATION.fullmatch(lines[0]):
        lines = [line.removeprefix("Value error, ").split(" [type=")[0] for line in lines[1:]]
    return lines[0] if lines else ""


def watch(llm: Any) -> None:
    """Have a step that waits raise once the engine's process is gone.

    vLLM notices and raises only at the next request: who waits for an answer when the process is killed, or aborts,
    waits for ever. An engine in this process ends with it, and nothing is watched.
    """
    client = getattr(llm.llm_engine, "engine_core", None)
    resources = getattr(client, "resources", None)
    if hasattr(resources, "engine_dead"):
        answers = getattr(client, "outputs_queue", None)
        threading.Thread(target=_wake, args=(resources, answers), name="xtoken-engine", daemon=True).start()


def _wake(resources: Any, answers: Any) -> None:
    while not resources.engine_dead:
        time.sleep(_LOOK_SECONDS)
    if answers is None:  # a release that waits elsewhere: whoever started this process sees at once that it is gone
        os._exit(1)
    answers.put(RuntimeError("the engine's process is gone"))


def is_gone(llm: Any) -> bool:
    """Whether the engine had a process of its own that has ended."""
    return bool(getattr(getattr(llm.llm_engine.engine_core, "resources", None), "engine_dead", False))


def _let_vllm_look_around() -> None:
    """Give llvmlite's library object an empty ``__dict__``.

    On a CPU without Triton, vLLM reads ``__dict__`` of everything that any module names; that object makes a C function
    of whatever name it is asked for, and vLLM stumbles over it. It is there once numba is imported.
    """
    functions = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}
