"""tokenizer.json -> TokenTable: the bytes of every token, by the rules of the tokenizer's own decoder.

Two families are known. Byte-level: tokens are spelt in the GPT-2 byte alphabet. Metaspace with byte
fallback: U+2581 stands for a space and ``<0xHH>`` for a byte. In both, added tokens are literal text
and special tokens have no bytes.
"""

import json
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.tokens.rejoin import METASPACE
from xtoken.pipeline.tokens.roles import SideFiles, assign_roles, declared_tokens
from xtoken.pipeline.tokens.spec import Spec, components
from xtoken.pipeline.tokens.table import TokenTable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def text_normalizer(spec: Spec) -> tuple[str | None, tuple[bool, bool]]:
    """JSON of the part of the normaliser that changes text wherever it stands, or None; and which ends it strips.

    Prepended and replaced metaspaces and the byte alphabet are notation: the table undoes them.
    """
    parts = list(components(spec.normalizer))
    kept = [
        part
        for part in parts
        if part["type"] not in ("Prepend", "ByteLevel", "Strip")
        and not (part["type"] == "Replace" and part.get("pattern") == {"String": " "} and part["content"] == METASPACE)
    ]
    strips = [part for part in parts if part["type"] == "Strip"]
    left, right = (any(part.get(f"strip_{side}") for part in strips) for side in ("left", "right"))
    return json.dumps({"type": "Sequence", "normalizers": kept}) if kept else None, (left, right)


def build_table(
    spec: Spec, side: SideFiles, name: str, *, bos: int | None, in_text: frozenset[str] = frozenset()
) -> TokenTable:
    """The token table.

    Args:
        spec: from ``read_spec``.
        side: the files beside tokenizer.json.
        name: for people.
        bos: the id that the post-processor puts in front of a text, or None.
        in_text: declared tokens that text can produce; they stay text.
    """
    names = spec.names
    roles = _roles(spec, side, in_text)
    size = max(names) + 1
    role = [roles.get(token_id) if token_id in names else "hole" for token_id in range(size)]
    return TokenTable.build(
        [b"" if role[token_id] else _bytes(names[token_id], spec) for token_id in range(size)],
        role,
        [_is_byte_token(names.get(token_id, ""), spec) for token_id in range(size)],
        _merge_ids(spec),
        name=name,
        kind=spec.kind,
        adds_bos=bos is not None,
        bos_id=bos if bos is not None else _bos_id(spec, side, roles),
    )


def _roles(spec: Spec, side: SideFiles, in_text: frozenset[str]) -> dict[int, str]:
    specials = {token: spec.vocab[token] for token in special_tokens(spec, side)}
    others = {token: token_id for token, token_id in spec.vocab.items() if token not in in_text}
    return assign_roles(declared_tokens(side, spec.names), spec.unk_token, specials, others)


def _bos_id(spec: Spec, side: SideFiles, roles: Mapping[int, str]) -> int | None:
    """BOS by role, or the declared BOS that has another role too (it is EOS as well)."""
    by_role = next((token_id for token_id, role in roles.items() if role == "bos"), None)
    token = declared_tokens(side, spec.names).get("bos")
    declared = spec.vocab.get(token) if token else None
    return declared if by_role is None and declared in roles else by_role


def special_tokens(spec: Spec, side: SideFiles) -> list[str]:
    """Added tokens marked special or declared to have a role, in id order."""
    declared = set(declared_tokens(side, spec.names).values())
    marked = (token for token, special in spec.added.items() if special or token in declared)
    return sorted(marked, key=spec.vocab.__getitem__)


def control_names(spec: Spec, side: SideFiles) -> list[str]:
    """Declared tokens that look like control tokens, and the unknown one, whether they are added tokens or not."""
    declared = [
        token for token in declared_tokens(side, spec.names).values() if token and token[0] in "<[" and token[1:]
    ]
    return [*declared, *filter(None, [spec.unk_token])]


def role_candidates(spec: Spec, side: SideFiles) -> list[str]:
    """Tokens said to have a role that are not added tokens, so that text may produce them."""
    declared = {*declared_tokens(side, spec.names).values(), spec.unk_token}
    return sorted(token for token in declared if token and token in spec.vocab and token not in spec.added)


def _is_byte_token(token: str, spec: Spec) -> bool:
    return spec.kind == "metaspace" and token not in spec.added and _BYTE_TOKEN.fullmatch(token) is not None


def _bytes(token: str, spec: Spec) -> bytes:
    if _is_byte_token(token, spec):
        return bytes([int(token[3:5], 16)])
    if spec.kind == "metaspace":
        return token.replace(METASPACE, " ").encode()
    if token in spec.added:
        return token.encode()
    # As the ByteLevel decoder does: a token with a character outside the alphabet is literal.
    values = [_ALPHABET.get(character) for character in token]
    return token.encode() if None in values else bytes(byte for byte in values if byte is not None)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the GPT-2 alphabet: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _merge_ids(spec: Spec) -> NDArray[np.int32]:
    vocab = spec.model_vocab
    pairs = [
        (vocab[left], vocab[right])
        for left, right in spec.merges
        if left in vocab and right in vocab and left + right in vocab
    ]
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
