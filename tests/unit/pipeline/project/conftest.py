"""Token tables of real tokenizers, loaded once, and toy ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from xtoken.pipeline.tokens import TokenTable, load_tokenizer


@pytest.fixture(scope="session")
def table(tokenizer_file: Callable[[str], Path]) -> Callable[[str], TokenTable]:
    """``table(name)``: the table of a real tokenizer, or of raw bytes."""
    loaded: dict[str, TokenTable] = {}

    def find(name: str) -> TokenTable:
        if name not in loaded:
            loaded[name] = load_tokenizer(name if name == "bytes" else str(tokenizer_file(name))).table
        return loaded[name]

    return find


@pytest.fixture(scope="session")
def toy() -> Callable[..., TokenTable]:
    """``toy(pieces, name="toy", specials=())``: text tokens, then specials by role, without merges."""
    return _toy


def _toy(pieces: Sequence[bytes], name: str = "toy", specials: Sequence[str] = ()) -> TokenTable:
    count = len(pieces) + len(specials)
    return TokenTable.build(
        [*pieces, *[b""] * len(specials)],
        [*[None] * len(pieces), *specials],
        [False] * count,
        np.zeros((0, 2), np.int32),
        name=name,
        kind="byte-level",
    )
