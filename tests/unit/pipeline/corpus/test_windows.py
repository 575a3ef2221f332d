"""Windows: they fit, they join to the document, and they are cut where they should be."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.corpus import Document, Window, windows
from pipeline.tokens import TextTokenizer, load_tokenizer
from schemas.errors import XtokenError

PROSE = "It was the best of times, it was the worst of times; 1859 and l’été.\r\n\r\n    Καὶ 中文没有空格 👩‍👩‍👧‍👦 "


@cache
def _load(source: str) -> TextTokenizer:
    return load_tokenizer(source)


@pytest.fixture(params=["bytes", "llama2", "smollm2", "gemma3"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path]) -> TextTokenizer:
    return _load("bytes" if request.param == "bytes" else str(tokenizer_file(request.param)))


def cut(text: str, tokenizer: TextTokenizer, max_tokens: int) -> list[Window]:
    """Windows of ``text``, checked for everything that holds of all windows."""
    found = list(windows(Document("doc", text, 0, 0), tokenizer, max_tokens))
    assert "".join(window.encoded.text for window in found) == text
    assert [window.sample_id for window in found] == [f"doc#{n}" for n in range(len(found))]
    assert [window.complete for window in found] == [False] * (len(found) - 1) + [True]
    for window in found:
        assert 0 < len(window.encoded.ids) <= max_tokens
        alone = tokenizer.encode(window.encoded.text, complete=window.complete)
        assert alone.ids.tolist() == window.encoded.ids.tolist()
        assert alone.ends.tolist() == window.encoded.ends.tolist()
    return found


@pytest.mark.parametrize("max_tokens", [8, 33, 512, 100_000])
def test_windows_join_to_the_document(tokenizer: TextTokenizer, max_tokens: int) -> None:
    found = cut(PROSE * 30, tokenizer, max_tokens)
    eos = tokenizer.table.id_of("eos")
    assert eos is None or [window.encoded.ids[-1] == eos for window in found] == [w.complete for w in found]


def test_cuts_are_before_whitespace(tokenizer: TextTokenizer) -> None:
    found = cut("some words  and\n\n other words. " * 100, tokenizer, 32)
    assert len(found) > 10
    for window in found[1:]:
        assert window.encoded.text[0].isspace()
    for window in found[:-1]:
        assert not window.encoded.text[-1].isspace()


def test_windows_are_nearly_full(tokenizer: TextTokenizer) -> None:
    """A cut moves back by no more than a word."""
    found = cut("a cat sat on a mat. " * 500, tokenizer, 64)
    assert min(len(window.encoded.ids) for window in found[:-1]) >= 64 - 6


def test_long_runs_are_cut_between_characters(tokenizer: TextTokenizer) -> None:
    found = cut("中文没有空格" * 60 + " " * 700 + "x" * 300 + "👩‍👩‍👧‍👦" * 40, tokenizer, 16)
    assert len(found) > 10


def test_slabs_leave_no_trace(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long documents are looked at piece by piece; where the pieces end must not show."""
    text = "some words  and\n\n other words, then more of the same. " * 60
    whole = [window.encoded.text for window in cut(text, tokenizer, 24)]
    monkeypatch.setattr(import_module("pipeline.corpus.windows"), "_SLAB", 500)
    sliced = [window.encoded.text for window in cut(text, tokenizer, 24)]
    assert all(piece[0].isspace() for piece in sliced[1:])
    assert abs(len(whole) - len(sliced)) <= 2


def test_a_full_last_window_leaves_room_for_eos(tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = _load(str(tokenizer_file("smollm2")))
    text = " one two three four five six seven eight"
    assert len(tokenizer.encode(text, complete=False).ids) == 8
    assert [window.encoded.text for window in cut(text, tokenizer, 8)] == [text[:-6], " eight"]
    assert len(cut(text, tokenizer, 9)) == 1


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.one_of(st.sampled_from([" ", "\n", "a", "é", "👩‍👩‍👧"]), st.text(max_size=20)), min_size=1)
    .map("".join)
    .filter(bool),
    max_tokens=st.integers(8, 20),
)
def test_any_document_in_bytes(text: str, max_tokens: int) -> None:
    cut(text, _load("bytes"), max_tokens)


def lowercase(folder: Path) -> TextTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def test_windows_of_a_normalising_tokenizer_join_to_what_it_sees(tmp_path: Path) -> None:
    found = list(windows(Document("d", "Große Wörter UND İ " * 20, 0, 0), lowercase(tmp_path), 16))
    assert "".join(window.encoded.text for window in found) == "große wörter und i̇ " * 20
    assert not any(window.encoded.snapped for window in found)


def test_an_error_names_the_document() -> None:
    class Broken:
        table = _load("bytes").table

        def normalise(self, text: str) -> str:
            raise XtokenError(f"its tokens do not rejoin {text!r}")

    with pytest.raises(XtokenError, match=r"^document 'd7': its tokens do not rejoin"):
        list(windows(Document("d7", "x", 0, 0), Broken(), 8))  # type: ignore[arg-type]
