"""Real tokenizers: token bytes against the library's own decoder, ends against the text."""

import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from xtoken.pipeline.tokens import Encoded, TextTokenizer, load_tokenizer

NAMES = ("smollm2", "gemma3", "llama3", "qwen3", "llama2", "gpt4o")
TEXTS = {
    "english": "The quick brown fox — it's “jumping” over 13 lazy dogs, isn't it?",
    "scripts": "Ελληνικά Русский עברית العربية हिन्दी ไทย 中文和日本語テスト 한국어 ქართული አማርኛ 𓀀 𝔘𝔫𝔦",
    "code": "def f(x: int) -> str:\n\tif x <= 0:\n\t\treturn '<0x41>'\n    # ▁ and Ġ\n    return f'{x!r}' * 2 ** 8\n",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ❤️ 🧑🏿‍🚀",
    "nfc": "caf\u00e9 \u1e69 \ud55c\uae00 \u01d5",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n\n\n",
    "whitespace": "a  b   c" + " " * 100 + "d\t\t\t\te\u00a0\u3000\u2028f   ",
    "leading": "   leading and trailing   ",
    "numbers": "1 12 123 1234 12345678901234567890 3.14159e-10 0x7f 1,000,000 ٣٤٥ ½ Ⅷ",
    "specials": "<s>a</s><bos><eos><pad><unk><|endoftext|><|im_start|>user\n<|im_end|><|eot_id|><|begin_of_text|>"
    "<start_of_turn>model<end_of_turn>[PAD]<unused0><think></think><tool_call>",
    "metaspace": "▁ ▁▁x ▁y▁ <0x0A> <0xE2> Ġa Ċ",
    "control": "\x00a\x01\x02\x1f\x7f\x85\u200b\u200d\ufeff\ufffd\U0010ffff",
    "space": " ",
    "newline": "\n",
}
NFD = "cafe\u0301 n\u0303 s\u0323\u0307 \u1112\u1161\u11ab \u0915\u093c \u212b"
FRAGMENTS = [
    "▁",
    " ",
    "  ",
    "\r\n",
    "\x00",
    "<s>",
    "<|im_end|>",
    "<0x41>",
    "é",
    "e\u0301",
    "\u0301",
    "👩‍👩‍👧",
    "नी",
    "12",
    "Ġ",
    "ﬁ",
]
_MIXED = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=12)), max_size=12).map("".join)
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@cache
def _load(path: Path) -> TextTokenizer:
    return load_tokenizer(str(path))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(name: str, tokenizer_file: Callable[[str], Path]) -> Path:
    return tokenizer_file(name)


@pytest.fixture
def tokenizer(path: Path) -> TextTokenizer:
    return _load(path)


def check(tokenizer: TextTokenizer, text: str, encoded: Encoded) -> None:
    """The invariant, from the outside: every token's bytes are the bytes between the ends around it."""
    assert not encoded.snapped
    data = encoded.text.encode()
    ends = encoded.ends.tolist()
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(data)
    assert encoded.text in (text, unicodedata.normalize("NFC", text))
    spans = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    for position, (token_id, span) in enumerate(zip(encoded.ids.tolist(), spans, strict=True)):
        token = tokenizer.table.token(token_id)
        if tokenizer.table.info.kind == "metaspace":
            span = span.replace("▁".encode(), b" ")
        assert span == token or (position == 0 and b" " + span == token)


@pytest.mark.parametrize("label", TEXTS)
def test_tokens_rejoin(tokenizer: TextTokenizer, label: str) -> None:
    encoded = tokenizer.encode(TEXTS[label], complete=False)
    check(tokenizer, TEXTS[label], encoded)
    assert encoded.text == TEXTS[label]


def test_ids_are_the_librarys(tokenizer: TextTokenizer, path: Path) -> None:
    backend = Tokenizer.from_file(str(path))
    for label in set(TEXTS) - {"specials"}:
        expected = backend.encode(TEXTS[label], add_special_tokens=False).ids
        assert tokenizer.encode(TEXTS[label], complete=False).ids.tolist() == expected


