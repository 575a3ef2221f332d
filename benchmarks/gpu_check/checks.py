"""The checks, in order of value. Each returns figures, and fails by raising."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.capturing import capture_hf, capture_vllm
from benchmarks.gpu_check.engine import killed, pictures, rate_large, rate_small, slices
from benchmarks.gpu_check.inputs import Figures, on_gpu
from benchmarks.gpu_check.kernels import kernels
from benchmarks.gpu_check.training import attention, liger, memory, packing, trainer_ce, trainer_p_kl, trainer_parts

Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One question.

    Attributes:
        name: of the check.
        function: gets the folder to work in; returns figures, raises where the answer is wrong.
        needs: "cuda", "two GPUs", or names of packages.
        least: seconds of the budget that must be left.
        most: seconds after which it is ended, so that one that hangs leaves the others their time.
    """

    name: str
    function: Callable[[Path], Figures]
    needs: tuple[str, ...] = ()
    least: float = 20.0
    most: float = 240.0

    def run(self, work: Path) -> Result:
        """The check, in this process."""
        return {"verdict": "passed", "figures": self.function(work)}


def lacking(check: Check) -> str:
    """Why a check cannot run here; empty: it can."""
    for name in check.needs:
        if name == "cuda" and not on_gpu():
            return "needs a GPU that torch can use"
        if name == "two GPUs" and torch.cuda.device_count() < 2:
            return "needs two GPUs that torch can use"
        if name not in ("cuda", "two GPUs") and find_spec(name) is None:
            return f"needs the package {name}"
        if name == "triton" and not on_gpu() and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU that torch can use, or Triton's interpreter (TRITON_INTERPRET=1)"
    return ""


def environment(_: Path) -> Figures:
    """Versions, driver and device."""
    found: Figures = {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "GPUs": torch.cuda.device_count()}
    elif Path("/dev/nvidia0").exists():
        raise RuntimeError("the machine has a GPU that torch cannot use: driver 580 or newer is needed for CUDA 13")
    return found


CHECKS = (
    Check("environment", environment, least=5),
    Check("kernels", kernels, needs=("triton",), least=30),
    Check("packing", packing, least=30),
    Check("capture-hf", capture_hf, least=60),
    Check("capture-vllm", capture_vllm, needs=("vllm",), least=90),
    Check("trainer-ce", trainer_ce, least=60),
    Check("trainer-p-kl", trainer_p_kl, least=60),
    Check("attention", attention, least=60),
    Check("memory", memory, needs=("cuda",), least=60),
    Check("rate-large-steps", rate_large, needs=("vllm",), least=60),
    Check("rate-small-steps", rate_small, needs=("vllm",), least=60),
    Check("engine-killed", killed, needs=("vllm",), least=60),
    Check("pictures", pictures, needs=("vllm", "torchvision"), least=60),
    Check("slices", slices, needs=("two GPUs", "vllm"), least=60),
    Check("trainer-parts", trainer_parts, least=60),
    Check("liger", liger, needs=("cuda", "liger_kernel"), least=60),
)
