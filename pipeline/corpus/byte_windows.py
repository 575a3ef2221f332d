"""Documents cut into short windows of bytes, for models of several tokenizers, which share no tokens to cut at."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xtoken.pipeline.corpus.corpus import Document


@dataclass(frozen=True)
class ByteWindow:
    """Whole characters of one document.

    Attributes:
        id: the document's id, and from which byte on.
        complete: the document ends with it.
    """

    id: str
    data: bytes
    complete: bool


def byte_windows(documents: Iterable[Document], size: int, most: int) -> Iterator[ByteWindow]:
    """Windows of at most ``size`` bytes, ``most`` together; cut before a space where the second half has one."""
    for document in documents:
        data, start = document.text.encode(), 0
        while start < len(data):
            stop = _stop(data, start, start + min(size, most))
            if stop == start:  # not even one character is left to measure
                return
            yield ByteWindow(f"{document.id}@{start}", data[start:stop], stop == len(data))
            most -= stop - start
            start = stop


def _stop(data: bytes, start: int, limit: int) -> int:
    """Where a window from ``start`` on ends: not beyond ``limit``, and not within a character."""
    if limit >= len(data):
        return len(data)
    space = data.rfind(b" ", (start + limit) // 2, limit + 1)
    if space > start:
        return space
    while limit > start and data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit
