"""What the rest of the pipeline knows of a tokenizer: text in, ids and byte ends out.

Shapes: T tokens of one text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.tokens.table import TokenTable


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenized text.

    A token may be zero bytes wide: EOS, or a first token that held nothing but the dummy space some
    tokenizers prepend. It carries the end of the token before it (0 at the start), so ``ends`` never
    decreases but need not increase strictly.

    Attributes:
        text: the text that ``ends`` refers to; the normalised one where the tokenizer normalises.
        ids: int32 [T].
        ends: int32 [T], byte of ``text.encode()`` at which each token ends; the last is its length.
        snapped: the tokens do not rejoin the text; ends that are not known were moved up to the next that is.
    """

    text: str
    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    snapped: bool


class TextTokenizer(Protocol):
    """A tokenizer whose tokens are bytes of the text. It never adds BOS.

    Attributes:
        table: what its tokens mean.
        prefix: ids that it puts in front of a text for a model: none, BOS, or several.
        cuts_at_spaces: a text cut before a space that follows no whitespace, where a token ends, has the tokens it had.
        controls: id -> how its files spell it, of all control tokens; in a text, that is text.
        whole_words: a word that is a token is that token, whether merges lead to it or not.
    """

    table: TokenTable
    prefix: tuple[int, ...]
    cuts_at_spaces: bool
    controls: Mapping[int, str]
    whole_words: bool

    def normalise(self, text: str) -> str:
        """The text as this tokenizer sees it where that is stable under repetition, else ``text`` itself."""
        ...

    def encode(self, text: str, *, complete: bool, keep_text: bool = False) -> Encoded:
        """Tokenize; text that looks like a special token is text.

        Args:
            text: Unicode text without lone surrogates.
            complete: the text ends where its document ends: EOS follows, where the tokenizer has one.
            keep_text: refer ``ends`` to ``text`` itself, never to a normalised form of it (for a second
                tokenizer, whose ends must be comparable with the first one's); what changed is snapped.

        Raises:
            XtokenError: the tokens and the text have nothing in common.
        """
        ...

    def encode_batch(
        self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
    ) -> list[Encoded]:
        """``encode`` of every text, in order, with the tokenizer's own parallelism."""
        ...

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text alone: no EOS, no ends, nothing checked."""
        ...
