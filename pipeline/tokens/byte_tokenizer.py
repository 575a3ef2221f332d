"""The tokenizer of byte-level students: 256 ids, id = byte, no special tokens."""

from collections.abc import Mapping, Sequence

import numpy as np

from xtoken.pipeline.tokens.interface import Encoded
from xtoken.pipeline.tokens.table import TokenTable


class ByteTokenizer:
    """A ``TextTokenizer`` whose tokens are the bytes themselves."""

    prefix: tuple[int, ...] = ()
    cuts_at_spaces = True
    whole_words = False

    def __init__(self) -> None:
        """Build the table of 256 tokens."""
        self.controls: Mapping[int, str] = {}
        self.table = TokenTable.build(
            [bytes([byte]) for byte in range(256)],
            [None] * 256,
            [False] * 256,
            np.zeros((0, 2), dtype=np.int32),
            name="bytes",
            kind="bytes",
        )

    def normalise(self, text: str) -> str:
        """Bytes are taken as they are."""
        return text

    def encode(self, text: str, *, complete: bool, keep_text: bool = False) -> Encoded:  # noqa: ARG002
        """See ``TextTokenizer.encode``; there is no EOS to add and nothing to normalise."""
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        return Encoded(text, data.astype(np.int32), np.arange(1, len(data) + 1, dtype=np.int32), snapped=False)

    def encode_batch(
        self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
    ) -> list[Encoded]:
        """See ``TextTokenizer.encode_batch``."""
        return [
            self.encode(text, complete=complete, keep_text=keep_text)
            for text, complete in zip(texts, completes, strict=True)
        ]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """See ``TextTokenizer.token_ids``."""
        return [list(text.encode()) for text in texts]