def test_prefixes_decode_to_prefixes(tokenizer: TextTokenizer, path: Path) -> None:
    """Where an end falls between characters, the library decodes the tokens so far to the text so far."""
    backend = Tokenizer.from_file(str(path))
    text = TEXTS["scripts"] + TEXTS["code"].replace("▁", "_")
    encoded = tokenizer.encode(text, complete=False)
    data, checked = text.encode(), 0
    for count, end in enumerate(encoded.ends.tolist(), start=1):
        try:
            prefix = data[:end].decode()
        except UnicodeDecodeError:
            continue
        assert backend.decode(encoded.ids[:count].tolist(), skip_special_tokens=False) == prefix
        checked += 1
    assert checked > 40


def test_token_bytes_are_what_the_decoder_gives(tokenizer: TextTokenizer, path: Path) -> None:
    backend = Tokenizer.from_file(str(path))
    table = tokenizer.table
    anchor = backend.encode("x", add_special_tokens=False).ids  # a decoder may strip the start of a text
    before = backend.decode(anchor)
    text_ids = [token_id for token_id in range(table.size) if table.role[token_id] is None]
    for token_id in text_ids[::11]:
        decoded = backend.decode([*anchor, token_id], skip_special_tokens=False)
        assert decoded.removeprefix(before) == table.token(token_id).decode(errors="replace")


def test_text_of_every_special_token_is_text(tokenizer: TextTokenizer, path: Path) -> None:
    backend = Tokenizer.from_file(str(path))
    specials = [i for i, role in enumerate(tokenizer.table.role) if role not in (None, "hole")]
    text = " ".join(backend.id_to_token(i) for i in specials)
    encoded = tokenizer.encode(text, complete=False)
    check(tokenizer, text, encoded)
    assert not set(encoded.ids.tolist()) & set(specials)
    for token_id in specials:
        assert tokenizer.table.token(token_id) == b""


def test_combining_marks_in_nfd(tokenizer: TextTokenizer, name: str) -> None:
    encoded = tokenizer.encode(NFD, complete=False)
    check(tokenizer, NFD, encoded)
    assert encoded.text == (unicodedata.normalize("NFC", NFD) if name == "qwen3" else NFD)
    assert tokenizer.normalise(NFD) == encoded.text


def test_a_second_tokenizer_keeps_the_text(tokenizer: TextTokenizer, name: str) -> None:
    encoded = tokenizer.encode(NFD, complete=True, keep_text=True)
    assert encoded.text == NFD
    assert encoded.snapped == (name == "qwen3")
    assert encoded.ends[-1] == len(NFD.encode())
    # Ends that were moved are ends of whole blocks: "café" ends after the accent, never before it.
    assert len(b"cafe") not in encoded.ends.tolist() or not encoded.snapped


