"""TokenTable: token id -> bytes, and what else W and alignment must know of a tokenizer.

Shapes: V tokens, M merges.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.tables import MERGES, VOCAB
from xtoken.schemas.word_starts import SpaceSet, word_starts

Kind = Literal["byte-level", "metaspace", "bytes"]
_SPACE = 0x20


@dataclass(frozen=True, eq=False)
class TokenTable:
    """What every token of one tokenizer means in bytes.

    Attributes:
        data: uint8, all token bytes, concatenated in id order.
        offsets: int64 [V + 1]; the bytes of id t are ``data[offsets[t]:offsets[t + 1]]``.
        role: [V] bos, eos, eot, pad, unk, special or hole; None = text. Only text tokens have bytes.
        byte_fallback: bool [V], the token is a ``<0xHH>`` byte token.
        merges: int32 [M, 2], BPE merges as (left id, right id) in rank order; [0, 2] without merges.
        info: name, kind and hash; two tables with the same hash are the same tokenizer.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    role: tuple[str | None, ...]
    byte_fallback: NDArray[np.bool_]
    merges: NDArray[np.int32]
    info: TokenizerInfo

    @classmethod
    def build(
        cls,
        pieces: Sequence[bytes],
        role: Sequence[str | None],
        byte_fallback: Sequence[bool],
        merges: NDArray[np.int32],
        *,
        name: str,
        kind: Kind,
        adds_bos: bool = False,
        bos_id: int | None = None,
    ) -> "TokenTable":
        """Table of these tokens; ``bos_id`` may name a token of another role (BOS that is also EOS)."""
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        fallback = np.array(byte_fallback, dtype=np.bool_)
        roles = tuple(role)
        info = TokenizerInfo(
            name=name,
            hash=_hash(data, offsets, roles, fallback, merges),
            kind=kind,
            size=len(pieces),
            adds_bos=adds_bos,
            bos_id=bos_id,
            eos_id=_first(roles, "eos"),
        )
        return cls(data, offsets, roles, fallback, merges, info)

    @property
    def size(self) -> int:
        """V: ids run from 0 to V - 1, holes included."""
        return len(self.role)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [V], bytes per token."""
        return np.diff(self.offsets).astype(np.int32)

    def token(self, token_id: int) -> bytes:
        """Bytes of one token; empty for specials and holes."""
        return self.data[self.offsets[token_id] : self.offsets[token_id + 1]].tobytes()

    def pieces(self) -> list[bytes]:
        """Bytes of every token, in id order."""
        data, offsets = self.data.tobytes(), self.offsets.tolist()
        return [data[start:end] for start, end in pairwise(offsets)]

    def id_of(self, role: str) -> int | None:
        """Lowest id with this role, or None."""
        return _first(self.role, role)

    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> id. An ordinary token wins over ``<0xHH>``, then the lower id; empty tokens are left out."""
        id_of_bytes: dict[bytes, int] = {}
        pieces = self.pieces()
        for fallback in (False, True):
            for token_id in np.flatnonzero(self.byte_fallback == fallback).tolist():
                if pieces[token_id]:
                    id_of_bytes.setdefault(pieces[token_id], token_id)
        return id_of_bytes

    def starts_with_space(self) -> NDArray[np.bool_]:
        """bool [V]: the token's first byte is a space."""
        starts = np.zeros(self.size, dtype=np.bool_)
        filled = self.lengths > 0
        starts[filled] = self.data[self.offsets[:-1][filled]] == _SPACE
        return starts

    def word_starts(self, which: SpaceSet) -> NDArray[np.bool_]:
        """bool [V]: the token begins a word, as ``xtoken.schemas.word_starts`` says."""
        return word_starts(self.pieces(), self.role, which)

    @cached_property
    def _spells_something(self) -> NDArray[np.bool_]:
        """bool [V]: the token has bytes, and is not a lone blank, which may be a dummy space."""
        splits: NDArray[np.bool_] = (self.lengths > 1) | ((self.lengths == 1) & ~self.starts_with_space())
        return splits

    def moved_ends(
        self, ids_T: NDArray[np.int32], end_T: NDArray[np.int32], start_N: NDArray[np.int64] | None = None
    ) -> int:
        """Tokens of a text whose own end is not known: they have bytes, and end where the token before them does.

        Args:
            ids_T, end_T: of the text, or of several, one after the other.
            start_N: where the tokens of each of several texts start, of those that have any.
        """
        width_T = np.diff(end_T, prepend=np.int32(0))
        if start_N is not None:
            width_T[start_N] = end_T[start_N]
        return int(((width_T == 0) & self._spells_something[ids_T]).sum())

    def to_tables(self) -> tuple[pa.Table, pa.Table]:
        """The VOCAB and MERGES tables of ``xtoken.schemas.tables``."""
        vocab = pa.table(
            {
                "token_id": np.arange(self.size, dtype=np.int32),
                "bytes": pa.array(self.pieces(), pa.binary()),
                "role": pa.array(self.role, pa.string()),
                "byte_fallback": self.byte_fallback,
            },
            schema=VOCAB,
        )
        merges = pa.table({"left": self.merges[:, 0], "right": self.merges[:, 1]}, schema=MERGES)
        return vocab, merges

    @classmethod
    def from_tables(cls, vocab: pa.Table, merges: pa.Table, info: TokenizerInfo) -> "TokenTable":
        """Inverse of ``to_tables``.

        Raises:
            VerificationError: the tables are not those that ``info.hash`` was made of.
        """
        _refuse_foreign(vocab, merges, info)
        rows = vocab.sort_by("token_id")
        pairs = np.stack([merges["left"].to_numpy(), merges["right"].to_numpy()], axis=1).astype(np.int32)
        table = cls.build(
            rows["bytes"].to_pylist(),
            rows["role"].to_pylist(),
            rows["byte_fallback"].to_pylist(),
            pairs,
            name=info.name,
            kind=info.kind,
        )
        if table.info.hash != info.hash or rows["token_id"].to_pylist() != list(range(table.size)):
            raise VerificationError(
                f"the vocabulary table of {info.name!r} hashes to {table.info.hash[:12]}, its manifest says "
                f"{info.hash[:12]}; the file was changed or damaged: fetch or build the artifact again"
            )
        return cls(table.data, table.offsets, table.role, table.byte_fallback, table.merges, info)


