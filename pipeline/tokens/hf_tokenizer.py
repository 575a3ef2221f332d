"""Tokenizers of tokenizer.json files, run by the ``tokenizers`` library.

``Encoding.offsets`` are not used: they count characters and repeat a character split over several
tokens. Ends are sums of token bytes, and every text is checked to be what the tokens rejoin to.

Shapes: T tokens of one text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.tokens.added import Added, place, stretch_ends
from xtoken.pipeline.tokens.failures import CannotTokenize, named_failures
from xtoken.pipeline.tokens.interface import Encoded
from xtoken.pipeline.tokens.rejoin import METASPACE, Block, blocks, differing_block, dummy_space, map_ends, stripped
from xtoken.pipeline.tokens.table import TokenTable

# Several scripts, code, joined emoji, combining marks, numbers, line ends, look-alikes of special tokens.
CANARY = (
    "The 3 quick foxes,  and  12345.67e-8:\r\n\tdef f(x): return {'a': x[0]}  # ok\n\n    "
    "Größe, año, Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย, 中文和日本語テスト, 한국어 "
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00e9 <s> </s> <|endoftext|> <bos> [PAD] \u00a0\u3000\u200d ☃ \U0001d54f \x00\x7f"
)


class HfTokenizer:
    """A ``TextTokenizer`` over a ``tokenizers.Tokenizer`` (special tokens off, no truncation, no padding)."""

    def __init__(
        self,
        backend: Any,
        table: TokenTable,
        normalizer: Any | None,
        strips: tuple[bool, bool],
        added: Mapping[int, Added],
        *,
        controls: Mapping[int, str],
        prefix: tuple[int, ...] = (),
        cuts_at_spaces: bool = False,
    ) -> None:
        """Take over ``backend``.

        Args:
            backend: a ``tokenizers.Tokenizer`` that treats special tokens as text.
            table: its token bytes.
            normalizer: the part of its normaliser that changes text wherever it stands (``normalize_str``), or None.
            strips: whether the normaliser takes the blanks at the left and at the right end of a text.
            added: its added tokens, which may eat or bring blanks.
            controls, prefix, cuts_at_spaces: see ``TextTokenizer``.
        """
        self.table = table
        self.prefix = prefix
        self.cuts_at_spaces = cuts_at_spaces
        self.controls = controls
        self.whole_words = bool(getattr(backend.model, "ignore_merges", False))
        self._backend = backend
        self._normalizer = normalizer
        self._strips = strips
        # blanks that the model joins to itself (Gemma's runs) are no cuts
        self._added = {token: one for token, one in added.items() if METASPACE not in one.content}
        self._pieces = table.pieces()
        self._lengths = table.lengths
        self._missing = _missing_bytes(table)

    def normalise(self, text: str) -> str:
        """The tokenizer's own normalisation where repeating it changes nothing, else ``text`` itself."""
        once = self._normal(text)
        return once if once == text or self._normal(once) == once else text

    def encode(self, text: str, *, complete: bool, keep_text: bool = False) -> Encoded:
        """See ``TextTokenizer.encode``."""
        return self.encode_batch([text], [complete], keep_text=keep_text)[0]

    def encode_batch(
        self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
    ) -> list[Encoded]:
        """See ``TextTokenizer.encode_batch``."""
        return [
            self._finish(self._place(text, ids, keep_text=keep_text), complete)
            for text, ids, complete in zip(texts, self.token_ids(texts), completes, strict=True)
        ]

    @property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer``."""
        return self._backend

    def placed(self, text: str, ids: Sequence[int]) -> Encoded:
        """The ends of tokens that ``backend`` gave for this text, referring to ``text`` itself.

        Raises:
            CannotTokenize: as ``encode``.
        """
        return self._finish(self._place(text, list(ids), keep_text=True), False)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``TextTokenizer.token_ids``."""
        with named_failures(f"tokenizer {self.table.info.name!r} fails on a text", "use another tokenizer"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def check(self) -> None:
        """Encode the canary.

        Raises:
            XtokenError: its tokens do not rejoin and the tokenizer's normaliser does not explain why.
        """
        ids = self._ids(CANARY)
        joined = self._joined(ids)
        if dummy_space(joined, self._spelt(CANARY)) is None and self._placed(CANARY, ids) is None:
            raise self._mismatch(joined, CANARY, ids)

    def _normal(self, text: str) -> str:
        if self._normalizer is None:
            return text
        normal = str(self._normalizer.normalize_str(text))
        return normal if METASPACE in text else normal.replace(METASPACE, " ")

    def _seen(self, text: str) -> bytes:
        """What the tokens of ``text`` should rejoin to, the blanks at its ends included."""
        return self._spelt(self._normal(text)).translate(None, delete=self._missing)

    def _spelt(self, text: str) -> bytes:
        """UTF-8, but a literal metaspace and a space are the same token: match either."""
        return (text.replace(METASPACE, " ") if self.table.info.kind == "metaspace" else text).encode()

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._pieces.__getitem__, ids))

    def _place(self, text: str, ids: list[int], *, keep_text: bool) -> Encoded:
        joined, spelt = self._joined(ids), self._spelt(text)
        space = dummy_space(joined, spelt)
        if space is not None:
            mapping = blocks(text, self._spelt) if spelt != text.encode() else None
            return self._encoded(text, ids, space, mapping, snapped=False)
        normal = text if keep_text else self.normalise(text)
        if normal != text:
            return self._place(normal, self._ids(normal), keep_text=True)
        return self._snap(text, ids, joined)

    def _snap(self, text: str, ids: list[int], joined: bytes) -> Encoded:
        """Tokens that do not rejoin the text: ends as exact as can be told, all others at the end of what changed."""
        ends = self._placed(text, ids)
        if ends is not None:
            return Encoded(text, np.array(ids, dtype=np.int32), ends, snapped=True)
        space = int(joined[:1] == b" " and not text.startswith(" "))
        differing = differing_block(joined[space:], text.encode())
        if not differing[0].text and not differing[-1].text:
            raise self._mismatch(joined, text, ids)
        return self._encoded(text, ids, space, differing, snapped=True)

    def _placed(self, text: str, ids: Sequence[int]) -> NDArray[np.int32] | None:
        return place(text, ids, self._added, self._stretch)

    def _stretch(self, text: str, ids: Sequence[int]) -> NDArray[np.int32] | None:
        """Ends of the tokens of a text without added ones, see ``place``."""
        raw = text.encode()
        seen, mapping = self._seen(text), None
        if any(self._strips):
            mapping = stripped(blocks(text, self._seen), *self._strips)
            seen = b"".join(block.seen for block in mapping)
        if not len(ids):
            return None if seen else np.zeros(0, np.int32)
        ends = stretch_ends([self._pieces[token] for token in ids], seen)
        if ends is None or seen == raw:
            return ends
        return map_ends(ends, mapping or blocks(text, self._seen))

    def _encoded(
        self, text: str, tokens: list[int], space: int, mapping: list[Block] | None, *, snapped: bool
    ) -> Encoded:
        """Tokens with their byte ends; a dummy space (0 or 1 bytes) is taken off the first token."""
        ids = np.array(tokens, dtype=np.int32)
        ends = np.cumsum(self._lengths[ids], dtype=np.int32) - np.int32(space)
        return Encoded(text, ids, ends if mapping is None else map_ends(ends, mapping), snapped)

    def _ids(self, text: str) -> list[int]:
        with named_failures(f"tokenizer {self.table.info.name!r} fails on a text", "use another tokenizer"):
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _finish(self, encoded: Encoded, complete: bool) -> Encoded:
        ends, size = encoded.ends, len(encoded.text.encode())
        assert not len(ends) or (int(ends[-1]) == size and ends[0] >= 0 and bool((np.diff(ends) >= 0).all()))
        eos = self.table.info.eos_id
        if not complete or eos is None:
            return encoded
        ids = np.append(encoded.ids, np.int32(eos))
        return Encoded(encoded.text, ids, np.append(ends, np.int32(size)), encoded.snapped)

    def _mismatch(self, joined: bytes, text: str, ids: Sequence[int]) -> CannotTokenize:
        raw, name = text.encode(), self.table.info.name
        unk = self.table.id_of("unk")
        if unk is not None and unk in ids and (lacking := _lacking_bytes(self.table, raw)):
            named = ", ".join(f"<0x{byte:02X}>" for byte in lacking[:8]) + (", ..." if len(lacking) > 8 else "")
            return CannotTokenize(
                f"tokenizer {name!r}: its vocabulary has no token for the byte {named} of the text that starts "
                f"{text[:40]!r}, which it makes its unknown token; byte fallback needs all of <0x00> to <0xFF>. Use "
                "the tokenizer.json that belongs to the model",
                rule="the vocabulary has no token for a byte of the text",
            )
        at = next((i for i, (a, b) in enumerate(zip(joined, raw, strict=False)) if a != b), min(len(joined), len(raw)))
        return CannotTokenize(
            f"tokenizer {name!r}: its tokens do not rejoin the text that starts {text[:40]!r}; at "
            f"byte {at} the tokens have {joined[at : at + 20]!r} and the text {raw[at : at + 20]!r}. A tokenizer that "
            "drops or rewrites text has no byte ends: use the tokenizer.json that belongs to the model, or another one",
            rule="the tokens do not rejoin the text",
        )


def _lacking_bytes(table: TokenTable, data: bytes) -> list[int]:
    """Bytes of ``data`` beyond ASCII, or ASCII ones, that no token spells alone."""
    known = table.by_bytes()
    return [byte for byte in sorted(set(data)) if bytes([byte]) not in known]


def _missing_bytes(table: TokenTable) -> bytes:
    """Bytes without a token of their own: byte-level BPE drops them from the text (SmolLM2 lacks 21)."""
    if table.info.kind != "byte-level":
        return b""
    known = table.by_bytes()
    return bytes(byte for byte in range(256) if bytes([byte]) not in known)
