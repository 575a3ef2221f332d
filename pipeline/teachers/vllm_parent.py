"""No engine process outlives the process that it serves.

vLLM's engine process does not notice when its parent is killed: it would wait, with the GPU's memory, for ever.
``EndsWithParent`` becomes a base class of vLLM's workers (of its ``worker_extension_cls``), in whichever process those
are, and watches the parent from before the model is loaded. Where there is no /proc, nothing is watched.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARENT = "XTOKEN_VLLM_PARENT"
_SECONDS = 1.0


@contextmanager
def followed() -> Iterator[None]:
    """Workers that are started inside end when this process does."""
    os.environ[_PARENT] = f"{os.getpid()}:{_started(os.getpid())}"
    try:
        yield
    finally:
        del os.environ[_PARENT]


class EndsWithParent:
    """See the module. The watch begins in ``__new__``: a worker's own ``__init__`` calls none of such a base."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "EndsWithParent":
        """Start to watch the process that ``followed``, unless it is this one."""
        del args, kwargs
        pid, _, started = os.environ.get(_PARENT, "").partition(":")
        if started and int(pid) != os.getpid():
            watch = threading.Thread(target=_end_with, args=(int(pid), started), name="xtoken-parent", daemon=True)
            watch.start()
        return super().__new__(cls)


def _end_with(pid: int, started: str) -> None:
    """Kill this process, and the engine process between it and ``pid``, once ``pid`` is gone."""
    while _started(pid) == started:
        time.sleep(_SECONDS)
    above = multiprocessing.parent_process()
    # Where there are several workers their parent is the engine; once that has ended, they have another parent.
    if above is not None and above.pid not in (None, pid) and above.pid == os.getppid():
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _started(pid: int) -> str:
    """Clock tick at which a living process started, which no later process of the same number shares; else empty."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
