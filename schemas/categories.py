"""What kind of text a token stands for: the rows of every table by category."""

import re

CATEGORIES = (
    "numerals_1",
    "numerals_2",
    "numerals_3",
    "whitespace",
    "operators",
    "latin",
    "other_scripts",
    "other_text",
    "partial_utf8",
    "specials",
)
NUMERALS = CATEGORIES[:3]
_OPERATORS = re.compile(r" ?[!-/:-@\[-`{-~]+")
_LAST_LATIN = 0x24F


def category(text: bytes, role: str | None) -> str | None:
    """One of ``CATEGORIES`` for a token; None for a hole of the id range."""
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


def label(name: str) -> str:
    """A category as people read it."""
    if name in NUMERALS:
        return f"{name[-1]}-digit numerals"
    return "partial UTF-8" if name == "partial_utf8" else name.replace("_", " ")
