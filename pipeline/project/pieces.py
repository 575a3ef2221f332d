"""A tokenizer's own segmentation applied to raw bytes.

A student token may be any bytes, partial UTF-8 included, so the teacher's merges run on bytes directly: no
normaliser, no pre-tokenizer, no text. What the merges leave over stays as byte tokens.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

_NO_MERGE = 1 << 60
PIECES_KEPT = 4
RAW_WEIGHTS = tuple(0.9 * 0.1**i for i in range(PIECES_KEPT))


class Segmenter:
    """Splits byte strings into tokens of one table: BPE where it has merges, else greedy longest match."""

    def __init__(self, table: "TokenTable") -> None:
        self._by_bytes = table.by_bytes()
        self._characters = table.info.kind == "metaspace"
        self._size = table.size
        self._longest = max(map(len, self._by_bytes), default=0)
        self._byte_ids = [self._by_bytes.get(bytes([byte])) for byte in range(256)]
        self._rank: dict[int, int] = {}
        self._merged: list[int] = []
        self._read_merges(table)

    def _read_merges(self, table: "TokenTable") -> None:
        data, offsets = table.data.tobytes(), table.offsets.tolist()
        for left, right in table.merges.tolist():
            whole = data[offsets[left] : offsets[left + 1]] + data[offsets[right] : offsets[right + 1]]
            token = self._by_bytes.get(whole)
            if token is not None:
                self._rank[left * self._size + right] = len(self._merged)
                self._merged.append(token)

    def split(self, text: bytes) -> list[int] | None:
        """Token ids whose bytes, joined, are ``text``; None when the vocabulary cannot spell it."""
        if not self._merged:
            return self._greedy(text)
        ids = self._atoms(text)
        return None if ids is None else self._merge(ids)

    def _atoms(self, text: bytes) -> list[int] | None:
        """What BPE starts from: bytes, or for metaspace the characters known to the vocabulary."""
        ids: list[int | None] = []
        if not self._characters:
            ids = [self._byte_ids[byte] for byte in text]
            return None if None in ids else cast(list[int], ids)
        for character in _characters(text):
            known = self._by_bytes.get(character)
            ids += [self._byte_ids[byte] for byte in character] if known is None else [known]
        return None if None in ids else cast(list[int], ids)

    def _merge(self, ids: list[int]) -> list[int]:
        """Apply the merge of lowest rank, leftmost first, until none applies."""
        rank, size = self._rank, self._size
        ranks = [rank.get(left * size + right, _NO_MERGE) for left, right in pairwise(ids)]
        while ranks and (best := min(ranks)) != _NO_MERGE:
            at = ranks.index(best)
            ids[at : at + 2] = [self._merged[best]]
            del ranks[at]
            if at:
                ranks[at - 1] = rank.get(ids[at - 1] * size + ids[at], _NO_MERGE)
            if at < len(ranks):
                ranks[at] = rank.get(ids[at] * size + ids[at + 1], _NO_MERGE)
        return ids

    def _greedy(self, text: bytes) -> list[int] | None:
        ids: list[int] = []
        start = 0
        while start < len(text):
            token, width = longest_prefix(self._by_bytes, self._longest, text[start:])
            if token is None:
                return None
            ids.append(token)
            start += width
        return ids


def longest_prefix(by_bytes: dict[bytes, int], longest: int, text: bytes) -> tuple[int | None, int]:
    """The entry with the longest key that is a prefix of ``text`` (equal counts), and that key's length in bytes.

    Args:
        by_bytes: byte string -> id.
        longest: length of its longest key.
        text: the bytes to match.
    """
    for length in range(min(longest, len(text)), 0, -1):
        token_id = by_bytes.get(text[:length])
        if token_id is not None:
            return token_id, length
    return None, 0


def _characters(text: bytes) -> list[bytes]:
    """The UTF-8 characters of ``text``; a byte that belongs to none stands alone."""
    try:
        return [character.encode() for character in text.decode()]
    except UnicodeDecodeError as error:
        valid, start = text[: error.start], error.start
        return [*_characters(valid), text[start : start + 1], *_characters(text[start + 1 :])]
