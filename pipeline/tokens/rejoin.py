"""Do the tokens rejoin the text, and if not, which of their ends can still be trusted?

A tokenizer that normalises, or that has no tokens for some bytes, sees other bytes than the text has.
The text is cut into blocks that normalise independently of each other (checked, not assumed); within
an unchanged block every byte maps to itself, within a changed one only the block's end is known.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Flatten = Callable[[str], bytes]
METASPACE = "\u2581"
_WORDS = re.compile(r"\s+|\S+")


@dataclass(frozen=True)
class Block:
    """A stretch of the text: what the tokenizer sees of it and what it is, in UTF-8 bytes."""

    seen: bytes
    text: bytes


def dummy_space(joined: bytes, seen: bytes) -> int | None:
    """0 if the tokens rejoin ``seen``, 1 if they do after one prepended space, None otherwise."""
    if joined == seen:
        return 0
    return 1 if len(joined) == len(seen) + 1 and joined[:1] == b" " and joined[1:] == seen else None


def blocks(text: str, flatten: Flatten) -> list[Block]:
    """Blocks whose ``seen`` rejoin ``flatten(text)``; as small as the tokenizer's normaliser allows.

    Words first; a changed word is cut further into characters with their combining marks where
    that gives the same result. If not even words normalise independently, what differs is one block.
    """
    parts = [block for word in _WORDS.findall(text) for block in _word_blocks(word, flatten)]
    seen = flatten(text)
    if b"".join(block.seen for block in parts) == seen:
        return parts
    return _trimmed(seen, text.encode())


def stripped(parts: list[Block], left: bool, right: bool) -> list[Block]:
    """Blocks of which a tokenizer does not see the blanks at the ends of the text."""
    seen = [bool(block.seen.strip()) for block in parts]
    first = seen.index(True) if True in seen else len(parts)
    last = len(parts) - seen[::-1].index(True) if True in seen else 0
    unseen = {*(range(first) if left else ()), *(range(last, len(parts)) if right else ())}
    return [Block(b"", block.text) if at in unseen else block for at, block in enumerate(parts)]


def _trimmed(seen: bytes, text: bytes) -> list[Block]:
    """What a normaliser took from both ends of a text, else what differs, as one changed block."""
    at = text.find(seen)
    if at < 0:
        return differing_block(seen, text)
    return [Block(b"", text[:at]), Block(seen, seen), Block(b"", text[at + len(seen) :])]


def _word_blocks(word: str, flatten: Flatten) -> list[Block]:
    whole = Block(flatten(word), word.encode())
    if whole.seen == whole.text:
        return [whole]
    parts = [Block(flatten(part), part.encode()) for part in _clusters(word)]
    return parts if b"".join(part.seen for part in parts) == whole.seen else [whole]


def _clusters(word: str) -> Iterator[str]:
    start = 0
    for index in range(1, len(word)):
        if not unicodedata.combining(word[index]) or word[index - 1] == METASPACE:
            yield word[start:index]
            start = index
    yield word[start:]


def differing_block(joined: bytes, text: bytes) -> list[Block]:
    """What lies between the common start and the common end of two byte strings, as one changed block."""
    width = min(len(joined), len(text))
    left = _common(joined[:width], text[:width])
    right = _common(joined[left:][::-1][: width - left], text[left:][::-1][: width - left])
    middle = Block(joined[left : len(joined) - right], text[left : len(text) - right])
    tail = text[len(text) - right :]
    return [Block(text[:left], text[:left]), middle, Block(tail, tail)]


def _common(first: bytes, second: bytes) -> int:
    """Length of the common start of two byte strings of the same length."""
    differ = np.flatnonzero(np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8))
    return int(differ[0]) if len(differ) else len(first)


def map_ends(ends: NDArray[np.int32], parts: list[Block]) -> NDArray[np.int32]:
    """Ends in the bytes seen -> ends in the bytes of the text.

    An end inside a changed block moves up to the block's end, so that no token claims to end before
    bytes that belong to it.

    Args:
        ends: int32 [T], never decreasing, at most the sum of the blocks' ``seen`` lengths.
        parts: the blocks, in order.
    """
    seen_end = np.cumsum([len(block.seen) for block in parts])
    text_end = np.cumsum([len(block.text) for block in parts])
    same = np.array([block.seen == block.text for block in parts])
    # The first block that ends at or after each end; an end of 0 stays at 0.
    index = np.minimum(np.searchsorted(seen_end, ends, side="left"), len(parts) - 1)
    inside = np.where(same[index], ends - seen_end[index], 0)
    mapped = np.where(ends == 0, 0, text_end[index] + inside).astype(np.int32)
    # A block seen as nothing at the end of the text belongs to the last token.
    mapped[ends == seen_end[-1]] = text_end[-1]
    return mapped
