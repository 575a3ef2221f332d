"""What the student's tokens stand for: their bytes, and the category of text that each is.

Shapes: V student vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.categories import CATEGORIES, category
from xtoken.trainer.data.targets import VOCAB_FILE, Targets


@dataclass(frozen=True)
class Spelling:
    """A tokenizer's tokens.

    Attributes:
        bytes_V: what each token stands for; nothing for specials and holes.
        role_V: None = text, else as in ``xtoken.schemas.tables.VOCAB``.
    """

    bytes_V: tuple[bytes, ...]
    role_V: tuple[str | None, ...]

    def text(self, ids: Iterable[int]) -> str:
        """Tokens as text: specials by their role, bytes that are not UTF-8 as U+FFFD."""
        pieces = [self.bytes_V[i] if self.role_V[i] is None else f"<{self.role_V[i]}>".encode() for i in ids]
        return b"".join(pieces).decode(errors="replace")

    def ids(self, *roles: str) -> list[int]:
        """Tokens of these roles."""
        return [i for i, role in enumerate(self.role_V) if role in roles]

    def categories(self) -> NDArray[np.int64]:
        """int64 [V]: index into ``CATEGORIES``; ``len(CATEGORIES)`` for a hole."""
        number = {name: i for i, name in enumerate(CATEGORIES)}
        named = (category(data, role) for data, role in zip(self.bytes_V, self.role_V, strict=True))
        return np.array([len(CATEGORIES) if name is None else number[name] for name in named], np.int64)


def token_bytes(targets: Targets) -> Spelling:
    """The student's tokens as the targets store them.

    Raises:
        VerificationError: the vocabulary is missing or not the one the manifest names.
    """
    table = targets._side_table(VOCAB_FILE)
    return Spelling(tuple(table.column("bytes").to_pylist()), tuple(table.column("role").to_pylist()))
