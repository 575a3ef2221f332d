"""Local files and folders that appear under their name whole or not at all.

What is being made has a temporary name beside the final one, takes its place by one rename, and is removed where making
it failed. Commits of an artifact have a stricter protocol on top of this (``pipeline.store.files``), checkpoints one of
their own (``trainer.checkpoint``).
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """The temporary name of a file; what lies there after the block takes the place of what had the name ``path``.

    Args:
        path: the file.
        shared: several processes may write the same file at once: each gets a temporary name of its own. Otherwise it
            is ``.NAME.tmp``, which the next writer takes over should this one be killed.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole, over what had its name, in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The temporary name of a folder, free at first; what lies there after the block takes the place of ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:  # on a full disk, half of it would keep the room that others need
        shutil.rmtree(temporary, ignore_errors=True)


def write_synced(path: str, data: bytes) -> None:
    """Write a file and force its content to disk; it is removed where that fails."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def rename_synced(old: str, new: str) -> None:
    """Give a file that is on disk another name, over what had it, and force the name to disk."""
    os.replace(old, new)
    sync(os.path.dirname(new))


def sync(path: str) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
