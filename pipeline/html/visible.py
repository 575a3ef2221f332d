"""Bytes as people can read them: what no eye sees gets a sign, and what is no UTF-8 stands as hex.

A piece is a list that begins with text and alternates: text, sign, text, sign... A piece without signs is its text
alone. Text and signs are kept apart so that a page can set them apart: a dot that stands for a space is not a dot.
"""

import unicodedata
from itertools import groupby

Piece = str | list[str]

_TEXT, _BYTES = "text", "bytes"
_RUN = 6  # from here on equal signs are counted instead of repeated
_CONTROLS = (
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
)
_NAMES = dict(enumerate(_CONTROLS.split())) | {
    **dict(zip(b" \t\n", "·⇥⏎", strict=True)),
    0x0C: "U+000C",  # its short name is that of a byte in hex
    0x7F: "DEL",
    0x85: "NEL",
    0xA0: "NBSP",
    0xAD: "SHY",
    0x34F: "CGJ",
    0x61C: "ALM",
    0x2060: "WJ",
    0x3000: "IDSP",
    0xFEFF: "BOM",
    **dict(enumerate(("ZWSP", "ZWNJ", "ZWJ", "LRM", "RLM"), 0x200B)),
    **dict(enumerate(("LS", "PS", "LRE", "RLE", "PDF", "LRO", "RLO", "NNBSP"), 0x2028)),
    **dict(enumerate(("LRI", "RLI", "FSI", "PDI"), 0x2066)),
    **{0xFE00 + n: f"VS{n + 1}" for n in range(16)},
}
# Categories of characters without a shape of their own, and letters and marks that are blank all the same.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
_BLANK = {0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0}
_BLANK |= set(range(0xE0100, 0xE01F0))


def visible(data: bytes) -> Piece:
    """What these bytes are shown as."""
    parts = [("", "")]
    for shown, is_sign in _signs(data):
        if is_sign:
            parts.append((shown, ""))
        else:
            parts[-1] = (parts[-1][0], parts[-1][1] + shown)
    flat = [part for pair in parts for part in pair][1:]
    if len(flat) > 1 and not flat[-1]:
        flat.pop()
    return flat[0] if len(flat) == 1 else flat


def plain(piece: Piece) -> str:
    """A piece as one string, signs in brackets unless they are one character."""
    if isinstance(piece, str):
        return piece
    signed = (part if at % 2 == 0 or len(part) == 1 else f"[{part}]" for at, part in enumerate(piece))
    return "".join(signed)


def _signs(data: bytes) -> list[tuple[str, bool]]:
    """Runs of text and single signs, in order; equal signs in a long row become one with their number."""
    pieces: list[tuple[str, bool]] = []
    # bytes of no character come as lone surrogates
    for sign, run in groupby(data.decode("utf-8", "surrogateescape"), key=_sign):
        chars = "".join(run)
        if sign == _TEXT:
            pieces.append((chars, False))
        elif sign == _BYTES:
            pieces.append((chars.encode("utf-8", "surrogateescape").hex(" ").upper(), True))
        elif len(chars) < _RUN:
            pieces += [(sign, True)] * len(chars)
        else:
            pieces.append((f"{sign}×{len(chars)}", True))
    return pieces


def _sign(char: str) -> str:
    """What stands for a character: a sign, or that it is text or a byte."""
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return _BYTES
    if code in _NAMES:
        return _NAMES[code]
    return f"U+{code:04X}" if unicodedata.category(char) in _UNSEEN or code in _BLANK else _TEXT
