"""Which tokens begin a word: what ``space_logprob`` sums over, on the teacher's side and on the student's.

Both sides of ALM's ``--debias`` must count the same tokens, so the set has a name that capture and targets carry.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

SpaceSet = Literal["space", "paper"]
SPACE_SETS = get_args(SpaceSet)


def word_starts(pieces: Sequence[bytes], roles: Sequence[str | None], which: SpaceSet) -> NDArray[np.bool_]:
    """bool [V]: the token begins a word.

    Args:
        pieces: bytes of each token; empty for control tokens and holes.
        roles: None for text, else as in ``xtoken.schemas.tables.VOCAB``.
        which: ``space``: text that starts with a space. ``paper``: text that starts with a space, tab or newline, and
            every control token, behind which no word goes on (the code of ALM, arXiv 2503.20083).
    """
    if which == "space":
        return np.array([role is None and data[:1] == b" " for data, role in zip(pieces, roles, strict=True)], np.bool_)
    return np.array(
        [
            data[:1] in (b" ", b"\t", b"\n") if role is None else role != "hole"
            for data, role in zip(pieces, roles, strict=True)
        ],
        np.bool_,
    )
