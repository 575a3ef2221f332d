"""Which tokens begin a word, by hand."""

from xtoken.schemas.word_starts import word_starts

PIECES = [b"", b" a", b"\tx", b"\n", b"a ", b"", b"", b" ", b"\r\n", b"\xe3\x80\x80"]
ROLES = ["eos", None, None, None, None, "hole", "special", None, None, None]


def test_text_that_starts_with_a_space() -> None:
    assert [i for i, one in enumerate(word_starts(PIECES, ROLES, "space")) if one] == [1, 7]


def test_the_set_of_the_paper_has_tabs_newlines_and_control_tokens() -> None:
    """Neither a hole nor blanks beyond these three, such as a carriage return or a wide space."""
    assert [i for i, one in enumerate(word_starts(PIECES, ROLES, "paper")) if one] == [0, 1, 2, 3, 6, 7]
