"""A run's log: one JSON object per line and event, for machines that read after the fact."""

import json
import os
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.capture import RunGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.status import suffixed


def utc_now() -> datetime:
    """The time in UTC, to the millisecond."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def log_path(run: RunGroup, folder: Folder) -> Path | None:
    """Where a run's log is; None where there is none."""
    if run.log is not None:
        return Path(run.log)
    return Path(folder.at(suffixed("log", "jsonl", run.cell))) if folder.local else None


class RunLog:
    """Lines appended to one file. A line that a kill tore stays alone: readers pass it over.

    Attributes:
        lost: lines that could not be written. They are counted, for a run is worth more than its log.
    """

    def __init__(self, path: Path | None) -> None:
        self.lost = 0
        self._torn = False
        self._file = _open(path) if path is not None else None

    def write(self, event: str, **facts: Any) -> None:
        """Append one line; facts that say nothing (None, empty) are left out."""
        if self._file is None:
            return
        said = {name: value for name, value in facts.items() if value not in (None, "", {}, [])}
        line = json.dumps({"time": _iso(utc_now()), "event": event, **said}, ensure_ascii=False) + "\n"
        data = b"\n" * self._torn + line.encode(errors="replace")
        try:
            written = self._file.write(data)
        except OSError:
            written = 0
        self.lost += written != len(data)
        self._torn = 0 < written < len(data) or (self._torn and not written)

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _open(path: Path) -> FileIO:
    """The file, opened so that several writers' lines do not mix, its last line ended."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        file = FileIO(handle, "r+")
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(handle, 1, size - 1) != b"\n":
            file.write(b"\n")
    except OSError as error:
        raise XtokenError(f"the log {path} cannot be written ({error.strerror}); name another file by --log") from error
    return file
