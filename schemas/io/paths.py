"""Paths and URLs as a user gives them: made plain in one place, and outputs tried before any work.

``plain`` is applied to every field of every configuration that is marked as a place (``schemas.configs.base``), so what
later code gets is a path without ``~`` and ``file://``, or the URL of another filesystem.
"""

import os
import re
import stat
import tempfile
from typing import Literal

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.own_files import refuse_no_page, refuse_own_file

Kind = Literal["folder", "file", "page", "log"]
_LOCAL = re.compile(r"(?:file|local):(?://(?:localhost(?=/))?)?")
_NO_HOST = re.compile(r"[a-z][a-z0-9+.-]+://(?:/|$)")
_ONE_SLASH = re.compile(r"([a-z][a-z0-9+.-]+):/[^/]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Filesystems of fsspec that read through another one, which follows behind "::".
_CHAINING = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached")


def plain(value: str) -> str:
    """A path or URL without ``~`` and ``file://``; ids of models stay what they are.

    Raises:
        ValueError: it is empty, or cannot be what was meant.
    """
    if not value.strip():
        raise ValueError("an empty path; is a variable unset? name a file, folder or URL")
    if _CONTROL.search(value):
        raise ValueError(f"{value!r} holds a control character; rename it, or quote the command's words")
    local = _LOCAL.match(value)
    if local:
        return plain(value[local.end() :])
    if is_chain(value):
        return value
    if _NO_HOST.match(value) and not value.startswith("memory:"):
        raise ValueError(f"{value!r} names no bucket or host; is a variable unset?")
    if slipped := _ONE_SLASH.match(value):
        raise ValueError(f"{value!r} is not a URL; write {slipped[1]}://..., or ./{value} for a local name")
    if value.startswith("~"):
        return _at_home(value)
    # pathlib drops the ./ of ./~x, and what comes later would look for a home folder
    return os.path.abspath(value) if os.path.normpath(value).startswith("~") else value


def is_chain(url: str) -> bool:
    """Whether fsspec reads this through another filesystem, as zip://a.jsonl::b.zip; elsewhere ``::`` is of a name."""
    first, chained, _ = url.partition("::")
    return bool(chained) and first.partition("://")[0] in _CHAINING


def _at_home(value: str) -> str:
    """``~/x`` and ``~user/x`` in the home folder."""
    own = value.partition("/")[0] == "~"
    expanded = os.path.expanduser(value)
    if not os.path.isabs(expanded) or (own and not os.environ.get("HOME", "set").strip()):
        raise ValueError(f"{value!r}: no such home folder is known here; write the whole path, or ./{value}")
    return expanded


def refuse_lost_folder() -> None:
    """Raise XtokenError when the working folder was removed: a relative path means nothing then."""
    try:
        os.getcwd()
    except OSError as error:
        raise XtokenError(f"the working folder is gone ({error.strerror}); change to another") from error


def refuse_unusable(value: str, kind: Kind) -> None:
    """Raise XtokenError when a local output can be told to be unusable; nothing stays behind.

    Args:
        value: path or URL; only paths are looked at.
        kind: what is written: a folder, a file, a page, or a log, which may be a device.
    """
    if "://" in value or is_chain(value):
        if is_chain(value):
            raise XtokenError(f"{value} is read through another filesystem and cannot be written; name a folder")
        return
    if os.path.isabs(value) and not os.path.normpath(value).strip(os.sep):
        raise XtokenError(f"{value} is the root of the filesystem; name a folder in it")
    try:
        _try(os.path.abspath(value), kind)
        if kind != "folder":
            refuse_own_file(value, log=kind == "log")
    except OSError as error:
        raise XtokenError(f"{value} cannot be made ({error.strerror}); name another {kind}") from error


def _try(path: str, kind: Kind) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise XtokenError(f"{path} is a link to nothing; name another {kind}") from None
        _try_above(path)
        return
    if stat.S_ISDIR(mode) != (kind == "folder"):
        there = "a folder" if stat.S_ISDIR(mode) else "a file"
        raise XtokenError(f"{path} is {there}, and a {kind} is to be written; name another {kind}")
    if kind in ("file", "page") and not stat.S_ISREG(mode):
        raise XtokenError(f"{path} is not a plain file; name another {kind}")
    if kind == "page":
        refuse_no_page(path)


def _try_above(path: str) -> None:
    """Make a folder in the nearest one that exists, and remove it."""
    while not os.path.lexists(path := os.path.dirname(path)):
        pass
    # what permissions say is not what root or a read-only mount does
    os.rmdir(tempfile.mkdtemp(prefix=".xtoken-", dir=path))
