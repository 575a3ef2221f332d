"""A local cache of remote files, named by their sha256, of bounded size, shared by any number of processes.

A file under its final name is whole and was hashed. Downloads reserve their size in the name of their temporary file,
so the bound holds while they run. Locks (flock) say who is alive: a reader holds a shared one on its file, a download
an exclusive one on its temporary file; what is not locked may be evicted, least recently used first.
"""

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from xtoken.schemas.errors import NO_ROOM, VerificationError, XtokenError
from xtoken.schemas.io.paths import plain
from xtoken.schemas.io.remote import named_errors, open_filesystem, refuse_special
from xtoken.schemas.io.sizes import parse_size

FOLDER, BYTES = "XTOKEN_CACHE", "XTOKEN_CACHE_BYTES"
DEFAULT_FOLDER, DEFAULT_BYTES = "~/.cache/xtoken", "20GB"
_BLOCK = 8 << 20
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60  # for room that other readers hold; downloads of others are waited for to their end
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TMP = re.compile(r"([0-9a-z]+)\.(\d+)\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Copy:
    """A local file and what was found in it."""

    path: str
    sha256: str
    size: int


@contextmanager
def cached(url: str, sha256: str, size: int | None = None) -> Iterator[str]:
    """Path of a local file with the content at ``url``, good inside the block; a local file is itself, unchecked.

    Args:
        url: path or URL.
        sha256: what its manifest records.
        size: bytes that its manifest records; asked of the server when left out.

    Raises:
        VerificationError: the file has another sha256.
        FileNotFoundError: nothing is there.
        XtokenError: the server cannot be asked, the file does not fit the cache, or there is no room for it.
    """
    fs, path = open_filesystem(url)
    if isinstance(fs, LocalFileSystem):
        refuse_special(fs, path)
        yield path
        return
    if _SHA256.fullmatch(sha256) is None:
        raise VerificationError(f"the manifest records {sha256[:70]!r} for {url}, not a sha256; fetch it again")
    with Cache.of_environment().hold(url, sha256, size) as copy:
        yield copy


@contextmanager
def fresh(url: str) -> Iterator[Copy]:
    """What lies at ``url`` now, downloaded once and hashed on the way, gone after the block; never from the cache.

    Raises:
        FileNotFoundError: nothing is there.
        XtokenError: as for ``cached``.
    """
    fs, path = open_filesystem(url)
    with ExitStack() as stack:
        if isinstance(fs, LocalFileSystem):
            refuse_special(fs, path)
            yield Copy(path, *_copy(stack.enter_context(open(path, "rb")), None, None))
            return
        cache = Cache.of_environment()
        with named_errors(url):
            size = int(fs.size(path))
        file = stack.enter_context(cache.reserved(url, "fresh", size))
        assert file is not None, "nobody else makes fresh copies under our name"
        yield Copy(file.name, *cache.download(url, file, size))


@dataclass(frozen=True)
class Cache:
    """A folder and the bytes that its files may take together."""

    folder: Path
    limit: int

    @classmethod
    def of_environment(cls) -> "Cache":
        """The cache that XTOKEN_CACHE and XTOKEN_CACHE_BYTES describe.

        Raises:
            XtokenError: the size cannot be read, or the folder cannot be made.
        """
        try:
            folder = Path(plain(os.environ.get(FOLDER) or DEFAULT_FOLDER))
        except ValueError as error:
            raise XtokenError(f"{FOLDER}: {error}") from error
        try:
            limit = parse_size(os.environ.get(BYTES) or DEFAULT_BYTES)
        except ValueError as error:
            raise XtokenError(f"{BYTES}={error}") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise XtokenError(f"the cache folder {folder} cannot be made ({error}); set {FOLDER} to another") from error
        return cls(folder, limit)

    @contextmanager
    def hold(self, url: str, sha256: str, size: int | None) -> Iterator[str]:
        """``cached`` of a remote file."""
        while (file := self._open(sha256)) is None:
            self._fetch(url, sha256, size)
        with file:
            yield file.name

    def _open(self, sha256: str) -> "IO[bytes] | None":
        """The file with a shared lock on it, marked as used just now; None when it is not here."""
        try:
            file = (self.folder / sha256).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink == 0:  # evicted while we waited for the lock
            file.close()
            return None
        now = time.time_ns()  # the system's own stamp has steps of some milliseconds: no order among quick uses
        with suppress(OSError):  # a cache may be read-only
            os.utime(file.fileno(), ns=(now, now))
        return file

    def _fetch(self, url: str, sha256: str, size: int | None) -> None:
        if size is None:
            fs, path = open_filesystem(url)
            with named_errors(url):
                size = int(fs.size(path))
        with self.reserved(url, sha256, size) as file:
            if file is None:
                return
            actual, length = self.download(url, file, size)
            if actual != sha256:
                raise VerificationError(
                    f"{url} has {length} bytes with sha256 {actual}, its manifest says {size} with {sha256}; it was "
                    "damaged or changed: 'xtoken verify' lists what is, then fetch or publish it again"
                )
            os.replace(file.name, self.folder / sha256)

    @contextmanager
    def reserved(self, url: str, name: str, size: int) -> "Iterator[IO[bytes] | None]":
        """A temporary file with room for ``size`` bytes, removed after the block unless renamed.

        None when another process has downloaded the file ``name`` meanwhile.

        Raises:
            XtokenError: ``size`` is above the bound, or running readers hold all room.
        """
        if size > self.limit:
            raise XtokenError(
                f"{url} has {size} bytes, the local cache may have {self.limit}: set {BYTES} to that or more, "
                "or fetch a subset with 'xtoken share pull --parts'"
            )
        file = self._wait(url, name, size)
        if file is None:
            yield None
            return
        with file:
            try:
                yield file
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(file.name)

    def _wait(self, url: str, name: str, size: int) -> "IO[bytes] | None":
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self._locked():
                if (self.folder / name).exists():
                    return None
                in_flight = self._in_flight()
                mine = name == "fresh" or name not in in_flight
                if mine and self._make_room(size + sum(in_flight.values())):
                    return self._create(name, size)
            if in_flight:
                until = time.monotonic() + _PATIENCE_SECONDS
            if time.monotonic() > until:
                raise XtokenError(
                    f"{url} has {size} bytes, and files in use fill the local cache {self.folder} of {self.limit} "
                    f"bytes; set {BYTES} to more, or use fewer --workers"
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time counts and evicts."""
        try:
            file = (self.folder / ".lock").open("ab")
        except OSError as error:
            raise XtokenError(f"no writing in the cache {self.folder} ({error}); set {FOLDER} to another") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _create(self, name: str, size: int) -> IO[bytes]:
        file = (self.folder / f"{name}.{size}.{secrets.token_hex(6)}.tmp").open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _in_flight(self) -> dict[str, int]:
        """Bytes reserved by running downloads, by the file's name; what dead processes left is removed."""
        reserved: dict[str, int] = {}
        for path in self.folder.glob("*.tmp"):
            match = _TMP.fullmatch(path.name)
            if match and not _remove_unlocked(path):
                reserved[match[1]] = reserved.get(match[1], 0) + int(match[2])
        return reserved

    def _make_room(self, wanted: int) -> bool:
        """Evict until ``wanted`` bytes fit beside what stays; whether they do."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        taken = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if taken + wanted <= self.limit:
                break
            if _remove_unlocked(path):
                taken -= stat.st_size
        return taken + wanted <= self.limit

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.iterdir():
            if _SHA256.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def download(self, url: str, file: IO[bytes], size: int) -> tuple[str, int]:
        """sha256 and bytes of what came from ``url`` into ``file``; stops after ``size`` bytes and one.

        Raises:
            XtokenError: the server cannot be asked, or the disk of the cache is full.
        """
        fs, path = open_filesystem(url)
        try:
            # each read is one request for just its bytes
            with named_errors(url), fs.open(path, "rb", block_size=_BLOCK, cache_type="none") as source:
                copied = _copy(source, file, size + 1)
            file.flush()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise XtokenError(
                f"no room for {size} bytes in the cache {self.folder} ({error.strerror}); free some, set {FOLDER} to a "
                f"folder on a larger disk, or {BYTES} to less"
            ) from error
        return copied


def _copy(source: Any, target: "IO[bytes] | None", limit: int | None) -> tuple[str, int]:
    """sha256 and size of what was read, ``limit`` bytes at most."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK if limit is None else min(_BLOCK, limit - size)):
        digest.update(block)
        size += len(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest(), size


def _remove_unlocked(path: Path) -> bool:
    """Remove a file that nobody has locked; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
