"""Which tokenizers are known to keep their tokens where a text is cut before a space."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.tokens.cuts import keeps_tokens

BPE = {"type": "BPE", "vocab": {}, "merges": []}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def spec(model: dict[str, Any], normalizer: Any = None, pre_tokenizer: Any = None) -> dict[str, Any]:
    return {"model": model, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


@pytest.mark.parametrize(
    ("name", "known"),
    [("smollm2", True), ("gemma3", True), ("llama3", True), ("qwen3", True), ("gpt4o", True), ("llama2", False)],
)
def test_real_tokenizers(name: str, known: bool, tokenizer_file: Callable[[str], Path]) -> None:
    assert keeps_tokens(json.loads(tokenizer_file(name).read_bytes())) == known


@pytest.mark.parametrize(
    "found", [spec(BPE, None, BYTE_LEVEL), spec(BPE), spec(BPE, sequence(SPACES, {"type": "NFC"}))]
)
def test_known_ones(found: dict[str, Any]) -> None:
    assert keeps_tokens(found)


@pytest.mark.parametrize(
    "found",
    [
        spec({"type": "Unigram", "vocab": []}),
        spec(BPE, {"type": "Lowercase"}, BYTE_LEVEL),
        spec(BPE, sequence({"type": "Prepend", "prepend": "\u2581"}, SPACES)),
        spec(BPE, {**SPACES, "content": ""}),
        spec(BPE, None, {**BYTE_LEVEL, "add_prefix_space": True}),
        spec(BPE, None, {"type": "Metaspace"}),
        spec(BPE, None, {"type": "Split", "pattern": {"Regex": r"\S+\s*"}, "behavior": "Isolated", "invert": False}),
        spec({**BPE, "ignore_merges": True}),
        spec({**BPE, "ignore_merges": True}, None, {**BYTE_LEVEL, "use_regex": False}),
    ],
)
def test_what_may_see_across_a_cut_is_not_trusted(found: dict[str, Any]) -> None:
    assert not keeps_tokens(found)
