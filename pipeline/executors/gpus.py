"""The GPUs of each worker process, decided before anything in it touches CUDA."""

import os
from pathlib import Path

from xtoken.schemas.configs.capture import RunGroup

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEV = Path("/dev")


def visible_gpus() -> list[str]:
    """GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; all of the machine's when it is not set."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(_DEV.glob("nvidia[0-9]*"))]


def engines_per_gpu(run: RunGroup, tensor_parallel: int) -> int:
    """Engines of this run that share one GPU at most, on this machine; to be asked before ``pin_gpus``."""
    if run.ray is not None:
        share = run.gpus_per_worker
        return max(1, int(1 / share + 1e-9)) if share else 1
    groups = max(1, len(visible_gpus()) // tensor_parallel)
    return -(-(run.workers or 1) // groups)


def pin_gpus(slot: int, count: int = 1) -> None:
    """Show this process ``count`` GPUs only, those of its slot; workers beyond the last full group share in turn."""
    gpus = visible_gpus()
    if len(gpus) > count:
        first = slot % (len(gpus) // count) * count
        os.environ[VISIBLE] = ",".join(gpus[first : first + count])
