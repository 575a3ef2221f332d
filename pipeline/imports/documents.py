"""Token ids of a document back to its text, and where one row of a file holds several documents.

Shapes: N ids of a row of a file, T tokens of a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.tokens import TextTokenizer, TokenTable

_LONGEST_CHARACTER = 4  # bytes of UTF-8


@dataclass(frozen=True)
class Spelling:
    """What ids of one tokenizer spell."""

    tokenizer: TextTokenizer

    @property
    def table(self) -> TokenTable:
        """Its tokens."""
        return self.tokenizer.table

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """bool [U]: ids that are tokens, of text or control."""
        return np.array([role != "hole" for role in self.table.role], np.bool_)

    @cached_property
    def control(self) -> NDArray[np.bool_]:
        """bool [U]: ids that are tokens without bytes."""
        return np.array([role is not None for role in self.table.role], np.bool_)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a document or an answer."""
        return frozenset(at for at, role in enumerate(self.table.role) if role in ("eos", "eot"))

    @cached_property
    def _blank(self) -> bool:
        """Whether the tokenizer puts a blank in front of a text."""
        first = self.tokenizer.encode("a", complete=False).ids[0]
        return self.table.token(int(first))[:1] == b" "

    def known(self, ids: NDArray[np.int64]) -> bool:
        """Whether all ids are tokens."""
        return bool(((ids >= 0) & (ids < self.table.size)).all() and self.valid[ids].all())

    def text(self, ids_T: NDArray[np.int32]) -> tuple[str, NDArray[np.int32]] | None:
        """What tokens spell, and int32 [T], the byte at which each ends; None where that is not UTF-8."""
        pieces = [self.table.token(token) for token in ids_T.tolist()]
        width_T = np.array([len(piece) for piece in pieces], np.int64)
        data = b"".join(pieces)
        if self._blank and data[:1] == b" ":
            data = data[1:]
            width_T[np.flatnonzero(width_T)[0]] -= 1
        try:
            return data.decode(), np.cumsum(width_T).astype(np.int32)
        except UnicodeDecodeError:
            return None

    def whole_characters(self, ids_T: NDArray[np.int32]) -> int:
        """How many of a document's tokens spell whole characters: the last of a cut one may be torn."""
        for stop in range(len(ids_T), max(0, len(ids_T) - _LONGEST_CHARACTER), -1):
            data = b"".join(
                self.table.token(token) for token in ids_T[max(0, stop - _LONGEST_CHARACTER) : stop].tolist()
            )
            if _ends_whole(data):
                return stop
        return len(ids_T)


def _ends_whole(data: bytes) -> bool:
    """Whether bytes do not end within a character of UTF-8."""
    for back in range(1, min(_LONGEST_CHARACTER, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            size = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
            return back >= size
    return True


@dataclass(frozen=True)
class Border:
    """A document in a row of a file: its ids ``start`` to ``stop``."""

    start: int
    stop: int


def by_mask(mask_N: NDArray[np.int64]) -> Iterator[Border]:
    """Documents that a mask numbers 1, 2, 3 ...; 0 is padding."""
    cuts = np.flatnonzero(np.diff(mask_N)) + 1
    edges = [0, *cuts.tolist(), len(mask_N)]
    for start, stop in pairwise(edges):
        if stop > start and mask_N[start]:
            yield Border(start, stop)


def by_token(ids_N: NDArray[np.int64], token: int, *, opens: bool) -> Iterator[Border]:
    """Documents that a token opens (BOS; several in a row open one) or closes (eos)."""
    hit = ids_N == token
    if opens:
        cuts = np.flatnonzero(hit & ~np.append(False, hit[:-1]))
        edges = sorted({0, *cuts.tolist(), len(ids_N)})
    else:
        edges = sorted({0, *(np.flatnonzero(hit & ~np.append(hit[1:], False)) + 1).tolist(), len(ids_N)})
    for start, stop in pairwise(edges):
        if stop > start:
            yield Border(start, stop)
