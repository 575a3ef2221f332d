"""Cut a document into windows that a teacher can read in one go.

Shapes: T tokens of one text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.corpus.corpus import Document
from xtoken.pipeline.tokens import Encoded, TextTokenizer
from xtoken.schemas.errors import XtokenError

# Characters tokenized at a time to find out where windows may end: bounds memory on long documents.
_SLAB = 1 << 17
# Characters of whole documents tokenized in one call: bounds memory, enough for the tokenizer's threads.
_BATCH = 1 << 18


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a document.

    Attributes:
        sample_id: ``{document id}#{window number}``.
        encoded: its tokens, at most ``max_tokens`` of them, EOS included.
        complete: it is the last window of its document.
    """

    sample_id: str
    encoded: Encoded
    complete: bool

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 [T]."""
        return self.encoded.ids

    @property
    def size(self) -> int:
        """Bytes of its text."""
        ends = self.encoded.ends
        return int(ends[-1]) if len(ends) else 0


def windows(document: Document, tokenizer: TextTokenizer, max_tokens: int) -> Iterator[Window]:
    """Windows of at most ``max_tokens`` tokens; their texts joined are the document.

    Windows end before whitespace; a run without any that is longer than a window is cut between
    characters. Every window has the tokens of its text by itself. The document is the one that the tokenizer sees:
    normalised, where the tokenizer normalises.

    Args:
        document: from ``Corpus.documents``.
        tokenizer: the teacher's.
        max_tokens: at least 8, so that one character always fits.

    Raises:
        XtokenError: the tokenizer's tokens do not rejoin the document (with the document's id).
    """
    try:
        text = tokenizer.normalise(document.text)
        start, whole = _start(text, max_tokens)
        yield from _windows(document, text, tokenizer.encode(start, complete=whole), tokenizer, max_tokens)
    except XtokenError as error:
        raise XtokenError(f"document {document.id!r}: {error}") from error


def all_windows(documents: Iterable[Document], tokenizer: TextTokenizer, max_tokens: int) -> list[Window]:
    """``windows`` of every document, one after the other, tokenized many documents at a time.

    Raises:
        XtokenError: as ``windows``, for the first document that does not rejoin.
    """
    every: list[Window] = []
    for batch in _batches(documents):
        try:
            every += list(_batch_windows(batch, tokenizer, max_tokens))
        except XtokenError:
            # which document it was only one at a time tells
            every += [window for document in batch for window in windows(document, tokenizer, max_tokens)]
    return every


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches that end with the document that fills ``_BATCH`` characters."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _batch_windows(documents: Sequence[Document], tokenizer: TextTokenizer, max_tokens: int) -> Iterator[Window]:
    texts = [tokenizer.normalise(document.text) for document in documents]
    starts = [_start(text, max_tokens) for text in texts]
    encoded = tokenizer.encode_batch([start for start, _ in starts], [whole for _, whole in starts])
    for document, text, start in zip(documents, texts, encoded, strict=True):
        yield from _windows(document, text, start, tokenizer, max_tokens)


def _start(text: str, max_tokens: int) -> tuple[str, bool]:
    """The first slab of a text, and whether it is all of it."""
    size = _slab_size(max_tokens)
    return text[:size], len(text) <= size


def _slab_size(max_tokens: int) -> int:
    return max(_SLAB, 16 * max_tokens)


def _windows(
    document: Document, text: str, start: Encoded, tokenizer: TextTokenizer, max_tokens: int
) -> Iterator[Window]:
    """Windows of a document whose normalised text and tokenized first slab are known."""
    assert max_tokens >= 8
    for number, (encoded, complete) in enumerate(_pieces(text, start, tokenizer, max_tokens)):
        yield Window(f"{document.id}#{number}", encoded, complete)


@dataclass(frozen=True, eq=False)
class _Slab:
    """A stretch of a text, tokenized.

    Attributes:
        text: characters from ``start`` of the whole text on.
        char_ends: where its tokens end (``_char_ends``).
        cuts: its tokens are exact and serve for pieces, too (``TextTokenizer.cuts_at_spaces``).
    """

    text: str
    start: int
    encoded: Encoded
    char_ends: NDArray[np.int64]
    cuts: bool

    @classmethod
    def of(cls, text: str, start: int, encoded: Encoded, tokenizer: TextTokenizer) -> "_Slab":
        """Characters from ``start`` on that were tokenized as ``encoded``."""
        exact = not encoded.snapped and encoded.text == text
        return cls(text, start, encoded, _char_ends(encoded), exact and tokenizer.cuts_at_spaces)

    def guess(self, done: int, max_tokens: int) -> int:
        """Where ``max_tokens`` tokens from character ``done`` on end, were they tokenized as they are in the slab."""
        last = int(np.searchsorted(self.char_ends, done, side="right")) + max_tokens - 1
        return len(self.text) if last >= len(self.char_ends) else max(int(self.char_ends[last]), done + 1)

    def piece(self, start: int, end: int) -> Encoded | None:
        """What characters ``start:end`` are tokenized to by themselves, where the slab's tokens tell."""
        if not (self.cuts and self._is_cut(start) and self._is_cut(end)):
            return None
        first, last = self._tokens_before(start), self._tokens_before(end)
        if first is None or last is None:
            return None
        ends = self.encoded.ends[first:last] - (self.encoded.ends[first - 1] if first else 0)
        return Encoded(self.text[start:end], self.encoded.ids[first:last].copy(), ends, snapped=False)

    def _tokens_before(self, cut: int) -> int | None:
        """Tokens that end at or before a cut, if one ends there."""
        # a character is several tokens, perhaps, and those but the last end before character 1
        count = int(np.searchsorted(self.char_ends, cut, side="right")) if cut else 0
        return count if cut == 0 or (count and self.char_ends[count - 1] == cut) else None

    def _is_cut(self, at: int) -> bool:
        return at == 0 or (at < len(self.text) and self.text[at] == " " and not self.text[at - 1].isspace())


