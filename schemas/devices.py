"""What ``--device auto`` means: the GPU, or the CPU where there is none; never the CPU because a driver is too old."""

import logging
import os
import re
import warnings
from pathlib import Path

from xtoken.schemas.errors import XtokenError

_LOG = logging.getLogger("xtoken")
_DEV, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LEAST_DRIVER = {"13": "580", "12": "525", "11": "450"}  # by major version of CUDA
_GO_ON = "or go on with --device cpu, which is many times slower"


def auto_device() -> str:
    """``cuda`` where torch can use a GPU, else ``cpu``.

    Who hides all GPUs (CUDA_VISIBLE_DEVICES set to nothing, or to -1) wants the CPU. A torch that is built for CUDA on
    a machine without an NVIDIA GPU is an ordinary laptop, or a pod that lacks its GPU: it is said, and work goes on.

    Raises:
        XtokenError: there is an NVIDIA GPU, and torch cannot use it.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch says here what it has against the driver
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return "cuda"
    hidden = os.environ.get(_VISIBLE)
    if hidden is not None and hidden.strip() in ("", "-1", "none", "void"):
        return "cpu"
    built = torch.version.cuda
    if trouble := _trouble(built, torch.__version__):
        reason = str(caught[0].message).split(". ")[0].strip() if caught else ""
        raise XtokenError(f"--device auto: {trouble}" + (f" (torch: {reason})" if reason else ""))
    if built is not None:
        _LOG.warning("torch is built for CUDA %s and there is no NVIDIA GPU here: working on the CPU", built)
    return "cpu"


def _trouble(built: str | None, version: str) -> str | None:
    """What keeps torch from the NVIDIA hardware of this machine, and the way out; None where there is none."""
    cards, driver = any(_DEV.glob("nvidia[0-9]*")), _driver()
    if not cards and driver is None:
        return None
    there = "an NVIDIA GPU is here" + (f" (driver {driver})" if driver else "")
    if not cards:
        return (
            f"the NVIDIA driver {driver} is loaded, but no GPU is given to this process; start the container with "
            f"--gpus all, {_GO_ON}"
        )
    if built is None:
        return f"{there}, but torch {version} is built without CUDA; install torch for CUDA (pytorch.org), {_GO_ON}"
    least = _LEAST_DRIVER.get(built.split(".")[0])
    needs = f", which needs driver {least} or newer" if least else ""
    return (
        f"{there}, but torch {version} cannot use it: it is built for CUDA {built}{needs}; update the driver, install "
        f"torch for an older CUDA (pytorch.org), {_GO_ON}"
    )


def _driver() -> str | None:
    """Version of the NVIDIA driver that the kernel has loaded."""
    try:
        found = re.search(r"\b\d{3}\.\d+(?:\.\d+)*\b", _DRIVER.read_text())
    except OSError:
        return None
    return found.group() if found else "of unknown version"
