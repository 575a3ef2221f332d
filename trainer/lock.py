"""One trainer per folder: a lock (flock) on a file in it, which ends with the process that holds it, however that ends.

Linux passes such a lock on to the server of a shared disk (NFS, Lustre with ``-o flock``, GPFS, CephFS), so it is seen
on other machines, too.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from xtoken.schemas.errors import XtokenError

LOCK = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def only_trainer(root: Path) -> Iterator[str | None]:
    """Hold the folder ``root``, which is made if need be.

    Yields:
        None, or why nothing keeps others out: file systems without locks exist.

    Raises:
        XtokenError: another process holds it, or it cannot be made.
    """
    with _opened(root) as file:
        note = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise XtokenError(_refusal(root, file)) from error
            if error.errno not in _NO_LOCKS:
                raise
            note = (
                f"the disk of {root} has no locks ({error.strerror}): nothing keeps a second trainer out of this folder"
            )
        _sign(file)
        try:
            yield note
        finally:
            file.truncate(0)


def refuse_held(root: Path) -> None:
    """Raise XtokenError where another process holds ``root``; nothing is written there, as it may be no run at all."""
    with suppress(OSError), open(root / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise XtokenError(_refusal(root, file)) from error


def _opened(root: Path) -> IO[str]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return open(root / LOCK, "a+")
    except OSError as error:
        raise XtokenError(f"--out {root} cannot be written to ({error.strerror}); use another folder") from error


def _sign(file: IO[str]) -> None:
    """Say who holds the lock. The file stays when it is let go: who deletes it may delete another's."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()


def _refusal(root: Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has not signed yet
        who = "another process"
    return (
        f"{root} is being trained in by {who}; wait for it or end it, then run the same command again, or use another "
        "--out"
    )
