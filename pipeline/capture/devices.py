"""One GPU per worker process, decided before anything in it touches CUDA."""

import os
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEV = Path("/dev")


def visible_gpus() -> list[str]:
    """GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; all of the machine's when it is not set."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(_DEV.glob("nvidia[0-9]*"))]


def pin_gpu(slot: int) -> None:
    """Show this process one GPU only, the one of its slot; workers beyond the number of GPUs share them in turn."""
    gpus = visible_gpus()
    if len(gpus) > 1:
        os.environ[VISIBLE] = gpus[slot % len(gpus)]
