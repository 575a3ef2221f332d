"""Where ``share`` puts an artifact together: a folder on any filesystem, or a dataset repository of the hub.

A file appears under its name whole or not at all. It is first staged in a local file: beside its place where the
destination is local, in a temporary folder else.
"""

import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from xtoken.pipeline.store.files import SWEEPS, Folder, disk_full_named
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import named_errors

_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?((?:/(?!\.+(?:/|$))[\w.-]+)*)/?")
# One commit of a hub holds about this much; what is staged for it lies on the local disk.
HUB_BYTES = 1 << 30
HUB_FILES = 1000
R = TypeVar("R")


class Swept(XtokenError):
    """A temporary file is gone: another command that began in the same folder took its writer for dead."""

    def __init__(self, root: str) -> None:
        super().__init__(
            f"another command writes into {root} and removes what this one has begun; let one of them end, then run "
            "the same command again"
        )


def again_if_swept(work: Callable[[], R]) -> R:
    """What ``work`` returns; it is done again where its temporary files were swept away.

    Raises:
        Swept: time and again.
    """
    for left in reversed(range(SWEEPS)):
        try:
            return work()
        except Swept:
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


@contextmanager
def reachable(root: str) -> Iterator[None]:
    """Turn what a filesystem raises inside the block into an error that names ``root``.

    Raises:
        DiskFull: no room.
        XtokenError: refused, unreachable, or gone.
    """
    try:
        with disk_full_named(root), named_errors(root):
            yield
    except OSError as error:
        raise XtokenError(
            f"{root} cannot be used ({type(error).__name__}: {error}); what is copied stays: check the address and "
            "your permissions, then run the same command again"
        ) from error


def remove_if_there(path: str) -> None:
    """Remove a local file."""
    with suppress(FileNotFoundError):
        os.remove(path)


class Destination:
    """A folder that is being filled. Threads may call ``put`` and ``write`` for different names at once.

    Attributes:
        folder: the same place, for reading.
    """

    def __init__(self, root: str) -> None:
        self.folder = Folder(root)
        self._temporary: Any = None if self.folder.local else tempfile.TemporaryDirectory(prefix="xtoken-share-")
        self.staging_root = self.folder.at("") if self._temporary is None else str(self._temporary.name)

    def close(self) -> None:
        """Remove what is staged for other filesystems."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def make(self, *names: str) -> None:
        """Create subfolders where the filesystem has such."""
        self.folder.make("", *names)

    def staging(self, name: str) -> str:
        """Local path of a new temporary file for ``name``."""
        return os.path.join(self.staging_root, f"{os.path.basename(name)}.{secrets.token_hex(6)}.tmp")

    def put(self, path: str, name: str) -> None:
        """Take the finished local file ``path`` (from ``staging``) as ``name``.

        Raises:
            Swept: it is gone.
        """
        try:
            self.folder.put(path, name)
        except FileNotFoundError:
            if os.path.exists(path):
                raise
            raise Swept(self.folder.root) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a small file whole, over what had its name."""
        again_if_swept(partial(self._write, name, data))

    def _write(self, name: str, data: bytes) -> None:
        path = self.staging(name)
        try:
            with disk_full_named(self.staging_root), open(path, "wb") as file:
                file.write(data)
            self.put(path, name)
        finally:
            remove_if_there(path)

    def claim(self, name: str, data: bytes) -> bool:
        """Write a small file only if absent; returns whether this call did it."""
        return self.folder.create(name, data)

    def drop(self, name: str) -> None:
        """Remove a file."""
        self.folder.remove(name)

    def flush(self) -> None:
        """Make everything that was put appear."""


class HubDestination(Destination):
    """A dataset repository: files are collected and appear in a few commits.

    Args:
        root: hf://datasets/OWNER/NAME[@REVISION][/FOLDER].
        api: a ``huggingface_hub.HfApi``.
    """

    def __init__(self, root: str, api: Any) -> None:
        super().__init__(root)
        found = _HUB.fullmatch(root)
        if found is None:
            raise XtokenError(f"{root} is not a dataset of the hub; write hf://datasets/OWNER/NAME")
        self._repository, self._revision = found[1], found[2]
        self._prefix = f"{found[3]}/".lstrip("/")
        self._api = api
        self._lock = threading.Lock()
        self._waiting: dict[str, str] = {}
        self._dropped: list[str] = []
        self._bytes = 0

    def make(self, *names: str) -> None:
        """Create the repository, private, unless it is there; a repository needs no folders."""
        del names
        # what the licences allow is for people to decide: a repository is made public on the hub, not by a default
        self._api.create_repo(self._repository, repo_type="dataset", private=True, exist_ok=True)

    def put(self, path: str, name: str) -> None:
        """See ``Destination``; the file appears with its batch."""
        with self._lock:
            kept = self.staging(name)
            os.replace(path, kept)
            self._bytes += os.path.getsize(kept)
            self._waiting[name] = kept
            if self._bytes >= HUB_BYTES or len(self._waiting) >= HUB_FILES:
                self._commit()

    def claim(self, name: str, data: bytes) -> bool:
        """See ``Destination``; as strong as a hub makes it: a commit does not ask whether a file is absent."""
        if self.folder.exists(name):
            return False
        self.write(name, data)
        return True

    def drop(self, name: str) -> None:
        """See ``Destination``; it goes with the next batch."""
        with self._lock:
            waiting = self._waiting.pop(name, None)
            if self.folder.exists(name):
                self._dropped.append(name)
        if waiting is not None:
            os.remove(waiting)

    def flush(self) -> None:
        """Commit what waits."""
        with self._lock:
            self._commit()

    def _commit(self) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [CommitOperationAdd(f"{self._prefix}{name}", path) for name, path in self._waiting.items()]
        dropped = [CommitOperationDelete(f"{self._prefix}{name}") for name in self._dropped]
        if not added and not dropped:
            return
        self._api.create_commit(
            self._repository,
            [*added, *dropped],
            commit_message=f"xtoken share: {len(added)} files",
            repo_type="dataset",
            revision=self._revision,
        )
        for path in self._waiting.values():
            os.remove(path)
        self._waiting, self._dropped, self._bytes = {}, [], 0
        self.folder.fs.invalidate_cache()


def open_destination(root: str) -> Destination:
    """The destination of a folder or URL."""
    if not root.startswith("hf://"):
        return Destination(root)
    from huggingface_hub import HfApi

    return HubDestination(root, HfApi())