def _pieces(text: str, first: Encoded, tokenizer: TextTokenizer, max_tokens: int) -> Iterator[tuple[Encoded, bool]]:
    slab_size = _slab_size(max_tokens)
    if 0 < len(text) <= slab_size and len(first.ids) <= max_tokens:
        yield first, True
        return
    start = 0
    while start < len(text):
        part = text[start : start + slab_size]
        # An EOS at the end of the first one moves no guess: it ends where the slab does.
        encoded = tokenizer.encode(part, complete=False) if start else first
        slab = _Slab.of(part, start, encoded, tokenizer)
        last = start + slab_size >= len(text)
        done = 0
        while done < len(part):
            guess = slab.guess(done, max_tokens)
            # Unless nothing follows, the end of a slab is no place to cut: begin the next slab here.
            if guess == len(part) and done > 0 and not last:
                break
            piece, size = _fit(text, slab, done, guess - done, tokenizer, max_tokens)
            done += size
            yield piece, start + done == len(text)
        start += done


def _fit(
    text: str, slab: _Slab, done: int, size: int, tokenizer: TextTokenizer, max_tokens: int
) -> tuple[Encoded, int]:
    """The longest piece from ``done`` in the slab of at most ``size`` characters, cut at whitespace, that fits."""
    start = slab.start + done
    while True:
        size = _cut(text, start, start + size) - start
        encoded = slab.piece(done, done + size)
        if encoded is None:
            encoded = tokenizer.encode(text[start : start + size], complete=start + size == len(text))
        if len(encoded.ids) <= max_tokens:
            return encoded, size
        assert size > 1, f"one character takes {len(encoded.ids)} tokens"
        size = min(max(int(_char_ends(encoded)[max_tokens - 1]), 1), size - 1)


def _cut(text: str, start: int, end: int) -> int:
    """``end``, moved back to where a run of whitespace begins; ``end`` itself where there is none."""
    if end == len(text):
        return end
    at = end
    while at > start and not text[at].isspace():
        at -= 1
    begin = at
    while begin > start and text[begin - 1].isspace():
        begin -= 1
    # A window of nothing but whitespace, or of a word longer than it, ends where it must.
    return begin if begin > start else end


def _char_ends(encoded: Encoded) -> NDArray[np.int64]:
    """int64 [T]: whole characters of the text before each token's end."""
    data = np.frombuffer(encoded.text.encode(), dtype=np.uint8)
    begins = (data & 0xC0) != 0x80
    # Characters begun before a byte, less the one that the byte continues.
    begun = np.concatenate([[0], np.cumsum(begins)])
    inside = np.append(~begins, False)
    ends: NDArray[np.int64] = (begun - inside)[encoded.ends]
    return ends
