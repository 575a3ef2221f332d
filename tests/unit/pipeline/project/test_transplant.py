"""Which old tokens make a new one: by role, by equal bytes, by the model's own merges."""

from collections.abc import Callable

import numpy as np
import pytest

from xtoken.pipeline.project.transplant import kept_map, map_tokens, most_pieces
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.token_map import CONTROL, EQUAL, KINDS, NEW_CONTROL, PIECES, UNDECODABLE, UNUSED, TokenMap

# Of tokens that have text: how many a real pair shares, by bytes. Counted with sets, apart from the code.
PAIRS = [("llama2", "smollm2"), ("qwen3", "smollm2"), ("smollm2", "llama2")]


def ids_of(found: TokenMap, token: int) -> list[int]:
    return list(found.ids[found.offsets[token] : found.offsets[token + 1]].tolist())


def table(
    pieces: list[bytes], role: list[str | None], fallback: list[bool], merges: list[tuple[int, int]]
) -> TokenTable:
    pairs = np.array(merges, np.int32).reshape(-1, 2)
    return TokenTable.build(pieces, role, fallback, pairs, name="toy", kind="metaspace")


def test_every_kind_by_hand() -> None:
    #                0    1     2     3     4    5     6
    roles = ["eos", None, None, None, "hole", None, "pad"]
    old = table([b"", b"a", b"b", b"ab", b"", b"c", b""], roles, [False] * 7, [(1, 2)])
    new_pieces = [b"ab", b"abba", b"", b"", b"ad", b"", b"c"]
    new = table(new_pieces, [None, None, "eos", "special", None, "hole", None], [False] * 7, [])
    found = map_tokens(new, old, {2: 0, 3: 6}, rows=6)
    assert [KINDS[kind] for kind in found.kind] == [
        *("equal", "pieces", "control", "new_control", "undecodable", "unused", "equal")
    ]
    assert [ids_of(found, token) for token in range(7)] == [[3], [3, 2, 1], [0], [], [], [], [5]]
    assert found.known.tolist() == [0, 1, 2, 3, 5], "a hole has no row, and id 6 lies beyond the head"
    assert found.counts() == {
        **dict.fromkeys(("control", "pieces", "undecodable", "new_control", "unused"), 1),
        "equal": 2,
    }
    assert most_pieces(found, new, old) == [{"token": "'abba'", "id": 1, "pieces": 3, "spelt": "'ab' 'b' 'a'"}]


def test_a_byte_token_that_text_never_makes_is_not_a_second_copy() -> None:
    """``<0x61>`` beside ``a``: two equal rows of a head would halve the probability of the letter."""
    new = table([b"a", b"a", b"\n"], [None] * 3, [False, True, True], [])
    plain = table([b"a", b"\n"], [None] * 2, [False, False], [])
    found = map_tokens(new, plain, {})
    assert found.kind.tolist() == [EQUAL, UNUSED, EQUAL], "what no other token spells is made of text"
    alike = table([b"\n", b"a", b"a"], [None] * 3, [True, True, False], [])
    found = map_tokens(new, alike, {})
    assert [ids_of(found, token) for token in range(3)] == [[2], [1], [0]], "byte tokens are paired with byte tokens"


@pytest.mark.parametrize(("to", "of"), PAIRS)
def test_real_pairs(table: Callable[[str], TokenTable], to: str, of: str) -> None:
    new, old = table(to), table(of)
    found = map_tokens(new, old, {})
    bytes_of, spelt = old.pieces(), new.pieces()
    twins = set(bytes_of) - {b""}
    for kind, token, own in zip(found.kind.tolist(), range(new.size), spelt, strict=True):
        made = b"".join(bytes_of[one] for one in ids_of(found, token))
        if kind in (EQUAL, PIECES):
            assert made == own
            assert (kind == EQUAL) == (own in twins)
        else:
            assert made == b""
    own_id = new.by_bytes()
    produced = [t for t in range(new.size) if spelt[t] and (own_id[spelt[t]] == t or not new.byte_fallback[t])]
    counts = found.counts()
    assert counts["equal"] == sum(spelt[t] in twins for t in produced)
    assert counts["pieces"] > 1000
    assert counts["new_control"] == sum(role not in (None, "hole") for role in new.role)
    unspelt = {spelt[t] for t in found.of(UNDECODABLE).tolist()}
    lacking = {byte for byte in range(256) if bytes([byte]) not in twins}
    assert all(set(piece) & lacking for piece in unspelt)


def test_a_smaller_tokenizer_is_the_old_ids() -> None:
    new = table([b"a", b"b", b"", b""], [None, None, "eos", "pad"], [False] * 4, [])
    found = kept_map(new, [0, 3, 7, 9], rows=8)
    assert found.kind.tolist() == [EQUAL, EQUAL, CONTROL, NEW_CONTROL]
    assert (found.ids.tolist(), found.offsets.tolist()) == ([0, 3, 7], [0, 1, 2, 3, 3])
