"""A folder on any fsspec filesystem, with the two operations that crash safety rests on.

``create`` and ``place`` make a file appear under its name whole, and only if nothing has that
name yet. Local folders use hard links for both; other filesystems their conditional put
(``mode="create"``), as strong as that filesystem makes it.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import XtokenError
from schemas.manifest import open_filesystem

_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


class StopRun(XtokenError):
    """An error that no other shard would escape: the run ends at once instead of trying them all."""


class DiskFull(StopRun):
    """No room to write; nothing committed is lost."""


@contextmanager
def disk_full_named(root: str) -> Iterator[None]:
    """Turn the system's 'no space' errors inside the block into ``DiskFull``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(
            f"no room to write in {root} ({error.strerror}); what is committed stays: "
            "free some space and run the same command again"
        ) from error


class Folder:
    """Files below one root. Names are relative and built by our code, never read from a file."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"
        self.fs, self._path = open_filesystem(self.root)
        self.local = isinstance(self.fs, LocalFileSystem)

    def at(self, name: str) -> str:
        """Path of ``name`` on the filesystem."""
        return f"{self._path.rstrip('/')}/{name}"

    def url(self, name: str) -> str:
        """What ``fsspec.open`` takes for ``name`` (a plain path where the folder is local)."""
        return self.at(name) if self.local else f"{self.root}/{name}"

    def make(self, *names: str) -> None:
        """Create subfolders."""
        for name in names:
            self.fs.makedirs(self.at(name), exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether a file or folder has that name."""
        return bool(self.fs.exists(self.at(name)))

    def is_link(self, name: str) -> bool:
        """Whether a local name is a symbolic link (other filesystems have none)."""
        return self.local and os.path.islink(self.at(name))

    def names(self, subfolder: str = "") -> list[str]:
        """Sorted names in a subfolder; none when it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.at(subfolder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def read(self, name: str) -> bytes:
        """Whole content of a file; FileNotFoundError when absent."""
        with fsspec.open(self.url(name), "rb") as file:
            content: bytes = file.read()
        return content

    def remove(self, name: str) -> None:
        """Remove a file; no error when it is gone already."""
        try:
            self.fs.rm_file(self.at(name))
        except FileNotFoundError:
            return

    def rename(self, old: str, new: str) -> None:
        """Move a file within the folder."""
        self.fs.mv(self.at(old), self.at(new))

    def sync(self, name: str) -> None:
        """Force a local file or folder to disk."""
        if not self.local:
            return
        handle = os.open(self.at(name), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def sha256(self, name: str) -> tuple[str, int]:
        """sha256 and size in bytes of a file."""
        digest, size = hashlib.sha256(), 0
        with fsspec.open(self.url(name), "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return digest.hexdigest(), size

    def place(self, tmp: str, name: str) -> bool:
        """Give the finished file ``tmp`` the name ``name`` if it is free; ``tmp`` itself stays.

        Returns:
            Whether the name was free.
        """
        if not self.local:
            return self._put(name, self.read(tmp))
        try:
            os.link(self.at(tmp), self.at(name))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise XtokenError(
                f"the filesystem of {self.root} has no hard links ({error.strerror}), which publishing needs; "
                "write to another local folder or to an object store"
            ) from error
        self.sync(os.path.dirname(name))
        return True

    def create(self, name: str, data: bytes) -> bool:
        """Write a file whole and only if absent; returns whether this call did it."""
        if not self.local:
            return self._put(name, data)
        tmp = self._write_tmp(name, data)
        try:
            return self.place(tmp, name)
        finally:
            self.remove(tmp)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, over what had its name."""
        if not self.local:
            self.fs.pipe_file(self.at(name), data)
            return
        os.replace(self.at(self._write_tmp(name, data)), self.at(name))
        self.sync(os.path.dirname(name))

    def _write_tmp(self, name: str, data: bytes) -> str:
        tmp = f"{name}.{secrets.token_hex(6)}.tmp"
        try:
            with disk_full_named(self.root), open(self.at(tmp), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.remove(tmp)
            raise
        return tmp

    def _put(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.at(name), data, mode="create")
        except FileExistsError:
            return False
        return True
