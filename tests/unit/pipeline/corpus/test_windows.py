"""Windows: they fit, they join to the document, and they are cut where they should be."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from xtoken.pipeline.corpus import Document, Window, all_windows, windows
from xtoken.pipeline.tokens import Encoded, TextTokenizer, load_tokenizer
from xtoken.schemas.errors import XtokenError

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
    monkeypatch.setattr(import_module("xtoken.pipeline.corpus.windows"), "_SLAB", 500)
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


def same(left: list[Window], right: list[Window]) -> bool:
    """Whether two lists of windows hold the same, bit by bit."""

    def said(window: Window) -> tuple[object, ...]:
        one = window.encoded
        return window.sample_id, window.complete, one.text, one.snapped, one.ids.tobytes(), one.ends.tobytes()

    return [said(window) for window in left] == [said(window) for window in right]


@pytest.mark.parametrize("max_tokens", [8, 24, 400])
@pytest.mark.parametrize("slab", [300, 1 << 17])
def test_all_windows_are_the_windows_of_each_document(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, max_tokens: int, slab: int
) -> None:
    """Whatever of a document fits a window or a slab, and wherever batches end."""
    module = import_module("xtoken.pipeline.corpus.windows")
    monkeypatch.setattr(module, "_SLAB", slab)
    monkeypatch.setattr(module, "_BATCH", 700)
    texts = [PROSE * count for count in (1, 2, 9)] + ["short", "\n", "x" * 900, " " * 500, PROSE[:40]]
    documents = [Document(f"d{number}", text, 0, number) for number, text in enumerate(texts)]
    expected = [window for document in documents for window in windows(document, tokenizer, max_tokens)]
    assert same(all_windows(documents, tokenizer, max_tokens), expected)


def test_a_window_that_is_exactly_full(tokenizer_file: Callable[[str], Path]) -> None:
    """The document's tokens fill the window and EOS does not fit; one token less, and it does."""
    tokenizer = _load(str(tokenizer_file("smollm2")))
    text = " one two three four five six seven eight"
    for count in (8, 9):
        found = cut(text, tokenizer, count)
        assert len(found) == 10 - count
        assert same(found, all_windows([Document("doc", text, 0, 0)], tokenizer, count))


class Counting:
    """A tokenizer that counts the characters it tokenizes."""

    def __init__(self, inner: TextTokenizer) -> None:
        self.table, self.normalise, self.inner = inner.table, inner.normalise, inner
        self.cuts_at_spaces, self.prefix, self.controls = inner.cuts_at_spaces, inner.prefix, inner.controls
        self.characters = 0

    def encode(self, text: str, *, complete: bool, keep_text: bool = False) -> Encoded:
        return self.encode_batch([text], [complete], keep_text=keep_text)[0]

    def encode_batch(
        self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
    ) -> list[Encoded]:
        self.characters += sum(map(len, texts))
        return self.inner.encode_batch(texts, completes, keep_text=keep_text)


def test_a_document_that_fits_is_tokenized_once() -> None:
    counting = Counting(_load("bytes"))
    documents = [Document(f"d{number}", "a b c " * number, 0, number) for number in range(1, 9)]
    size = sum(len(document.text) for document in documents)
    all_windows(documents, counting, 100)
    assert counting.characters == size
    for document in documents:
        list(windows(document, counting, 100))
    assert counting.characters == 2 * size


def test_an_error_of_a_batch_names_the_first_document_that_is_refused() -> None:
    class Refusing(Counting):
        def encode_batch(
            self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
        ) -> list[Encoded]:
            if bad := [text for text in texts if "bad" in text]:
                raise XtokenError(f"its tokens do not rejoin {bad[-1]!r}")
            return super().encode_batch(texts, completes, keep_text=keep_text)

    documents = [Document(name, f"{name} text", 0, 0) for name in ("good", "bad1", "bad2")]
    with pytest.raises(XtokenError, match=r"^document 'bad1': its tokens do not rejoin 'bad1 text'"):
        all_windows(documents, Refusing(_load("bytes")), 8)


_PIECES = [*" " * 8, "  ", "\n", "\n\n", "\t", "\r\n", "a", "The", "'s", "I'LL", "12", "345", "²", "é", "e\u0301", "ﬁ"]
_PIECES += [
    "中",
    "日本",
    "हि",
    "👩‍👩‍👧",
    "\u200b",
    "\u00a0",
    "\u3000",
    "\x85",
    "\x1c",
    "\u180e",
    " \u0301",
    "▁",
    "/",
    "...",
]
_PIECES += ["!?", "<s>", "<|endoftext|>", "<tool_call>", "[multimodal]", "_", "-", "word", "ing"]


class Whole(Counting):
    """A tokenizer of which nothing is known: every piece is tokenized."""

    def __init__(self, inner: TextTokenizer) -> None:
        super().__init__(inner)
        self.cuts_at_spaces = False


@pytest.mark.parametrize("name", ["bytes", "smollm2", "gemma3", "llama2", "llama3", "qwen3", "gpt4o"])
def test_windows_cut_out_of_a_slab_are_those_tokenized_alone(name: str, tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = _load("bytes" if name == "bytes" else str(tokenizer_file(name)))
    assert tokenizer.cuts_at_spaces == (name != "llama2")

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=60).map("".join), st.integers(8, 16))
    def check(text: str, max_tokens: int) -> None:
        document = Document("d", text, 0, 0)
        alone = list(windows(document, Whole(tokenizer), max_tokens))
        assert same(list(windows(document, tokenizer, max_tokens)), alone)

    check()


def test_prose_is_tokenized_once(tokenizer_file: Callable[[str], Path]) -> None:
    """But for each document's last window, which may end with EOS."""
    text = "some words and other words, then more of the same; " * 200
    counting = Counting(_load(str(tokenizer_file("smollm2"))))
    found = list(windows(Document("d", text, 0, 0), counting, 64))
    assert len(found) > 20
    assert counting.characters == len(text) + len(found[-1].encoded.text)
