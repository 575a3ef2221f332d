"""Whole numbers of any width, packed into bytes or words.

Shapes: R rows, K numbers of a row, B bytes of a row, N words of a row.
"""

import numpy as np
from numpy.typing import NDArray


def index_bits(size: int) -> int:
    """Bits of an id below ``size``: ceil(log2 size)."""
    return (size - 1).bit_length()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many numbers take."""
    return -(-count * bits // 8)


def unpack_bytes(data_RB: NDArray[np.uint8], count: int, bits: int) -> tuple[NDArray[np.int64], bool]:
    """Numbers of a stream of bits, most significant bit first.

    Args:
        data_RB: each row by itself.
        count: numbers of a row.
        bits: of each number, at most 32.

    Returns:
        int64 [R, K], and whether the bits behind the last number are all 0, as whoever packed them left them.
    """
    if not bits:
        return np.zeros((len(data_RB), count), np.int64), not data_RB.any()
    bit_R = np.unpackbits(data_RB, axis=1)
    used = count * bits
    fields = bit_R[:, :used].reshape(len(data_RB), count, bits)
    found = np.zeros((len(data_RB), count), np.int64)
    for place in range(bits):  # no array of 8-byte bits is made
        found = (found << 1) | fields[:, :, place]
    return found, not bit_R[:, used:].any()


def unpack_words(word_RN: NDArray[np.uint64], count: int, bits: int) -> NDArray[np.int64]:
    """Numbers that stand in words of 64 bits, least significant first, none across two words: int64 [R, K]."""
    per_word = 64 // bits
    shift = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    mask = np.uint64((1 << bits) - 1)
    fields = (word_RN[:, :, None] >> shift) & mask
    return fields.reshape(len(word_RN), -1)[:, :count].astype(np.int64)
