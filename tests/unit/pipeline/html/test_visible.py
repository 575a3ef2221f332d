"""What no eye sees gets a sign, and nothing else changes."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.html import visible as module
from xtoken.pipeline.html.visible import Piece, plain, visible


def bytes_of(piece: Piece) -> bytes:
    """The inverse of ``visible``."""
    chars = {sign: chr(code).encode() for code, sign in module._NAMES.items()}
    data = b""
    for at, part in enumerate([piece] if isinstance(piece, str) else piece):
        if at % 2 == 0:
            data += part.encode()
            continue
        sign, _, times = part.partition("×")
        if re.fullmatch("[0-9A-F]{2}( [0-9A-F]{2})*", sign):
            data += bytes.fromhex(sign)
        else:
            char = chr(int(sign[2:], 16)).encode() if sign.startswith("U+") else chars[sign]
            data += char * int(times or 1)
    return data


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"cat", "cat"),
        (b" cat", ["", "·", "cat"]),
        ("·".encode(), "·"),
        (b"\n\n\t", ["", "⏎", "", "⏎", "", "⇥"]),
        (b" " * 12 + b"x", ["", "·×12", "x"]),
        (b"\xe6\x9d", ["", "E6 9D"]),
        (b"a\xffb", ["a", "FF", "b"]),
        (b"a\x0cb", ["a", "U+000C", "b"]),
        ("a\u202eb".encode(), ["a", "RLO", "b"]),
        ("\u200d".encode(), ["", "ZWJ"]),
        (b"\x00\x1b", ["", "NUL", "", "ESC"]),
        ("\ue000".encode(), ["", "U+E000"]),
        ("\u3164".encode(), ["", "U+3164"]),
        ("日本".encode(), "日本"),
        (b"", ""),
    ],
)
def test_signs(data: bytes, shown: Piece) -> None:
    assert visible(data) == shown


@given(st.one_of(st.binary(max_size=20), st.text(max_size=20).map(lambda s: s.encode("utf-8", "replace"))))
def test_nothing_unseen_is_left_and_nothing_is_lost(data: bytes) -> None:
    piece = visible(data)
    shown = plain(piece)
    assert not [char for char in shown if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}]
    assert bytes_of(piece) == data


def test_plain_sets_long_signs_apart() -> None:
    assert plain(visible("a\u202e b".encode())) == "a[RLO]·b"
