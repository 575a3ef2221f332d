"""How a part appears: temporary name, read back, published, then recorded. Done means the record exists.

Killing a writer at any moment leaves at most a temporary file, or a published file without a
record; both are harmless. Two writers of the same part both succeed, and one record remains.
"""

import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pydantic import ValidationError

from xtoken.pipeline.store.files import SWEEPS, Folder, disk_full_named
from xtoken.schemas.errors import Unreachable, VerificationError, XtokenError
from xtoken.schemas.io.remote import in_parallel, named_errors, patiently
from xtoken.schemas.manifest import Part, part_name

DATA = "data"
COMMITS = "commits"
AUDITS = "audits"
_COMMIT_NAME = re.compile(r"part-(\d{5,})\.json")
_TMP_NAME = re.compile(r".+\.[^.]+\.tmp")
_PART_TMP = re.compile(r"part-(\d{5,})\.")
_PLACE_TRIES = 3
R = TypeVar("R")


@dataclass(frozen=True)
class Figures:
    """What a part holds, counted from the file itself."""

    samples: int
    tokens: int
    rows: int
    entries: int
    text_bytes: int


class Made(NamedTuple):
    """How a part of a capture was made where that is not how the first was; fields as in ``Part``."""

    device: str | None = None
    capture_path: str | None = None


_AS_THE_FIRST = Made()
Write = Callable[[str], dict[str, int]]
Check = Callable[[str], Figures]


def commit_name(index: int) -> str:
    """Name of a commit record below the root."""
    return f"{COMMITS}/part-{index:05d}.json"


def data_name(index: int) -> str:
    """Name of a published part below the root."""
    return f"{DATA}/{part_name(index)}"


def publish_part(
    root: str, index: int, write: Write, check: Check, *, attempt: str | None = None, made: Made = _AS_THE_FIRST
) -> Part:
    """Write, verify, publish and commit one part; the first commit wins.

    Args:
        root: folder or fsspec URL of the artifact.
        index: number of the part.
        write: writes the whole file under the path or URL it is given; returns counts for ``Part.counts``
            (they must follow from the shard's input alone: they also describe a twin's file).
        check: reads a file back and counts it; raises XtokenError when it is not right.
        attempt: name of this attempt in the temporary file name; random when left out.
        made: for the fields of ``Part`` of these names.

    Returns:
        The committed record: ours, or that of whoever was first.

    Raises:
        DiskFull: no room; the temporary file is removed.
        XtokenError: ``check`` refused the file just written, or temporary files are removed again and again.
        Unreachable: storage does not answer, and did not for minutes in which every step was tried again.
    """
    folder = Folder(root)
    existing = _reached(root, partial(read_commit, folder, index))
    if existing is not None:
        return existing
    tmp = f"{DATA}/part-{index:05d}.{attempt or secrets.token_hex(6)}.tmp"
    try:
        with disk_full_named(root):
            _reached(root, partial(folder.make, DATA, COMMITS))
            for _ in range(SWEEPS):
                counts = _reached(root, partial(write, folder.url(tmp)))
                try:
                    folder.sync(tmp)
                    part = _reached(root, partial(_describe, folder, index, tmp, check, counts, made))
                    placed = _reached(root, partial(_place, folder, tmp, part, check))
                except (FileNotFoundError, XtokenError):
                    if folder.exists(tmp):
                        raise
                    continue  # another run's sweep took its writer for dead
                return _reached(root, partial(commit, folder, placed))
            raise XtokenError(f"{folder.url(tmp)} cannot be written: something removes files from {root}; stop it")
    finally:
        with suppress(Unreachable):  # clean() finds it; what is committed has not failed
            folder.remove(tmp)


def _reached(root: str, step: Callable[[], R]) -> R:
    """A step of publishing, again while storage is out of reach: what the teacher computed is not thrown away."""
    return patiently(partial(_once, root, step))


def _once(root: str, step: Callable[[], R]) -> R:
    with named_errors(root):
        return step()


def _describe(folder: Folder, index: int, name: str, check: Check, counts: dict[str, int], made: Made) -> Part:
    figures = check(folder.url(name))
    sha256, size = folder.sha256(name)
    return Part(index=index, **asdict(figures), file_bytes=size, sha256=sha256, counts=counts, **made._asdict())


def _place(folder: Folder, tmp: str, part: Part, check: Check) -> Part:
    """Publish ``tmp``; a good file that is there already (its writer died, or is a twin) is adopted instead."""
    final = data_name(part.index)
    for _ in range(_PLACE_TRIES):
        if folder.place(tmp, final):
            return part
        if (existing := read_commit(folder, part.index)) is not None:
            return existing
        try:
            return _describe(folder, part.index, final, check, part.counts, Made(part.device, part.capture_path))
        except Unreachable:
            raise  # nothing is known about the file
        except (XtokenError, pa.ArrowException, OSError, ValueError):
            folder.rename(final, f"{final}.{secrets.token_hex(6)}.bad")
    raise VerificationError(
        f"{folder.url(final)} was bad {_PLACE_TRIES} times in a row; something else writes to {folder.root}: stop it"
    )


def commit(folder: Folder, part: Part) -> Part:
    """Record a published part if it has no record yet; returns the record that stands."""
    record = part.model_dump_json(indent=1).encode() + b"\n"
    if folder.create(commit_name(part.index), record):
        return part
    existing = read_commit(folder, part.index)
    assert existing is not None, "a record that exists was removed by nobody of ours"
    return existing


def read_commit(folder: Folder, index: int) -> Part | None:
    """The commit record of a part, or None.

    Raises:
        VerificationError: the record is not one of ours or speaks of another part.
    """
    name = commit_name(index)
    try:
        data = folder.read(name)
    except FileNotFoundError:
        return None
    try:
        part = Part.model_validate_json(data)
    except ValidationError as error:
        raise VerificationError(
            f"{folder.url(name)} is not a commit record ({error.error_count()} errors); "
            "remove it and run the same command again"
        ) from error
    if part.index != index:
        raise VerificationError(f"{folder.url(name)} speaks of part {part.index}; remove it and run the command again")
    return part


def committed(root: str) -> dict[int, Part]:
    """All commit records below ``root``, by part number."""
    folder = Folder(root)
    indices = sorted(int(match[1]) for name in folder.names(COMMITS) if (match := _COMMIT_NAME.fullmatch(name)))
    parts = in_parallel(partial(read_commit, folder), indices, root)
    return {part.index: part for part in parts if part is not None}


def clean(root: str, parts: Callable[[int], bool] | None = None) -> list[str]:
    """Remove temporary files, whose writers must be dead; returns their names.

    Args:
        root: folder or fsspec URL of the artifact.
        parts: only files of these parts; left out: all temporary files.
    """
    folder = Folder(root)
    removed = []
    for subfolder in (DATA, COMMITS, AUDITS) if parts else ("", DATA, COMMITS, AUDITS):
        for name in folder.names(subfolder):
            part = _PART_TMP.match(name)
            if _TMP_NAME.fullmatch(name) and (parts is None or (part is not None and parts(int(part[1])))):
                removed.append(f"{subfolder}/{name}".lstrip("/"))
                folder.remove(removed[-1])
    return removed
