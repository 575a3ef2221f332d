"""Which tokens of an old vocabulary make each token of a new one: what the pipeline finds out and the trainer applies.

Shapes: V new tokens, P old ids of all of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What a new token is to the old vocabulary; TokenMap.kind is an index into KINDS.
CONTROL, EQUAL, PIECES, UNDECODABLE, NEW_CONTROL, UNUSED = range(6)
KINDS = ("control", "equal", "pieces", "undecodable", "new_control", "unused")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """For each new token the old ones that it is made of.

    Attributes:
        ids: int32 [P], old ids, those of one new token after the other, in the order of its bytes.
        offsets: int64 [V + 1]; the old ids of token t are ``ids[offsets[t]:offsets[t + 1]]``.
        kind: int8 [V], an index into ``KINDS``:
            control, equal: one old id, whose row is copied;
            pieces: the old tokenizer's pieces of its bytes, one or more;
            undecodable: text that the old tokens cannot spell; new_control: a control token without a counterpart;
            unused: no text is made of it (no token has the id, or another token has its byte). These have no ids.
        known: int32, ascending: the old ids that are tokens and have a row.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    kind: NDArray[np.int8]
    known: NDArray[np.int32]

    @property
    def size(self) -> int:
        """V."""
        return len(self.kind)

    def of(self, *kinds: int) -> NDArray[np.int64]:
        """int64, ascending: the new ids of some kinds."""
        found: NDArray[Any] = np.flatnonzero(np.isin(self.kind, kinds))
        return found

    def first(self, new: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32: of each of these new ids the first old id."""
        return self.ids[self.offsets[new]]

    def counts(self) -> dict[str, int]:
        """Tokens of each kind."""
        return {name: int((self.kind == at).sum()) for at, name in enumerate(KINDS)}
