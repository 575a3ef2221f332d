"""Tokenizers that put a blank in front of a text: of every text, or of one that begins with none."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.pipeline.tokens.canonical import Canonical
from xtoken.trainer.ensemble.covers import Covers, SortedTokens

BLANK = "▁"
PIECES = [(BLANK, -4.0), (BLANK * 2, -3.0), (BLANK * 4, -3.0), (f"{BLANK}foo", -3.5), ("foo", -3.5)]


def unigram(folder: Path, front: dict[str, Any]) -> TextTokenizer:
    """With byte fallback; ``front`` is the part of tokenizer.json that puts the blank there."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), *PIECES]
    vocabulary += [(letter, -6.0) for letter in "afo.\n"]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "</s>")])
    data = json.loads(tokenizer.to_str()) | front
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    return load_tokenizer(str(folder))


ONCE = {
    "pre_tokenizer": {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False},
}
ALWAYS = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": BLANK},
            {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        ],
    },
}


@pytest.fixture(params=[ONCE, ALWAYS], ids=["once", "always"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    return unigram(tmp_path, request.param)


def test_the_first_token_of_blanks_is_that_of_all_of_them(tokenizer: TextTokenizer) -> None:
    """Four blanks are a token: one that stands for fewer would be what nobody writes there."""
    own, canonical = tokenizer.table.by_bytes(), Canonical(tokenizer)
    asked = [b" ", b"  ", b"    ", b" foo", b"foo", b"    .", b"\n", b"\n    "]
    expected = [b" ", b"  ", b"    ", b" foo", b"foo", b"    ", b"\n", b"\n"]
    found = canonical.first_tokens(asked)
    assert found[1:] == [own[data] for data in expected[1:]]
    assert found[0] in (-1, own[b" "]), "a blank alone may be no text"


def test_a_text_that_begins_with_a_blank_is_spelt(tokenizer: TextTokenizer) -> None:
    """As every later window of a document does."""
    canonical = Canonical(tokenizer)
    for data in (b"foo", b" foo", b"  foo", b"    foo."):
        canonical.refuse_unspelt({"text": data})
        whole = canonical.lead_of(data) + data
        ids = canonical.encode(whole)
        assert ids == tokenizer.token_ids([data.decode()])[0]
        assert b"".join(canonical.token_bytes[token] for token in ids) == whole
        assert canonical.complete(ids)
        assert [at for at, token in enumerate(ids) if not canonical.viable(ids[:at], [token])[0]] == []


def test_its_bytes_have_no_more_bits_than_its_tokens(tokenizer: TextTokenizer) -> None:
    canonical, size = Canonical(tokenizer), tokenizer.table.size
    logp = np.log(np.random.default_rng(0).dirichlet(np.ones(size)))

    def score(ids: Sequence[int], _: Any) -> tuple[NDArray[np.float64], None]:
        return logp, None

    for data in (b"foo", b"  foo", b"    foo."):
        lead = canonical.lead_of(data)
        covers = Covers(canonical, SortedTokens(canonical.token_bytes, size), score, (1,), floor=0, lead=lead)
        bits = -sum(covers.take(byte) for byte in data)
        assert math.isfinite(bits)
        assert bits <= -logp[canonical.encode(lead + data)].sum() + 1e-9
