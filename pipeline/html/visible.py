"""Bytes as people can read them: what no eye sees gets a sign, and what is not UTF-8 stands as hex.

A piece is a list that begins with text and alternates: text, sign, text, sign... A piece without signs is its text
alone. Text and signs are kept apart so that a page can set them apart: a dot that stands for a space is not a dot.
"""

from itertools import groupby

from xtoken.schemas.ui.markup import is_unseen

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
_SELECTORS = range(0xE0100, 0xE01F0)  # variants of the character before them


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
    signs: list[tuple[str, bool]] = []
    # bytes of no character come as lone surrogates
    for sign, run in groupby(data.decode("utf-8", "surrogateescape"), key=_sign):
        chars = "".join(run)
        if sign == _TEXT:
            signs.append((chars, False))
        elif sign == _BYTES:
            signs.append((chars.encode("utf-8", "surrogateescape").hex(" ").upper(), True))
        elif len(chars) < _RUN:
            signs += [(sign, True)] * len(chars)
        else:
            signs.append((f"{sign}×{len(chars)}", True))
    return signs


def _sign(char: str) -> str:
    """What stands for a character: a sign, or that it is text or a byte."""
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return _BYTES
    if code in _NAMES:
        return _NAMES[code]
    return f"U+{code:04X}" if is_unseen(char) or code in _SELECTORS else _TEXT
