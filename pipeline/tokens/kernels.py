"""Do tokens rejoin their text, and where does each end? Compiled by numba, for every text asks it.

Shapes: T tokens of one text, V vocabulary, B bytes of all tokens of the vocabulary together.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import compiled

NOT_REJOINED = -1
_SPACE = 32


@compiled
def rejoined_ends(
    ids_T: NDArray[np.int32], data_B: NDArray[np.uint8], offset_V: NDArray[np.int64], text: NDArray[np.uint8]
) -> tuple[int, NDArray[np.int32]]:
    """Byte ends of tokens whose bytes are the text's, or those of one space and the text.

    Args:
        ids_T: ids of the vocabulary.
        data_B: bytes of its tokens, one after the other.
        offset_V: where each token's start, [V + 1].
        text: in UTF-8.

    Returns:
        0, or 1 after a space that is not the text's, or ``NOT_REJOINED``; and [T] the byte of the text at which each
        token ends (of no meaning where they do not rejoin).
    """
    end_T = np.empty(len(ids_T), np.int32)
    size = 0
    for token in ids_T:
        size += offset_V[token + 1] - offset_V[token]
    space = size - len(text)
    if space not in (0, 1):
        return NOT_REJOINED, end_T
    at = -space
    for place in range(len(ids_T)):
        for byte in range(offset_V[ids_T[place]], offset_V[ids_T[place] + 1]):
            if data_B[byte] != (text[at] if at >= 0 else _SPACE):
                return NOT_REJOINED, end_T
            at += 1
        end_T[place] = max(at, 0)
    return space, end_T
