"""A tokenizer with its first merges only: what is kept, under which ids, and that it cuts finer and nowhere else."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.tokens import load_tokenizer
from xtoken.pipeline.tokens.prune import check_refines, prune, prune_files, sample_texts
from xtoken.schemas.errors import XtokenError

LETTERS = "abc"


def toy(merges: list[tuple[str, str]], **model: Any) -> dict[str, Any]:
    """A byte-level BPE of three letters; BOS stands first, EOS last, and one added token is no part of the model."""
    tokens = ["<s>", *LETTERS, *dict.fromkeys(left + right for left, right in merges), "</s>"]
    added = [
        {"id": at, "content": name, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        for at, name in ((0, "<s>"), (len(tokens) - 1, "</s>"), (len(tokens), "<x>"))
    ]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [len(tokens) - 1], "tokens": ["</s>"]}},
    }
    vocab = {token: at for at, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [{"single_word": False, **token} for token in added],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": template,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges], **model},
    }


UNIGRAM = {"model": {"type": "Unigram", "byte_fallback": True, "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]]}}
MERGES = [("a", "b"), ("c", "c"), ("ab", "c"), ("a", "a"), ("ab", "cc"), ("abc", "a")]


def plain_bpe(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE as it is written in books."""
    parts = list(text)
    while True:
        found = [(merges.index(pair), at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in merges]
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_a_toy_is_the_first_rules_by_brute_force(keep: int, tmp_path: Path) -> None:
    """Every text of up to seven letters: the library's tokens are those of the first rules, and refine the whole's."""
    from tokenizers import Tokenizer

    whole = toy(MERGES)
    smaller, kept = prune(whole, "toy", keep)
    assert len(kept) == 3 + 3 + keep
    names = {**whole["model"]["vocab"], "<x>": len(whole["model"]["vocab"])}
    mine = {**smaller["model"]["vocab"], "<x>": len(smaller["model"]["vocab"])}
    assert {token: kept[at] for token, at in mine.items()} == {token: names[token] for token in mine}
    assert [token["id"] for token in smaller["added_tokens"]] == [mine[name] for name in ("<s>", "</s>", "<x>")]
    assert smaller["post_processor"]["special_tokens"]["</s>"]["ids"] == [mine["</s>"]]
    run, full = (Tokenizer.from_str(json.dumps(data)) for data in (smaller, whole))
    for size in range(1, 8):
        for letters in itertools.product(LETTERS, repeat=size):
            text = "".join(letters)
            tokens = run.encode(text, add_special_tokens=False).tokens
            assert tokens == plain_bpe(text, MERGES[:keep])
            ends, theirs = (
                set(itertools.accumulate(map(len, one)))
                for one in (tokens, full.encode(text, add_special_tokens=False).tokens)
            )
            assert theirs <= ends


def test_all_rules_of_a_kept_token_stay() -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("c", "c")]
    smaller, _ = prune(toy(merges), "toy", 3)
    assert smaller["model"]["merges"] == [list(pair) for pair in merges[:4]]


@pytest.mark.parametrize(
    ("data", "keep", "said"),
    [
        (toy(MERGES, ignore_merges=True), 2, "tokenizer 'toy' has ignore_merges"),
        (toy([]), 2, "is BPE without merges"),
        (UNIGRAM, 2, "is Unigram without merges, and only BPE can be cut"),
        (toy(MERGES), 6, "has 6 merged tokens, so nothing would be left out"),
        (toy([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]), 1, None),
        (toy([("a", "bc"), ("b", "c")]), 1, "makes 'abc' of 'a' and 'bc', and 'bc' is not among its first 1 merged"),
    ],
)
def test_refusals_are_named(data: dict[str, Any], keep: int, said: str | None) -> None:
    if said is None:
        prune(data, "toy", keep)
        return
    with pytest.raises(XtokenError, match=said):
        prune(data, "toy", keep)


@pytest.mark.parametrize(("name", "keep"), [("smollm2", 8000), ("qwen3", 32000)])
def test_a_real_tokenizer_is_cut(tokenizer_file: Callable[[str], Path], name: str, keep: int, tmp_path: Path) -> None:
    source = tokenizer_file(name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((source.parent / file).read_bytes())
    (tmp_path / "merges.txt").write_text("of the whole one")
    kept = prune_files(tmp_path, name, keep)
    whole, smaller = load_tokenizer(str(source.parent)), load_tokenizer(str(tmp_path))
    assert not (tmp_path / "merges.txt").exists()
    assert kept == sorted(set(kept))
    assert [smaller.table.token(t) for t in range(smaller.table.size)] == [whole.table.token(old) for old in kept]
    assert list(smaller.table.role) == [whole.table.role[old] for old in kept]
    assert dict(smaller.controls) == {at: whole.controls[old] for at, old in enumerate(kept) if old in whole.controls}
    assert check_refines(smaller, whole, sample_texts()) > 100_000
    text = "Distillation of tokenizers, 1234 times"
    assert len(smaller.encode(text, complete=False).ids) > len(whole.encode(text, complete=False).ids)


def test_a_tokenizer_that_joins_elsewhere_is_no_refinement(tmp_path: Path) -> None:
    files = []
    for name, merges in (("whole", [("a", "b"), ("b", "c")]), ("other", [("b", "c"), ("a", "b")])):
        data = toy(merges)
        data["added_tokens"].pop()
        data["model"]["vocab"] |= {
            letter: 100 + at for at, letter in enumerate(_alphabet()) if letter not in data["model"]["vocab"]
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        files.append(load_tokenizer(str(tmp_path / f"{name}.json")))
    whole, other = files
    with pytest.raises(XtokenError, match="joins what 'whole' keeps apart, at byte 2"):
        check_refines(other, whole, ["abc"])
    assert check_refines(whole, whole, ["abc"]) == 3
    with pytest.raises(XtokenError, match="there is no text"):
        check_refines(whole, whole, [])


def _alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    return list(letters.values())
