"""A folder on any fsspec filesystem, with the two operations that crash safety rests on.

``create`` and ``place`` make a file appear under its name whole, and only if nothing has that
name yet. Local folders use hard links for both; other filesystems their conditional put
(``mode="create"``), as strong as that filesystem makes it.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from fsspec.implementations.local import LocalFileSystem

from xtoken.schemas.errors import NO_ROOM, VerificationError, XtokenError
from xtoken.schemas.io.atomic import rename_synced, sync, write_synced
from xtoken.schemas.io.remote import named_errors, open_filesystem, open_url, protocol, refuse_special

_BLOCK = 1 << 20
_REMOTE_BLOCK = 4 << 20
_NO_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "az")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
SWEEPS = 5  # a run sweeps when it begins and when it ends
P = ParamSpec("P")
R = TypeVar("R")


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
        if error.errno not in NO_ROOM:
            raise
        raise DiskFull(
            f"no room to write in {root} ({error.strerror}); what is committed stays: "
            "free some space and run the same command again"
        ) from error


def _named(method: Callable[Concatenate["Folder", P], R]) -> Callable[Concatenate["Folder", P], R]:
    """Errors of networks and servers become XtokenError that names the file."""

    @wraps(method)
    def run(folder: "Folder", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with named_errors(f"{folder.root}/{args[0]}" if args and args[0] else folder.root):
            return method(folder, *args, **kwargs)

    return run


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

    @_named
    def make(self, *names: str) -> None:
        """Create subfolders; of an object store, which has none, only the root's bucket."""
        for name in names:
            # s3fs would look for the bucket each time, and create it when nobody answers
            if not name or protocol(self.root) not in _NO_FOLDERS:
                self.fs.makedirs(self.at(name), exist_ok=True)

    @_named
    def exists(self, name: str) -> bool:
        """Whether a file or folder has that name."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.at(name)))

    def is_link(self, name: str) -> bool:
        """Whether a local name is a symbolic link (other filesystems have none)."""
        return self.local and os.path.islink(self.at(name))

    @_named
    def names(self, subfolder: str = "") -> list[str]:
        """Sorted names in a subfolder; none when it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.at(subfolder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    @_named
    def sizes(self, subfolder: str = "") -> dict[str, int]:
        """Bytes of each file in a subfolder, by its name there; none when it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.at(subfolder), detail=True)
        except FileNotFoundError:
            return {}
        files = [entry for entry in found if entry["type"] == "file"]
        return {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in files}

    def blocks(self, name: str) -> Iterator[bytes]:
        """Content of a file in blocks of a few MiB; FileNotFoundError when absent."""
        # object stores would hold tens of MiB of each open file otherwise
        options = {} if self.local else {"block_size": _REMOTE_BLOCK}
        refuse_special(self.fs, self.at(name))
        with named_errors(self.url(name)), self.fs.open(self.at(name), "rb", **options) as file:
            while block := file.read(_BLOCK):
                yield block

    @_named
    def read(self, name: str) -> bytes:
        """Whole content of a file; FileNotFoundError when absent, VerificationError for a symbolic link."""
        if self.is_link(name):
            raise VerificationError(f"{self.url(name)} is a symbolic link; an artifact holds plain files only")
        with open_url(self.url(name)) as file:
            return file.read()

    @_named
    def remove(self, name: str) -> None:
        """Remove a file; no error when it is gone already."""
        try:
            self.fs.rm_file(self.at(name))
        except FileNotFoundError:
            return

    def remove_empty(self) -> None:
        """Remove the root where it is a local folder that holds nothing."""
        if self.local:
            with suppress(OSError):
                os.rmdir(self.at(""))

    @_named
    def rename(self, old: str, new: str) -> None:
        """Move a file within the folder."""
        self.fs.mv(self.at(old), self.at(new))

    def sync(self, name: str) -> None:
        """Force a local file or folder to disk."""
        if self.local:
            sync(self.at(name))

    @_named
    def sha256(self, name: str) -> tuple[str, int]:
        """sha256 and size in bytes of a file."""
        digest, size = hashlib.sha256(), 0
        with open_url(self.url(name)) as file:
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
        return self._published(name, data, self.place)

    @_named
    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, over what had its name."""
        if not self.local:
            self.fs.pipe_file(self.at(name), data)
            return
        self._published(name, data, self._take)

    @_named
    def put(self, path: str, name: str) -> None:
        """Give a finished local file the name ``name``, whole and over what had it; ``path`` itself is gone then.

        Args:
            path: local path; of the same filesystem where the folder is local.
        """
        if not self.local:
            self.fs.put_file(path, self.at(name))
            os.remove(path)
            return
        sync(path)
        rename_synced(path, self.at(name))

    def _published(self, name: str, data: bytes, publish: Callable[[str, str], bool]) -> bool:
        """Write a temporary file and publish it; again where another run's sweep took its writer for dead."""
        for _ in range(SWEEPS):
            tmp = self._write_tmp(name, data)
            try:
                return publish(tmp, name)
            except FileNotFoundError:
                continue
            finally:
                self.remove(tmp)
        raise XtokenError(f"{self.url(name)} cannot be written: something removes files from {self.root}; stop it")

    def _take(self, tmp: str, name: str) -> bool:
        rename_synced(self.at(tmp), self.at(name))
        return True

    def _write_tmp(self, name: str, data: bytes) -> str:
        tmp = f"{name}.{secrets.token_hex(6)}.tmp"
        with disk_full_named(self.root):
            write_synced(self.at(tmp), data)
        return tmp

    @_named
    def _put(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.at(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # what s3fs makes of a condition that does not hold
            if error.errno != errno.EINVAL or not self.exists(name):
                raise
            return False
        return True
