"""Untrusted text as HTML."""

import sys

from xtoken.schemas.ui.markup import escaped, is_unseen, isolated


def test_text_is_escaped_and_isolated_where_it_may_turn() -> None:
    assert escaped("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert escaped("<é>") == "<bdi>&lt;é&gt;</bdi>"
    assert isolated("<b>א</b>") == "<bdi><b>א</b></bdi>"


def test_what_no_eye_sees_is_known() -> None:
    for code in (0, 0x20, 0xA0, 0xAD, 0x34F, 0x115F, 0x200B, 0x202E, 0x2800, 0x3164, 0xD800, 0xE000, sys.maxunicode):
        assert is_unseen(chr(code)), hex(code)
    for char in "aé中א٣€_-":
        assert not is_unseen(char)
