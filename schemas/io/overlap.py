"""Where what is written lies, beside what is read."""

import os
import posixpath

from fsspec.implementations.local import LocalFileSystem

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import open_filesystem


def refuse_inside(what: str, path: str, folder: str, why: str = "all files there are read as the corpus") -> None:
    """Refuse to write where a corpus is read: the next run would take what was written for documents.

    Args:
        what: the flag that names ``path``.
        path: file or folder.
        folder: where it must not be.
        why: it must not.

    Raises:
        XtokenError: it is the folder, or lies inside, by whatever path, link or URL it is named.
    """
    if _is_inside(path, folder):
        raise XtokenError(f"{what} {path} lies inside {folder}, but {why}; choose a place outside of it")


def _is_inside(path: str, folder: str) -> bool:
    (kind, inner), (other, outer) = _place(path), _place(folder)
    return kind == other and (inner == outer or inner.startswith(outer.rstrip("/") + "/"))


def _place(url: str) -> tuple[str, str]:
    """Kind of filesystem and normal path, links resolved where it is local."""
    fs, path = open_filesystem(url)
    local = isinstance(fs, LocalFileSystem)
    return type(fs).__name__, os.path.realpath(path) if local else posixpath.normpath(path)
