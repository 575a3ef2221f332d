"""Where libraries keep caches and settings when the home folder cannot take them: a folder of ours below the temporary.

Numba, torch.compile, Triton, matplotlib, W&B, vLLM and the hub's client all write below the home folder unless the
environment says otherwise, and fail where it is missing or read-only. Variables that the user has set stay as they are.
"""

import getpass
import os
import stat
import tempfile
from pathlib import Path

# Variables of what lies below the usual cache folder, and of what lies elsewhere in the home folder.
_CACHES = {
    "XDG_CACHE_HOME": "",
    "XTOKEN_CACHE": "xtoken",
    "HF_MODULES_CACHE": "huggingface/modules",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
_ELSEWHERE = {
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "TRITON_CACHE_DIR": "triton",
    "WANDB_CONFIG_DIR": "wandb",
}


def settle_home() -> str | None:
    """Point caches elsewhere where the home folder cannot take them, for this process and those it starts.

    Returns:
        A line that says so; None where nothing was to be done, also when it was done before.
    """
    _name_user()
    if not os.environ.get("HOME", "set").strip():  # ~ would be the root of the filesystem
        del os.environ["HOME"]
    home = os.path.expanduser("~")
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    if _can_write(usual):
        if not _can_write(home):
            _set(_ELSEWHERE, usual)
        return None
    instead = _private_folder()
    if instead is None:
        return f"neither {usual} nor a temporary folder can be written: nothing is cached"
    if not os.path.isabs(home):
        os.environ["HOME"] = instead
    hub = os.path.join(usual, "huggingface")
    if os.access(hub, os.R_OK | os.X_OK):  # models that lie there stay in use
        os.environ.setdefault("HF_HOME", hub)
    os.environ.pop("XDG_CACHE_HOME", None)
    _set(_CACHES | _ELSEWHERE, instead)
    return f"{usual} cannot be written: caches of this run go to {instead} (XDG_CACHE_HOME names another folder)"


def _set(folders: dict[str, str], root: str) -> None:
    for name, folder in folders.items():
        os.environ.setdefault(name, os.path.join(root, folder).rstrip("/"))


def _name_user() -> None:
    """Libraries ask for the user's name, which a number without an entry in /etc/passwd does not have."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def _can_write(folder: str) -> bool:
    """Whether a folder takes files, or can be made; nothing stays behind."""
    path = Path(folder)
    if not path.is_absolute():
        return False
    while not os.path.lexists(path):
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


def _private_folder() -> str | None:
    """A folder that nobody else can write: numba's and torch's caches are code."""
    try:
        folder = os.path.join(tempfile.gettempdir(), f"xtoken-{os.getuid()}")
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            info = os.lstat(folder)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
                return tempfile.mkdtemp(prefix="xtoken-")
        return folder if _can_write(folder) else None
    except OSError:
        return None
