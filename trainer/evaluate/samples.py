"""A held-out sample, tokenized by whoever calls: the trainer never tokenizes text."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EvalSample:
    """Tokens of one held-out window.

    Attributes:
        ids: int32 [S], without BOS.
        text_bytes: bytes of the text all tokens stand for.
        first_token_bytes: bytes of the first token, which is not predicted where a student has no context token.
        id: name of the window, unique among the samples; what rows of several runs are paired by.
        source: where its document comes from; empty = not known.
    """

    ids: NDArray[np.int32]
    text_bytes: int
    first_token_bytes: int
    id: str = ""
    source: str = ""
