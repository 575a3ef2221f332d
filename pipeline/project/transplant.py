"""Which of a model's tokens make each token of another tokenizer: the map by which 'xtoken transplant' builds rows.

Shapes: V new tokens, P old ids of all of them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xtoken.pipeline.project.page import literal
from xtoken.pipeline.project.pieces import Segmenter
from xtoken.schemas.token_map import CONTROL, EQUAL, NEW_CONTROL, PIECES, UNDECODABLE, UNUSED, TokenMap

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

_WORST = 10  # tokens of most pieces that a report lists
_SHOWN = 16  # pieces of such a token


def map_tokens(new: "TokenTable", old: "TokenTable", controls: Mapping[int, int], rows: int | None = None) -> TokenMap:
    """The old ids of every new token.

    Control tokens by ``controls``; text by equal bytes, else by the old tokenizer's own merges on the raw bytes. A
    ``<0xHH>`` token whose byte another token has is never made of text: it is paired with the old token of the same
    kind, or unused.

    Args:
        new, old: the two tables.
        controls: new id -> old id of control tokens (``controls.control_pairs``).
        rows: of the model's matrices, where they may lack control tokens; old ids beyond are left out.
    """
    builder = _Builder(new, old, old.size if rows is None else min(rows, old.size))
    found = [builder.of(token, controls) for token in range(new.size)]
    return TokenMap(
        np.array([one for _, ids in found for one in ids], np.int32),
        np.cumsum([0, *(len(ids) for _, ids in found)], dtype=np.int64),
        np.array([kind for kind, _ in found], np.int8),
        builder.known,
    )


class _Builder:
    """Looks a new token up."""

    def __init__(self, new: "TokenTable", old: "TokenTable", rows: int) -> None:
        self._new, self._pieces, self._rows = new, new.pieces(), rows
        self._own, self._twin = new.by_bytes(), old.by_bytes()
        bytes_of = old.pieces()
        self._fallback = {bytes_of[token]: token for token in np.flatnonzero(old.byte_fallback).tolist()}
        self._segmenter = Segmenter(old)
        self.known = np.array([token for token in range(rows) if old.role[token] != "hole"], np.int32)

    def of(self, token: int, controls: Mapping[int, int]) -> tuple[int, list[int]]:
        """Kind and old ids of one new token."""
        role, text = self._new.role[token], self._pieces[token]
        if role == "hole" or not (role or text):
            return UNUSED, []
        if role is not None:
            old = controls.get(token)
            return (NEW_CONTROL, []) if old is None or old >= self._rows else (CONTROL, [old])
        return self._text(token, text)

    def _text(self, token: int, text: bytes) -> tuple[int, list[int]]:
        if self._new.byte_fallback[token] and self._own[text] != token:
            old = self._fallback.get(text)
            return (UNUSED, []) if old is None else (EQUAL, [old])
        equal = self._twin.get(text)
        if equal is not None:
            return EQUAL, [equal]
        pieces = self._segmenter.split(text)
        return (UNDECODABLE, []) if pieces is None else (PIECES, pieces)


def most_pieces(token_map: TokenMap, new: "TokenTable", old: "TokenTable") -> list[dict[str, Any]]:
    """The new tokens of most pieces, for people: lower ids first among equals."""
    counts = np.diff(token_map.offsets)
    order = np.argsort(-counts, kind="stable")[:_WORST]
    return [_shown(token_map, t, new, old) for t in order.tolist() if counts[t] > 1]


def _shown(token_map: TokenMap, token: int, new: "TokenTable", old: "TokenTable") -> dict[str, Any]:
    ids = token_map.ids[token_map.offsets[token] : token_map.offsets[token + 1]].tolist()
    named = [literal(old.token(one)) for one in ids[:_SHOWN]]
    more = ["..."] if len(ids) > _SHOWN else []
    return {"token": literal(new.token(token)), "id": token, "pieces": len(ids), "spelt": " ".join([*named, *more])}


def kept_map(new: "TokenTable", kept: Sequence[int], rows: int) -> TokenMap:
    """The map of a smaller tokenizer to the one that it was cut from: every token is the old one.

    Args:
        new: its table.
        kept: old id of each new one.
        rows: of the model's matrices, where they may lack control tokens.
    """
    inside = [old < rows for old in kept]
    kinds = [_kept_kind(role, there) for role, there in zip(new.role, inside, strict=True)]
    ids = np.array([old for old, there in zip(kept, inside, strict=True) if there], np.int32)
    return TokenMap(ids, np.cumsum([0, *inside], dtype=np.int64), np.array(kinds, np.int8), ids)


def _kept_kind(role: str | None, inside: bool) -> int:
    if not inside:
        return NEW_CONTROL
    return EQUAL if role is None else CONTROL
