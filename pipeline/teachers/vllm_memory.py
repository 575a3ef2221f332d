"""How much of a GPU's memory one vLLM engine may take.

vLLM fills its share with weights and KV cache to the last byte of what its profile says, and the profile knows nothing
of prompt log-probabilities: room for those must stay outside. How much depends on which of its two model runners is
used. Sizes are bytes.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from xtoken.pipeline.teachers import model_source
from xtoken.pipeline.teachers.vllm_worker import BLOCK_ROWS

_MOST = 0.92  # what vLLM itself takes at most when nobody says anything
_V1 = 0.8  # room for copies of the log-softmax of a whole prompt
_COPIES = 3  # of a block, in float32: logits, and what top-k works in
_CONTEXT = 3 << 29  # 1.5 GiB: CUDA itself, NCCL, kernels' work space
_LEAST = 0.1


class Gpu(NamedTuple):
    """What an engine runs on: memory of one GPU, and how many engines share it."""

    total: int
    engines: int = 1


def memory_share(model_config: Any, tensor_parallel: int, gpu: Gpu | None, *, v2: bool) -> float:
    """Share of the GPU's memory that one engine may take, rounded down to a thousandth.

    Each engine needs its own room, so two on one GPU get less than half of it each.
    """
    engines = 1 if gpu is None else gpu.engines
    if not v2 or gpu is None or not gpu.total:
        return _down(_V1 / engines)
    room = _room(model_source.vocab_rows(model_config), _capped(model_config) or tensor_parallel > 1)
    return _down(max(_LEAST / engines, min(_MOST / engines, 1 / engines - room / gpu.total)))


def _room(rows: int, twice: bool) -> int:
    """What runner V2 needs beside its profile; a soft cap makes more copies, and so does gathering from other GPUs."""
    return _COPIES * BLOCK_ROWS * rows * 4 * (2 if twice else 1) + _CONTEXT


def _capped(model_config: Any) -> bool:
    """Whether logits go through a soft cap."""
    return bool(getattr(model_config.get_text_config(), "final_logit_softcapping", None))


def _down(share: float) -> float:
    return int(share * 1000) / 1000


@contextlib.contextmanager
def alone_on_gpu(engines: int) -> Iterator[None]:
    """Where engines share a GPU, let one load at a time: each takes what it sees the others take for its own.

    The lock is per set of GPUs, user and machine, and the system gives it back however its holder ends.
    """
    if engines == 1:
        yield
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # no folder for it: most of the time it goes well without
            _lock(held.enter_context(_lock_file().open("w")))
        yield


def _lock_file() -> Path:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace("/", "_").replace(",", "-")
    return Path(tempfile.gettempdir()) / f"xtoken-{os.getuid()}-gpu-{gpus[:200]}.lock"


def _lock(file: TextIO) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
