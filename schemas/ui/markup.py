"""Untrusted text as HTML, for every page that is written: what runs and artifacts hold may come from anybody."""

import html
import unicodedata

# Categories of characters without a shape of their own, and letters and marks that are blank all the same.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
_BLANK = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0}


def escaped(text: str) -> str:
    """Text as markup: escaped, and isolated where it may be right-to-left."""
    return html.escape(text) if text.isascii() else isolated(html.escape(text))


def isolated(markup: str) -> str:
    """Markup whose direction does not turn what stands beside it."""
    return f"<bdi>{markup}</bdi>"


def is_unseen(char: str) -> bool:
    """Whether a reader sees nothing, or nothing of its own, where this character stands."""
    return unicodedata.category(char) in _UNSEEN or ord(char) in _BLANK
