"""Which sequences a tokenizer writes: its own encodings of real texts, and every way to get them wrong."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.pipeline.tokens.canonical import Canonical
from xtoken.schemas.errors import XtokenError

pytestmark = pytest.mark.thorough  # real models and tokenizers, for minutes
NAMES = ("smollm2", "gemma3", "llama3", "qwen3", "llama2", "gpt4o")
TEXTS = {
    "english": "It isn't a “whale”, he'd said:\n\nCall me Ishmael -- some years   ago, in 1851.  \n\n\nGone\n",
    "scripts": "Größe Ελληνικά עברית हिन्दी 中文和日本語 한국어 👩‍👩‍👧‍👦 𝔘 naïve\u00a0x",
    "code": "def f(x):\n\tif x <= 0x7f:\n\t\treturn {'a': 1e-10}\n    # ok\r\n\r\nx = f(f(2))  \n",
    "digits": "1 12 123 1234 12345 3.14159 1,000,000 007",
}


@cache
def _load(path: Path) -> TextTokenizer:
    return load_tokenizer(str(path))


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path]) -> TextTokenizer:
    return _load(tokenizer_file(request.param))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_tokenizers_own_tokens_are_viable_one_after_the_other(tokenizer: TextTokenizer, text: str) -> None:
    """By their last tokens and by all; the whole is complete."""
    ids = tokenizer.token_ids([text])[0]
    for tail in (3, 8, None):
        canonical = Canonical(tokenizer, tail)
        assert canonical.encode(canonical.lead + text.encode()) == ids
        assert canonical.complete(ids)
        assert [at for at, token in enumerate(ids) if not canonical.viable(ids[:at], [token])[0]] == []


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_last_tokens_decide_as_all_do(tokenizer: TextTokenizer, text: str) -> None:
    """After every beginning of a text 60 random tokens and those that spell its next bytes."""
    ids, rng = tokenizer.token_ids([text])[0], np.random.default_rng(0)
    fast, slow = Canonical(tokenizer), Canonical(tokenizer, None)
    pieces, data = fast.token_bytes, fast.lead + text.encode()
    some = [token for token in rng.choice(len(pieces), 60).tolist() if pieces[token]]
    by_bytes, rejected, at = tokenizer.table.by_bytes(), 0, 0
    for count in range(len(ids)):
        spelt = [by_bytes.get(data[at : at + width]) for width in range(1, 12)]
        following = [*some, *(token for token in spelt if token is not None)]
        found = fast.viable(ids[:count], following)
        assert found == slow.viable(ids[:count], following)
        rejected += found.count(False)
        at += len(pieces[ids[count]])
    assert rejected > len(ids)


_PIECES = [
    "a",
    "the",
    " the",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "'s",
    "'",
    "12",
    "1234",
    "é",
    "中文",
    "👩‍👩",
    ".",
    "...",
    "X",
    "\u00a0",
]


@cache
def _canonical(tokenizer: TextTokenizer) -> Canonical:
    """Made once, not for every example: it holds what follows from its vocabulary."""
    return Canonical(tokenizer)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(_PIECES), min_size=1, max_size=10))
def test_texts_of_any_pieces_are_viable_all_the_way(tokenizer: TextTokenizer, pieces: list[str]) -> None:
    canonical, text = _canonical(tokenizer), "".join(pieces)
    ids = tokenizer.token_ids([text])[0]
    if b"".join(canonical.token_bytes[token] for token in ids) == canonical.lead + text.encode():
        assert canonical.complete(ids)
        assert [at for at, token in enumerate(ids) if not canonical.viable(ids[:at], [token])[0]] == []


def test_a_pre_token_that_looks_ahead(tokenizer_file: Callable[[str], Path]) -> None:
    """Two line ends are one token at the end of a text and two before a word, so both ways stay open until then."""
    canonical = Canonical(_load(tokenizer_file("smollm2")))
    by_bytes = _load(tokenizer_file("smollm2")).table.by_bytes()
    a, line, two = by_bytes[b"a"], by_bytes[b"\n"], by_bytes[b"\n\n"]
    assert canonical.encode(b"a\n\na") == [a, line, line, a]
    assert canonical.viable([a], [line, two]) == [True, True]
    assert canonical.viable([a, line], [line]) == [True]
    assert (canonical.complete([a, line, line]), canonical.complete([a, two])) == (False, True)
    assert canonical.viable([a, line, line], [a]) == [True]
    assert canonical.viable([a, two], [a]) == [False]


def test_merges_digits_and_contractions(tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = _load(tokenizer_file("smollm2"))
    canonical, by_bytes = Canonical(tokenizer), tokenizer.table.by_bytes()
    don, quote, tell, th, e = (by_bytes[piece] for piece in (b"don", b"'", b"tell", b" th", b"e"))
    assert by_bytes[b" the"] is not None
    assert canonical.viable([th], [e]) == [False]  # " the" is a token
    assert canonical.viable([don, quote], [tell]) == [False]  # 't is a pre-token of its own


def test_a_word_that_is_a_token_whatever_the_merges_say(tmp_path: Path) -> None:
    """As in Llama 3's: "ab" is one token alone, and two within a longer word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = [*bytes_to_unicode().values(), "ab", "bc"]
    vocab = {letter: at for at, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    canonical = Canonical(load_tokenizer(str(tmp_path / "tokenizer.json")))
    a, b, ab, bc = vocab["a"], vocab["b"], vocab["ab"], vocab["bc"]
    assert (canonical.encode(b"ab"), canonical.encode(b"abz"), canonical.encode(b"abc")) == (
        [ab],
        [a, b, vocab["z"]],
        [a, bc],
    )
    assert canonical.viable([a], [b, bc]) == [True, True]
    assert canonical.viable([ab], [vocab["z"], vocab["Ġ"]]) == [False, True]
    assert (canonical.complete([a, b]), canonical.complete([ab])) == (False, True)


def test_texts_that_tokens_do_not_spell(tokenizer_file: Callable[[str], Path]) -> None:
    canonical = Canonical(_load(tokenizer_file("qwen3")))
    canonical.refuse_unspelt({"one": "café".encode()})
    with pytest.raises(XtokenError, match=r"two: the tokens of qwen3 do not spell this text but b'caf\\xc3"):
        canonical.refuse_unspelt({"one": b"tea", "two": "cafe\u0301".encode()})


def test_characters_in_parts(tokenizer_file: Callable[[str], Path]) -> None:
    """Nothing is decided before a character is whole; bytes that are no text in any way are refused."""
    tokenizer = _load(tokenizer_file("gemma3"))
    canonical, table = Canonical(tokenizer), tokenizer.table
    byte = {data[0]: at for at, data in enumerate(table.pieces()) if len(data) == 1 and table.byte_fallback[at]}
    euro = "€".encode()
    assert canonical.viable([], [byte[euro[0]], byte[0x80]]) == [True, False]
    assert canonical.viable([byte[euro[0]]], [byte[euro[1]]]) == [True]
    assert canonical.viable([byte[euro[0]], byte[euro[1]]], [byte[euro[2]]]) == [False]  # it has a token
    assert len(canonical.encode(euro)) == 1
    rare = "𓀀".encode()
    ids = [byte[one] for one in rare]
    assert canonical.encode(rare) == ids
    assert all(canonical.viable(ids[:at], [ids[at]])[0] for at in range(4))
    assert not canonical.complete(ids[:3])


def test_a_blank_in_front(tokenizer_file: Callable[[str], Path]) -> None:
    canonical = Canonical(_load(tokenizer_file("llama2")))
    assert canonical.lead == b" "
    assert canonical.complete(canonical.encode(b" hello"))
    assert Canonical(_load(tokenizer_file("gemma3"))).lead == b""


def test_bytes_are_always_canonical() -> None:
    canonical = Canonical(load_tokenizer("bytes"))
    assert canonical.viable([104], [105, 0xE2, 0xFF]) == [True, True, False]
    assert canonical.complete(list("hé".encode()))
    assert not canonical.complete([0xE2])
