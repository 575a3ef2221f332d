"""Training runs that are killed: ``xtoken train`` in children forked from one process that has everything imported.

As a program it is that process: it reads one JSON job per line, forks, says the child's pid, and when the child has
ended its exit code (negative: the signal that ended it). It never computes, so its children may use threads freely.

A job is ``config`` (a TrainConfig), ``tokenizer`` (the student's TokenizerInfo), ``log`` (file for what the child says)
and perhaps a fault:
    ``die``: [s, c]: SIGKILL at the c-th call that changes the disk, counted from where the s-th checkpoint begins
    ``room``: bytes that the disk takes for checkpoints before it is full
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "xtoken.trainer.evaluate.agreement",
    "xtoken.trainer.loop",
)
CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Nursery:
    """The process that forks, seen from a test."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, job: Mapping[str, Any]) -> "Child":
        """Fork a run; one at a time."""
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return Child(int(self.answer()), self)

    def answer(self) -> str:
        """The next line; no line means that the process itself has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the forking process ended with {self._process.poll()}"
        return line

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=300)


class Child:
    """A training run in a process of its own."""

    def __init__(self, pid: int, nursery: Nursery) -> None:
        self._nursery = nursery
        self._handle = os.pidfd_open(pid)  # unlike the number, it never comes to mean another process

    def send(self, number: int) -> None:
        """A signal, if it still lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def lives(self) -> bool:
        """Whether it has not ended by itself."""
        try:
            signal.pidfd_send_signal(self._handle, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> int:
        """Wait; its exit code."""
        code = int(self._nursery.answer())
        os.close(self._handle)
        return code

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Until ``condition`` holds or the child has ended."""
        deadline = time.monotonic() + seconds
        while self.lives() and not condition():
            assert time.monotonic() < deadline, "neither came"
            time.sleep(0.002)


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A forking process that does not outlive the block."""
    process = Nursery()
    try:
        yield process
    finally:
        process.close()


def main() -> None:
    """Fork a child per line of stdin."""
    for name in PRELOAD:
        import_module(name)
    sys.modules["torch"].set_num_threads(1)
    sys.modules["xtoken.trainer.data.packing"].packed_shapes([3, 2], 8, 8)  # sets numba up: half a second per child
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(job: dict[str, Any]) -> None:
    """Train, then end without what the forking process would do at its end."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 1
    try:
        code = _train(job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(job: dict[str, Any]) -> int:
    import numpy as np

    from xtoken.schemas.configs.train import TrainConfig
    from xtoken.schemas.errors import XtokenError
    from xtoken.schemas.manifest import TokenizerInfo
    from xtoken.schemas.ui.progress import Silent
    from xtoken.trainer.evaluate.samples import EvalSample
    from xtoken.trainer.loop import train

    if "die" in job:
        _die_in_checkpoint(*job["die"])
    if "room" in job:
        _small_disk(job["room"])
    held_out = [EvalSample(np.array([3, 4, 5, 6], np.int32), 9, 2), EvalSample(np.array([7, 8], np.int32), 3, 1)]
    try:
        train(TrainConfig.from_flat(**job["config"]), TokenizerInfo(**job["tokenizer"]), held_out, Silent())
    except XtokenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _die_in_checkpoint(save: int, call: int) -> None:
    """kill -9 of this very process, before the disk is changed for the ``call``-th time since checkpoint ``save``."""
    left = {"saves": save, "calls": call}
    for name in CALLS:
        setattr(os, name, _counted(getattr(os, name), name, left))


def _counted(real: Callable[..., Any], name: str, left: dict[str, int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if name == "mkdir" and Path(args[0]).name.startswith(".step-"):
            left["saves"] -= 1
        if left["saves"] <= 0:
            left["calls"] -= 1
            if left["calls"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


class _Disk:
    """A disk with room for so many bytes of checkpoints; what is deleted makes no room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Any, mode: str) -> Any:
        """A file whose writes count."""
        file = open(path, mode, buffering=0)  # noqa: SIM115
        return _OnDisk(file, self) if "w" in mode else file


class _OnDisk:
    """A file that takes what fits."""

    def __init__(self, file: Any, disk: _Disk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_OnDisk":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """As much as there is room for, then the error of a full disk."""
        data = memoryview(data)[: self._disk.room]
        self._disk.room -= len(data)
        written: int = self._file.write(data)
        if not self._disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


def _small_disk(room: int) -> None:
    import xtoken.trainer.checkpoint as checkpoint

    checkpoint.open = _Disk(room).open  # type: ignore[attr-defined]  # stands before the builtin


if __name__ == "__main__":
    main()
