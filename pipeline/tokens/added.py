"""Where tokens end in a text that holds added tokens, which the tokenizer cuts out before it looks at the rest.

An added token may eat the blanks beside it (``lstrip``, ``rstrip``, or a blank of its own from a normaliser), and the
stretch behind it may begin with a dummy space. So each stretch between two of them is placed by itself, and is right
where its tokens are those of its text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

# What \s is to the tokenizers library; Python's own also matches four control characters.
_OTHERS = "\t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_HERE = {True: re.compile(f"[{_OTHERS}]*"), False: re.compile(f"[ {_OTHERS}]*")}
_BEFORE = re.compile(f"[ {_OTHERS}]*\\Z")
_BLANKS = 8  # blanks before an added token that are tried one by one
# Places where an added token is looked for: its text may stand there without being one (single_word).
_TRIES = 512

Stretch = Callable[[str, Sequence[int]], NDArray[np.int32] | None]


@dataclass(frozen=True)
class Added:
    """An added token that text can hold.

    Attributes:
        content: as the text spells it.
        rstrip: it takes all blanks behind it.
        spared: it finds spaces replaced by a normaliser, and takes other blanks only.
        own_blank: it is looked for with a space in front, which a normaliser gave it.
    """

    content: str
    rstrip: bool = False
    spared: bool = False
    own_blank: bool = False


def place(text: str, ids: Sequence[int], added: Mapping[int, Added], stretch: Stretch) -> NDArray[np.int32] | None:
    """Byte ends of the tokens of a text, int32 [T], or None where some are not found in it.

    Args:
        text: the whole text.
        ids: its tokens.
        added: the added tokens among them.
        stretch: gives byte ends of the tokens of a text without added ones, or None where they are another text's.
    """
    ends_of = [np.zeros(0, np.int32)]
    at = size = first = 0  # character, byte and token where the stretch begins
    fresh = True  # a normaliser puts a blank in front of what follows
    for index, token in enumerate(ids):
        if token not in added:
            continue
        placed = _next(text, at, ids[first:index], added[token], stretch, fresh)
        if placed is None:
            return None
        ends, stop = placed
        fresh = not added[token].own_blank
        ends_of.append(ends + np.int32(size))
        size += len(text[at:stop].encode())
        ends_of.append(np.array([size], np.int32))
        at, first = stop, index + 1
    last = stretch(text[at:], ids[first:])
    if last is None:
        return None
    all_ends: NDArray[np.int32] = np.concatenate([*ends_of, last + np.int32(size)])
    if len(all_ends):  # what no token spells at the end of the text belongs to the last one
        all_ends[all_ends == all_ends[-1]] = len(text.encode())
    return all_ends


def _next(
    text: str, at: int, ids: Sequence[int], token: Added, stretch: Stretch, fresh: bool
) -> tuple[NDArray[np.int32], int] | None:
    """Ends of the tokens from character ``at`` to the added token behind them, and the character where that ends."""
    for begin, end in islice(_places(text, at, token, fresh), _TRIES):
        for stop in _stops(text, at, begin):
            ends = stretch(text[at:stop], ids)
            if ends is not None:
                blanks = _HERE[token.spared].match(text, end) if token.rstrip else None
                return ends, blanks.end() if blanks else end
    return None


def _places(text: str, at: int, token: Added, fresh: bool) -> Iterator[tuple[int, int]]:
    """Where an added token may begin and end, with its own blank; where its text stands, it need not (single_word)."""
    if token.own_blank and fresh and text.startswith(token.content, at):
        yield at, at + len(token.content)  # the blank in front is the dummy space
    wanted = f" {token.content}" if token.own_blank else token.content
    begin = text.find(wanted, at)
    while begin >= 0:
        yield begin, begin + len(wanted)
        begin = text.find(wanted, begin + 1)


def _stops(text: str, at: int, begin: int) -> Iterator[int]:
    """Where the stretch before an added token may end: the token eats no blank, some, or all of them."""
    blanks = _BEFORE.search(text, at, begin)
    first = blanks.start() if blanks else begin
    yield from range(begin, max(first, begin - _BLANKS) - 1, -1)
    yield first


def stretch_ends(pieces: Sequence[bytes], seen: bytes) -> NDArray[np.int32] | None:
    """Ends of tokens that spell ``seen``, int32 [T]; None where they do not.

    Any token may bring a blank that is not there, as the first one does where a dummy space is prepended, or each one
    behind a cut. Which of two blanks was brought can be unclear; then an end that is not known moves up.
    """
    joined = b"".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int32)
    if joined == seen:
        return ends
    if joined[:1] == b" " and joined[1:] == seen:
        return ends - np.int32(1)
    forth, back = _walk(pieces, seen), _walk_back(pieces, seen)
    if forth is None or back is None:
        return None
    known = np.flatnonzero(forth == back)
    return forth[known[np.searchsorted(known, np.arange(len(forth)))]]


def _walk(pieces: Sequence[bytes], seen: bytes) -> NDArray[np.int32] | None:
    ends, at = np.empty(len(pieces), np.int32), 0
    for index, piece in enumerate(pieces):
        if not seen.startswith(piece, at):
            if piece[:1] != b" " or not seen.startswith(piece[1:], at):
                return None
            at -= 1
        at += len(piece)
        ends[index] = at
    return ends if len(pieces) and at == len(seen) else None


def _walk_back(pieces: Sequence[bytes], seen: bytes) -> NDArray[np.int32] | None:
    ends, at = np.empty(len(pieces), np.int32), len(seen)
    for index in range(len(pieces) - 1, -1, -1):
        piece = pieces[index]
        ends[index] = at
        if not seen.endswith(piece, 0, at):
            if piece[:1] != b" " or not seen.endswith(piece[1:], 0, at):
                return None
            at += 1
        at -= len(piece)
    return ends if len(pieces) and at == 0 else None
