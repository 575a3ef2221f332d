"""The category of every token of a vocabulary (see ``xtoken.schemas.categories``).

Shapes: V tokens.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.categories import CATEGORIES, NUMERALS, category

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

HOLE = -1  # an id without a token


def categories(table: "TokenTable") -> NDArray[np.int8]:
    """int8 [V]: index into ``CATEGORIES`` of each token, or ``HOLE``."""
    code: dict[str | None, int] = {name: at for at, name in enumerate(CATEGORIES)} | {None: HOLE}
    codes = (code[category(text, role)] for text, role in zip(table.pieces(), table.role, strict=True))
    return np.fromiter(codes, np.int8, table.size)


def selected(name: str) -> tuple[int, ...]:
    """Indices into ``CATEGORIES`` that a category's name means; ``numerals`` means all three."""
    return tuple(at for at, one in enumerate(CATEGORIES) if one == name or (name == "numerals" and one in NUMERALS))
