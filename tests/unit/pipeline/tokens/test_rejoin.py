"""Blocks and moved ends, on rules small enough to work out by hand."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.tokens.rejoin import Block, blocks, differing_block, dummy_space, map_ends


def nfkc(text: str) -> bytes:
    return unicodedata.normalize("NFKC", text).encode()


def squeezed(text: str) -> bytes:
    """A normaliser whose words depend on each other: it strips both ends of the text."""
    return text.strip().encode()


@pytest.mark.parametrize(
    ("joined", "seen", "space"), [(b"a", b"a", 0), (b" a", b"a", 1), (b"a", b" a", None), (b"", b"", 0), (b" ", b"", 1)]
)
def test_dummy_space(joined: bytes, seen: bytes, space: int | None) -> None:
    assert dummy_space(joined, seen) == space


def test_changed_characters_are_blocks_of_their_own() -> None:
    found = blocks("ab ﬁx e\u0301", nfkc)
    assert found[:2] == [Block(b"ab", b"ab"), Block(b" ", b" ")]
    assert found[2:4] == [Block(b"fi", "ﬁ".encode()), Block(b"x", b"x")]
    assert found[-1] == Block("é".encode(), "e\u0301".encode())


def test_jamo_compose_across_clusters_into_one_block() -> None:
    assert blocks("\u1112\u1161\u11ab!", nfkc) == [Block("한!".encode(), "\u1112\u1161\u11ab!".encode())]


def test_what_is_taken_from_both_ends_changes_nothing_between() -> None:
    assert blocks(" a b ", squeezed) == [Block(b"", b" "), Block(b"a b", b"a b"), Block(b"", b" ")]


def test_words_that_depend_on_each_other_differ_in_one_block() -> None:
    found = blocks("ab xy cd", lambda text: text.replace(" xy ", "").encode())
    assert found == [Block(b"ab", b"ab"), Block(b"", b" xy "), Block(b"cd", b"cd")]


def test_ends_inside_a_changed_block_move_up() -> None:
    found = [Block(b"ab", b"ab"), Block(b"fi", "ﬁ".encode()), Block(b"c", b"c"), Block(b"", b"\x16")]
    ends = np.array([0, 1, 2, 3, 4, 5, 5], dtype=np.int32)
    assert map_ends(ends, found).tolist() == [0, 1, 2, 5, 5, 7, 7]


def test_the_difference_lies_between_common_start_and_end() -> None:
    assert differing_block(b"abXcd", b"abYYcd") == [Block(b"ab", b"ab"), Block(b"X", b"YY"), Block(b"cd", b"cd")]
    # One of three: common start and end must not overlap.
    assert differing_block(b"aa", b"aaa") == [Block(b"aa", b"aa"), Block(b"", b"a"), Block(b"", b"")]


@given(st.text(max_size=40))
def test_blocks_always_rejoin_both_sides(text: str) -> None:
    found = blocks(text, nfkc)
    assert b"".join(block.seen for block in found) == nfkc(text)
    assert b"".join(block.text for block in found) == text.encode()


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_a_difference_always_rejoins_both_sides(joined: bytes, text: bytes) -> None:
    found = differing_block(joined, text)
    assert b"".join(block.seen for block in found) == joined
    assert b"".join(block.text for block in found) == text