def test_eos_ends_complete_texts(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.table.id_of("eos")
    whole, part = tokenizer.encode("Hello.", complete=True), tokenizer.encode("Hello.", complete=False)
    assert whole.ids.tolist() == [*part.ids.tolist(), eos]
    assert whole.ends.tolist() == [*part.ends.tolist(), 6]
    assert tokenizer.encode("", complete=True).ends.tolist() == [0]
    assert tokenizer.encode("", complete=False).ids.tolist() == []


def test_batches_are_single_texts(tokenizer: TextTokenizer) -> None:
    texts = [*TEXTS.values(), ""]
    completes = [index % 2 == 0 for index in range(len(texts))]
    for text, complete, encoded in zip(texts, completes, tokenizer.encode_batch(texts, completes), strict=True):
        single = tokenizer.encode(text, complete=complete)
        assert encoded.text == single.text
        np.testing.assert_array_equal(encoded.ids, single.ids)
        np.testing.assert_array_equal(encoded.ends, single.ends)
        assert encoded.ids.dtype == encoded.ends.dtype == np.int32


@settings(max_examples=40, deadline=None, suppress_health_check=UNCHECKED)
@given(text=_MIXED)
def test_any_text_rejoins(tokenizer: TextTokenizer, text: str) -> None:
    encoded = tokenizer.encode(text, complete=False)
    known = tokenizer.table.by_bytes()
    if all(bytes([byte]) in known for byte in encoded.text.encode()):
        check(tokenizer, text, encoded)
    else:
        assert encoded.snapped


@settings(max_examples=40, deadline=None, suppress_health_check=UNCHECKED)
@given(text=_MIXED)
def test_any_text_keeps_its_ends(tokenizer: TextTokenizer, text: str) -> None:
    encoded = tokenizer.encode(text, complete=False, keep_text=True)
    ends = encoded.ends.tolist()
    assert encoded.text == text
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(text.encode())


ROLES = {
    "smollm2": ("byte-level", 49152, False, {"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>"}),
    "gemma3": ("metaspace", 262144, True, {"bos": "<bos>", "eos": "<eos>", "eot": "<end_of_turn>", "pad": "<pad>"}),
    "llama3": (
        "byte-level",
        128256,
        False,
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>"},
    ),
    "qwen3": ("byte-level", 151669, False, {"eos": "<|im_end|>", "pad": "<|endoftext|>", "bos": None, "eot": None}),
    "llama2": ("metaspace", 32000, True, {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": None}),
    "gpt4o": ("byte-level", 200019, False, {"eos": "<|endoftext|>", "bos": None, "unk": None}),
}


def test_kind_size_and_roles(tokenizer: TextTokenizer, name: str, path: Path) -> None:
    kind, size, adds_bos, roles = ROLES[name]
    backend, table = Tokenizer.from_file(str(path)), tokenizer.table
    assert (table.info.kind, table.size, table.info.size, table.info.adds_bos) == (kind, size, size, adds_bos)
    for role, token in roles.items():
        token_id = table.id_of(role)
        assert (None if token_id is None else backend.id_to_token(token_id)) == token
    assert table.info.eos_id == table.id_of("eos")


def test_merges_are_pairs_of_tokens(tokenizer: TextTokenizer) -> None:
    table = tokenizer.table
    pieces, known = table.pieces(), table.by_bytes()
    assert len(table.merges) > 40_000
    for left, right in table.merges[::101].tolist():
        assert pieces[left] + pieces[right] in known


def test_holes(tokenizer_file: Callable[[str], Path]) -> None:
    table = _load(tokenizer_file("gpt4o")).table
    holes = [token_id for token_id, role in enumerate(table.role) if role == "hole"]
    assert len(holes) == 19
    assert holes[0] == 199998
    assert all(table.token(token_id) == b"" for token_id in holes)


def test_llama2_dummy_space(tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = _load(tokenizer_file("llama2"))
    encoded = tokenizer.encode(" lead", complete=False)
    assert [tokenizer.table.token(i) for i in encoded.ids.tolist()] == [b" ", b" lead"]
    assert encoded.ends.tolist() == [0, 5]
    assert tokenizer.encode("lead", complete=False).ends.tolist()[-1] == 4


def test_byte_tokens_lose_to_ordinary_ones(tokenizer_file: Callable[[str], Path]) -> None:
    path = tokenizer_file("llama2")
    table, backend = _load(path).table, Tokenizer.from_file(str(path))
    assert int(table.byte_fallback.sum()) == 256
    assert table.by_bytes()[b","] == backend.token_to_id(",")
    assert table.token(backend.token_to_id("<0x2C>")) == b","
    assert table.by_bytes()[b"\xe2"] == backend.token_to_id("<0xE2>")
    assert table.starts_with_space()[backend.token_to_id("▁the")]
    assert not table.starts_with_space()[backend.token_to_id("the")]


def test_bytes_that_smollm2_cannot_spell(tokenizer_file: Callable[[str], Path]) -> None:
    """It has no token for 0x16 or 0xF1 and drops them; the ends around them still hold."""
    tokenizer = _load(tokenizer_file("smollm2"))
    encoded = tokenizer.encode("\x16ab\x16 cd\U00040000.\x16", complete=True)
    assert encoded.snapped
    assert [tokenizer.table.token(i) for i in encoded.ids.tolist()] == [b"ab", b" cd", *[b"\x80"] * 3, b".", b""]
    assert encoded.ends.tolist() == [3, 7, 11, 11, 11, 13, 13]
    alone = tokenizer.encode("\x16", complete=True)
    assert (alone.ids.tolist(), alone.ends.tolist()) == ([tokenizer.table.id_of("eos")], [1])


def test_whitespace_runs_of_gemma_are_spaces(tokenizer_file: Callable[[str], Path]) -> None:
    path = tokenizer_file("gemma3")
    backend = Tokenizer.from_file(str(path))
    assert _load(path).table.token(backend.token_to_id("▁▁▁▁")) == b"    "
