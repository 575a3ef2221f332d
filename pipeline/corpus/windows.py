"""Cut a document into windows that a teacher can read in one go.

Shapes: T tokens of one text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.corpus import Document
from pipeline.tokens import Encoded, TextTokenizer
from schemas.errors import XtokenError

# Characters tokenized at a time to find out where windows may end: bounds memory on long documents.
_SLAB = 1 << 17


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


def windows(document: Document, tokenizer: TextTokenizer, max_tokens: int) -> Iterator[Window]:
    """Windows of at most ``max_tokens`` tokens; their texts joined are the document.

    Windows end before whitespace; a run without any that is longer than a window is cut between
    characters. Every window is tokenized by itself. The document is the one that the tokenizer sees:
    normalised, where the tokenizer normalises.

    Args:
        document: from ``Corpus.documents``.
        tokenizer: the teacher's.
        max_tokens: at least 8, so that one character always fits.

    Raises:
        XtokenError: the tokenizer's tokens do not rejoin the document (with the document's id).
    """
    assert max_tokens >= 8
    try:
        for number, (encoded, complete) in enumerate(_pieces(document.text, tokenizer, max_tokens)):
            yield Window(f"{document.id}#{number}", encoded, complete)
    except XtokenError as error:
        raise XtokenError(f"document {document.id!r}: {error}") from error


def _pieces(raw: str, tokenizer: TextTokenizer, max_tokens: int) -> Iterator[tuple[Encoded, bool]]:
    text = tokenizer.normalise(raw)
    slab_size = max(_SLAB, 16 * max_tokens)
    start = 0
    while start < len(text):
        slab = text[start : start + slab_size]
        char_ends = _char_ends(tokenizer.encode(slab, complete=False))
        last = start + slab_size >= len(text)
        done = 0
        while done < len(slab):
            guess = _guess(char_ends, done, max_tokens, len(slab))
            # Unless nothing follows, the end of a slab is no place to cut: begin the next slab here.
            if guess == len(slab) and done > 0 and not last:
                break
            piece, size = _fit(text, start + done, guess - done, tokenizer, max_tokens)
            done += size
            yield piece, start + done == len(text)
        start += done


def _guess(char_ends: NDArray[np.int64], done: int, max_tokens: int, size: int) -> int:
    """Where ``max_tokens`` tokens from character ``done`` on end, were they tokenized as they are in the slab."""
    last = int(np.searchsorted(char_ends, done, side="right")) + max_tokens - 1
    return size if last >= len(char_ends) else max(int(char_ends[last]), done + 1)


def _fit(text: str, start: int, size: int, tokenizer: TextTokenizer, max_tokens: int) -> tuple[Encoded, int]:
    """The longest piece from ``start`` of at most ``size`` characters, cut at whitespace, that fits."""
    while True:
        size = _cut(text, start, start + size) - start
        piece = text[start : start + size]
        encoded = tokenizer.encode(piece, complete=start + size == len(text))
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
