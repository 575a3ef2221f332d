"""Tokens as text and as categories of text, from what targets store."""

from collections.abc import Callable

import pytest

from xtoken.schemas.categories import CATEGORIES
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate.spelling import Spelling, token_bytes


def test_text_joins_bytes_before_it_decodes() -> None:
    euro = "€".encode()
    spelling = Spelling((b"", euro[:1], euro[1:], b" a", b""), ("bos", None, None, None, "eos"))
    assert spelling.text([0, 1, 2, 3, 4]) == "<bos>€ a<eos>"
    assert spelling.text([1, 3]) == "� a"
    assert spelling.ids("eos", "bos") == [0, 4]


def test_categories_of_every_kind() -> None:
    spelling = Spelling((b"7", b"42", b"2024"[:3], b" to", b"\xff", b"", b""), (None,) * 5 + ("eos", "hole"))
    names = [*CATEGORIES, "hole"]
    found = [names[i] for i in spelling.categories()]
    assert found == ["numerals_1", "numerals_2", "numerals_3", "latin", "partial_utf8", "specials", "hole"]


def test_token_bytes_of_targets(make_targets: Callable[..., str]) -> None:
    spelling = token_bytes(Targets(make_targets([[5, 5]])))
    assert spelling.role_V[:3] == ("bos", "eos", None)
    assert spelling.bytes_V[2:5] == (b"a", b" b", b"c")
    assert len(spelling.categories()) == len(spelling.bytes_V) == 24


def test_a_changed_vocabulary_is_refused(make_targets: Callable[..., str]) -> None:
    from pathlib import Path

    from xtoken.schemas.errors import VerificationError

    root = make_targets([[5, 5]])
    path = Path(root) / "student_vocab.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(VerificationError, match="sha256"):
        token_bytes(Targets(root))
