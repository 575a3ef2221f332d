"""Text taken evenly from a corpus in one pass, whatever its size, and what can be said from a part of something."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from xtoken.pipeline.capture.rendered_chat import Look
from xtoken.pipeline.corpus import Corpus, Document, Listing
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.ui.progress import Progress

# Text of one piece in bytes (some 8,000 tokens), and of all pieces together at least.
PIECE, POOL = 1 << 15, 1 << 21
# Student's t of a 95 % interval for 1, 2, ... degrees of freedom; beyond, the last.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Pool:
    """What one pass over a corpus leaves.

    Attributes:
        documents, text_bytes: of the whole corpus.
        sizes: bytes of text of each part that a capture with this ``shard_bytes`` has.
        listing: the files.
        pieces: documents, or pieces of long ones; all of the corpus if ``whole``.
    """

    documents: int
    text_bytes: int
    sizes: list[int]
    listing: Listing
    pieces: list[Document]
    whole: bool

    @property
    def files(self) -> list[tuple[str, int]]:
        """Names and sizes, in order."""
        return [(file.name, file.size) for file in self.listing.files]

    @property
    def shards(self) -> int:
        """How many parts that makes."""
        return len(self.sizes)


class _Picker:
    """Keeps every document while they are few, and one piece at every ``stride`` bytes of text, few enough to hold."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.text_bytes = 0
        self.all: list[Document] | None = []
        self._stride = PIECE
        self._held: list[Document] = []

    @property
    def pieces(self) -> list[Document]:
        """The corpus, or pieces from all over it."""
        return self._held if self.all is None else self.all

    def add(self, document: Document, text_bytes: int) -> None:
        """Take the next document of the corpus; ``text_bytes`` is its length."""
        begin = self.text_bytes
        self.text_bytes += text_bytes
        if self.all is not None:
            self.all.append(document)
            self.all = self.all if self.text_bytes <= self.size else None
        at = -(-begin // self._stride) * self._stride
        while at < self.text_bytes:
            self._held.append(_piece(document, (at - begin) / text_bytes, text_bytes))
            at += self._stride
            if len(self._held) > 2 * self.size // PIECE:
                self._held, self._stride = self._held[::2], 2 * self._stride
                at = -(-at // self._stride) * self._stride


def _piece(document: Document, place: float, text_bytes: int) -> Document:
    """The document, or what fits a piece of it from a place on (0 to 1), beginning before whitespace if it can.

    Conversations stay whole.
    """
    if text_bytes <= PIECE or document.contents is not None:
        return document
    text = document.text
    size = max(1, len(text) * PIECE // text_bytes)
    start = min(int(place * len(text)), len(text) - size)
    space = text.find(" ", start, start + size // 2)
    start = start if space < 0 or start == 0 else space
    return Document(f"{document.id}@{start}", text[start : start + size], document.file, document.record)


def take_pool(config: CorpusConfig, shard_bytes: int, size: int, progress: Progress, look: Look | None = None) -> Pool:
    """Read a corpus once.

    Args:
        config: the corpus.
        shard_bytes: text of a part, as for the plan of a capture.
        size: bytes of text up to which the whole corpus is kept; of a larger one, that much to twice as much.
        progress: shows the bytes of text read.
        look: shown every document.

    Raises:
        XtokenError: the corpus is missing, empty, has a bad document under ``--on-bad stop``, or looks rendered.
    """
    corpus = Corpus(config)
    picker, documents, sizes, full = _Picker(size), 0, list[int](), True
    progress.start(corpus.listing.label("read"), None, "bytes")
    for document in corpus.documents() if look is None else look.over(corpus.documents()):
        text_bytes = document.text_bytes
        picker.add(document, text_bytes)
        documents += 1
        if full:
            sizes.append(0)
        sizes[-1] += text_bytes
        full = sizes[-1] >= shard_bytes
        progress.advance(text_bytes, documents=documents)
    progress.finish()
    if not documents:
        raise corpus.nothing_usable()
    return Pool(documents, picker.text_bytes, sizes, corpus.listing, picker.pieces, picker.all is not None)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items (at least one, at most all), evenly spaced."""
    count = min(max(count, 1), len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


@dataclass(frozen=True)
class Ratio:
    """A ratio found in a part; ``error`` is half of its 95 % interval, relative, NaN where only one unit was seen."""

    value: float
    error: float


def ratio(tops: Sequence[float], bottoms: Sequence[float], seen: float) -> Ratio:
    """Sum over sum, of units of which the share ``seen`` of all was looked at.

    The error is that of the linearised ratio, times Student's t; it vanishes where everything was seen.
    """
    top_N, bottom_N = np.asarray(tops, float), np.asarray(bottoms, float)
    value = float(top_N.sum() / bottom_N.sum())
    unseen = max(0.0, 1.0 - seen)
    if unseen == 0.0 or value == 0.0:
        return Ratio(value, 0.0)
    if len(top_N) < 2:
        return Ratio(value, math.nan)
    spread = float(((top_N - value * bottom_N) ** 2).sum()) * len(top_N) / (len(top_N) - 1) * unseen
    student_t = _T95[min(len(top_N) - 1, len(_T95)) - 1]
    return Ratio(value, student_t * math.sqrt(spread) / float(top_N.sum()))
