"""Tokens of an API trace as ids of a tokenizer: by their bytes, each of which one token alone may have.

Shapes: U tokens of the tokenizer.
"""

from collections.abc import Sequence

import numpy as np

from xtoken.pipeline.chats import ChatModel, Refused
from xtoken.pipeline.chats.refused import shown
from xtoken.pipeline.imports.api_trace_rows import Key, TraceRow
from xtoken.pipeline.tokens.failures import CannotTokenize

_TELL = "have the server tell ids (vLLM: return_token_ids, or return_tokens_as_token_ids)"


class TokenIds:
    """Bytes to ids. A control token is found by its spelling, which is how vLLM shows one."""

    def __init__(self, model: ChatModel) -> None:
        """Of a tokenizer.

        Args:
            model: it, with its added tokens.
        """
        table = model.tokenizer.table
        self._model = model
        self._pieces = table.pieces()
        self._ids = {**{one.encode(): token for token, one in model.tokenizer.added.items()}, **table.by_bytes()}
        ordinary = [self._pieces[token] for token in np.flatnonzero(~table.byte_fallback).tolist()]
        seen, self.doubled = set[bytes](), set[bytes]()
        for piece in ordinary:
            (self.doubled if piece in seen else seen).add(piece)
        self.doubled.discard(b"")

    def entry(self, token: Key) -> int | None:
        """The id of a token of a list; None where its bytes are those of no token, or of several: its mass is REST."""
        if isinstance(token, int):
            return token
        return None if token in self.doubled else self._ids.get(token)

    def answer(self, rows: Sequence[TraceRow]) -> list[int]:
        """Ids of the tokens of an answer. Parts of a character, which have no bytes, are found from the character.

        Raises:
            Refused: bytes are those of no token or of several, or the parts of a character are not certain.
        """
        ids: list[int] = []
        at = 0
        while at < len(rows):
            end = at
            while end < len(rows) and rows[end].token == b"":
                end += 1
            if end == len(rows):
                break  # cut within a character
            ids += [self._one(rows[at].token)] if end == at else self._parts(rows[end].token, end + 1 - at)
            at = end + 1
        return ids

    def _one(self, token: Key) -> int:
        if isinstance(token, int):
            return token
        if token in self.doubled:
            raise Refused("bytes of several tokens", f"{shown(token)} are those of more than one token", _TELL)
        if token not in self._ids:
            name = self._model.tokenizer.table.info.name
            raise Refused(
                "bytes of no token", f"{shown(token)} are those of no token of {name}", "name the model's own tokenizer"
            )
        return self._ids[token]

    def _parts(self, character: Key, count: int) -> list[int]:
        """The tokens of a character that the server shows at the last of them."""
        text = character if isinstance(character, bytes) else b""
        try:
            found: list[int] = self._model.tokenizer.encode(text.decode(), "text").ids.tolist()
        except (UnicodeDecodeError, CannotTokenize):
            found = []
        if len(found) != count:
            what = f"the server shows {count} tokens as {shown(text)}, for which the tokenizer has {len(found)}"
            raise Refused("parts of a character are not certain", what, _TELL)
        return found

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens, those of control tokens left out."""
        return b"".join(self._pieces[token] for token in ids if token < len(self._pieces))
