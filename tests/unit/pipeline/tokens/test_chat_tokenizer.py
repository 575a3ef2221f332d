"""Parts of conversations as tokens: markers where a template writes them, characters where people do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.tokens import load_chat_tokenizer, load_tokenizer
from xtoken.pipeline.tokens.chat import Place
from xtoken.pipeline.tokens.failures import CannotTokenize
from xtoken.schemas.errors import XtokenError

from .test_load_tokenizer import control_unigram, saved

PLACES: tuple[Place, ...] = ("start", "marker", "text")


def metaspace(folder: Path, *, prepend: str, merges: list[tuple[str, str]], specials: list[str]) -> str:
    """A metaspace BPE of single characters: ``<s>`` is 1, the specials follow, then 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = ["<unk>", "<s>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc<x>", *map("".join, merges)]
    vocab = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ["<unk>", "<s>", *specials]]
    )
    found.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "unk_token": "<unk>"}')
    return str(folder)


@pytest.mark.parametrize(
    ("prepend", "blank"),
    [
        # what stands in front of the first token of a content, by what stands before it in the whole rendering
        ("normalizer", {"start": True, "marker": True, "text": False}),
        ("always", {"start": True, "marker": True, "text": False}),
        ("first", {"start": True, "marker": False, "text": False}),
        ("never", {"start": False, "marker": False, "text": False}),
    ],
)
def test_a_blank_in_front_is_where_the_whole_rendering_has_it(
    tmp_path: Path, prepend: str, blank: dict[Place, bool]
) -> None:
    source = metaspace(tmp_path, prepend=prepend, merges=[("▁", "a")], specials=["<x>"])
    tokenizer = load_chat_tokenizer(source)
    spelt = tokenizer.table.pieces()
    before: dict[Place, str] = {"start": "", "marker": "<x>", "text": "<x>c"}
    for place in PLACES:
        encoded = tokenizer.encode("ab", place)
        assert [spelt[token] for token in encoded.ids.tolist()] == [b" a" if blank[place] else b"a", b"b"]
        assert encoded.ends.tolist() == [1, 2]
        ids = tokenizer.template_ids("ab", place)
        assert ids == encoded.ids.tolist()
        # joined, they are the tokens of the whole
        lead = tokenizer.template_ids(before[place], "start")
        assert lead + ids == tokenizer.template_ids(before[place] + "ab", "start")


def test_a_content_is_text_whatever_it_holds(tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(metaspace(tmp_path, prepend="never", merges=[], specials=["<x>"]))
    marker = tokenizer.template_ids("<x>", "text")
    assert [tokenizer.added[token] for token in marker] == ["<x>"]
    encoded = tokenizer.encode("a<x>", "text")
    assert not {*marker} & {*encoded.ids.tolist()}
    assert encoded.ends.tolist() == [1, 2, 3, 4]


def test_a_vocabulary_that_spells_a_control_token_in_plain_text_is_refused_by_the_content(tmp_path: Path) -> None:
    merges = [("<", "x"), ("<x", ">")]
    tokenizer = load_chat_tokenizer(metaspace(tmp_path, prepend="never", merges=merges, specials=["<x>"]))
    assert tokenizer.encode("a<xb", "text").ends.tolist() == [1, 3, 4]
    with pytest.raises(
        CannotTokenize, match="makes its control token '<x>' of plain text, the content that starts 'a<x>b'"
    ):
        tokenizer.encode("a<x>b", "text")


def test_control_tokens_of_a_unigram_vocabulary_are_markers_only_where_a_template_writes_them(tmp_path: Path) -> None:
    side = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_chat_tokenizer(saved(tmp_path, control_unigram(), tokenizer_config=side))
    for place in PLACES:
        encoded = tokenizer.encode("a <s>b</s>", place)
        assert not {0, 1, 2} & {*encoded.ids.tolist()}
        assert encoded.ends[-1] == 10
    ids = tokenizer.template_ids("<s>a</s>", "start")
    assert (ids[0], ids[-1]) == (1, 2)


def test_the_mark_of_the_tokenizer_itself_is_refused(tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(metaspace(tmp_path, prepend="always", merges=[], specials=["<x>"]))
    with pytest.raises(CannotTokenize, match="which the tokenizer uses itself"):
        tokenizer.encode("a\ufdd0part\ufdd0", "marker")


def test_bytes_have_no_markers() -> None:
    tokenizer = load_chat_tokenizer("bytes")
    for place in PLACES:
        assert tokenizer.template_ids("<x>é", place) == list("<x>é".encode())
        assert tokenizer.encode("<x>é", place).ends.tolist() == [1, 2, 3, 4, 5]
    assert tokenizer.added == {}


def test_moved_ids_are_named(tmp_path: Path) -> None:
    source = Path(metaspace(tmp_path, prepend="never", merges=[], specials=["<x>"])) / "tokenizer.json"
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 999, "content": "<y>"})
    source.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(XtokenError, match="its added token '<y>' has id 999, but is loaded as"):
        load_chat_tokenizer(str(source))


@pytest.mark.parametrize("name", ["smollm2", "llama2", pytest.param("qwen3", marks=pytest.mark.thorough)])
def test_real_ones_have_the_table_of_the_plain_tokenizer(tokenizer_file: Callable[[str], Path], name: str) -> None:
    """And its tokens of plain text; a content in parts has the bytes of the whole."""
    source = str(tokenizer_file(name))
    tokenizer, plain = load_chat_tokenizer(source), load_tokenizer(source)
    assert tokenizer.table.info == plain.table.info

    @settings(max_examples=40)
    @given(st.text(max_size=12), st.sampled_from(PLACES))
    def run(text: str, place: Place) -> None:
        encoded = tokenizer.encode(text, place)
        assert encoded.text == text
        size = len(text.encode())
        assert encoded.ends[-1:].tolist() == ([size] if text else [])
        if place == "start":
            expected = plain.encode(text, complete=False, keep_text=True)
            assert encoded.ids.tolist() == expected.ids.tolist()
            assert encoded.ends.tolist() == expected.ends.tolist()

    run()
