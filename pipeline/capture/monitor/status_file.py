"""A file that says how things stand now, written over and over from a thread of its own.

Storage that hangs or refuses must neither hold up nor end the run that it speaks of: what cannot be written is
skipped, and the next one says more anyway.
"""

import contextlib
import threading

from xtoken.pipeline.store.files import Folder
from xtoken.schemas.errors import XtokenError

_PATIENCE = 10.0  # seconds that the end of a run waits for storage


class StatusFile:
    """One file of a folder."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether the one before is still on its way."""
        return self._thread is not None and self._thread.is_alive()

    def post(self, data: bytes) -> None:
        """Write, unless the one before is still on its way; does not wait."""
        if not self.busy:
            self._thread = threading.Thread(target=self._write, args=(data,), name="xtoken-status", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait for the one on its way, but not for ever."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def last(self, data: bytes) -> None:
        """Write, and wait for it a while."""
        self.wait()
        self.post(data)
        self.wait()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(XtokenError, OSError):
            self._folder.replace(self._name, data)
