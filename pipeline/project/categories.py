"""What kind of text a token stands for: the rows of every coverage table.

Shapes: V tokens of a vocabulary.
"""

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from schemas.config import CATEGORIES

if TYPE_CHECKING:
    from pipeline.tokens import TokenTable

NUMERALS = CATEGORIES[:3]
HOLE = -1  # an id without a token
_OPERATORS = re.compile(r" ?[!-/:-@\[-`{-~]+")
_LAST_LATIN = 0x24F


def category(text: bytes, role: str | None) -> str | None:
    """One of ``schemas.config.CATEGORIES`` for a token; None for a hole of the id range."""
    if role is not None:
        return None if role == "hole" else "specials"
    try:
        word = text.decode()
    except UnicodeDecodeError:
        return "partial_utf8"
    if word.isascii() and word.isdigit() and len(word) <= len(NUMERALS):
        return NUMERALS[len(word) - 1]
    if word.isspace():
        return "whitespace"
    if _OPERATORS.fullmatch(word):
        return "operators"
    letters = [character for character in word if character.isalpha()]
    if not letters:
        return "other_text"
    return "latin" if all(ord(character) <= _LAST_LATIN for character in letters) else "other_scripts"


def categories(table: "TokenTable") -> NDArray[np.int8]:
    """int8 [V]: index into ``CATEGORIES`` of each token, or ``HOLE``."""
    code: dict[str | None, int] = {name: at for at, name in enumerate(CATEGORIES)} | {None: HOLE}
    found = (code[category(text, role)] for text, role in zip(table.pieces(), table.role, strict=True))
    return np.fromiter(found, np.int8, table.size)


def label(name: str) -> str:
    """A category as people read it."""
    if name in NUMERALS:
        return f"{name[-1]}-digit numerals"
    return "partial UTF-8" if name == "partial_utf8" else name.replace("_", " ")


def selected(name: str) -> tuple[int, ...]:
    """Indices into ``CATEGORIES`` that a category's name means; ``numerals`` means all three."""
    return tuple(at for at, one in enumerate(CATEGORIES) if one == name or (name == "numerals" and one in NUMERALS))
