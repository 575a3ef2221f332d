"""The codes of a capture follow from its corpus: from the same plan the same, whoever makes them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from xtoken.pipeline.capture import token_codes as pilot
from xtoken.pipeline.capture.plan import make_plan
from xtoken.pipeline.capture.token_codes import corpus_codes
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.ui.progress import Silent

TEXTS = [f"document {n}: " + "zzz " * n + "naïve " * (40 - n) for n in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return CorpusConfig(corpus=str(path))


def test_codes_are_the_order_of_use_in_the_corpus(corpus, tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file("smollm2")))
    codes = corpus_codes(corpus, make_plan(corpus, 500, Silent()), tokenizer)
    used = Counter(token for text in TEXTS for token in tokenizer.encode(text, complete=True).ids.tolist())
    # stride over shards: not all documents are seen, but what every document holds most comes first
    (most, _), *_ = used.most_common(1)
    assert codes[most] < 3
    assert sorted(codes.tolist()) == list(range(tokenizer.table.size))
    unseen = [token for token in range(tokenizer.table.size) if token not in used]
    assert (np.diff(codes[unseen]) > 0).all()


def test_one_plan_gives_one_set_of_codes(corpus):
    tokenizer, plan = load_tokenizer("bytes"), make_plan(corpus, 500, Silent())
    assert np.array_equal(corpus_codes(corpus, plan, tokenizer), corpus_codes(corpus, plan, tokenizer))


def test_only_so_much_of_a_shard_is_looked_at(corpus, monkeypatch):
    monkeypatch.setattr(pilot, "_SHARD_BYTES", 10)
    tokenizer = load_tokenizer("bytes")
    codes = corpus_codes(corpus, make_plan(corpus, 1 << 20, Silent()), tokenizer)
    # "document 0", and the end of the cut text: no other byte was counted
    seen = {*b"document 0"}
    assert {int(token) for token in np.argsort(codes)[: len(seen)]} >= {ord("d"), ord("o"), ord("c")}
    assert codes[ord("z")] > codes[ord("d")]