def _refuse_foreign(vocab: pa.Table, merges: pa.Table, info: TokenizerInfo) -> None:
    """Raise VerificationError for tables of other columns, of another size, or with merges of tokens that are none."""
    for table, schema in ((vocab, VOCAB), (merges, MERGES)):
        fields = [table.schema.field(i) for i in map(table.schema.get_field_index, schema.names) if i >= 0]
        if fields != list(schema):
            raise VerificationError(
                f"the vocabulary tables of {info.name[:100]!r} have columns {table.schema.names[:20]}, not those of "
                "the format; fetch or build the artifact again"
            )
    size = len(vocab)
    for name in MERGES.names:
        ids = merges[name].to_numpy()
        if size != info.size or (len(ids) and (ids.min() < 0 or ids.max() >= size)):
            raise VerificationError(
                f"the vocabulary of {info.name[:100]!r} has {size} tokens, its manifest says {info.size}, and merges "
                f"must join ids below that; fetch or build the artifact again"
            )


def _first(roles: Sequence[str | None], role: str) -> int | None:
    return roles.index(role) if role in roles else None


def _hash(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    role: Iterable[str | None],
    byte_fallback: NDArray[np.bool_],
    merges: NDArray[np.int32],
) -> str:
    """sha256 over the parts, each preceded by its length so that none can run into the next."""
    parts = (
        data.tobytes(),
        offsets.astype("<i8").tobytes(),
        ",".join(name or "" for name in role).encode(),
        byte_fallback.astype(np.uint8).tobytes(),
        merges.astype("<i4").tobytes(),
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
