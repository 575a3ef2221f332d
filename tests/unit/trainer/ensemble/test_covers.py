"""P(next byte) against sums over every token sequence, on a small BPE with a random model, and on real models."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_bpe import write_bpe

from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.pipeline.tokens.canonical import Canonical
from xtoken.trainer.ensemble.covers import END, Covers, SortedTokens
from xtoken.trainer.ensemble.next_token import NextToken

MERGES = ["a b", "Ċ Ċ", "Ġ a", "ab ab", "b a", "Ġa b", "Ã ©", "ab a", "ĊĊ Ċ", "Ġ Ġ", "b b"]
ENDS = (0, 1)
TEXTS = ["ababba", "a ab  ab", "a\n\na\n\n\n", "aé éb", "bbabab a"]
EXACT = 1e-10  # of float64 sums in two orders
# Whatever a text may go on with, as far as any pattern looks.
CONTINUATIONS = [
    "",
    *("".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab \né", repeat=n)),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Of ``MERGES``."""
    return write_bpe(tmp_path_factory.mktemp("toy"), MERGES, ["ababab"])


class RandomModel:
    """A distribution for every context, by its hash; tokens of the toy's letters get most."""

    def __init__(self, size: int, likely: Sequence[int], seed: int = 0) -> None:
        self.size, self.seed, self.passes = size, seed, 0
        self.alpha = np.full(size, 0.01)
        self.alpha[list(likely)] = 1.0

    @cache  # noqa: B019 - lives as long as a test
    def logp(self, ids: tuple[int, ...]) -> np.ndarray:
        digest = hashlib.sha256(repr((self.seed, ids)).encode()).digest()
        p = np.random.default_rng(int.from_bytes(digest[:8])).dirichlet(self.alpha) + 1e-12
        return np.log(p / p.sum())

    def __call__(self, ids: Sequence[int], before: Any) -> tuple[np.ndarray, Any]:
        """Checks on the way that a call goes on from the one before."""
        assert before == (tuple(ids[:-1]) if ids else None)
        self.passes += 1
        return self.logp(tuple(ids)), tuple(ids)


def random_model(tokenizer: TextTokenizer, seed: int = 0) -> RandomModel:
    known = tokenizer.table.pieces()
    likely = [at for at, data in enumerate(known) if data and set(data) <= set("ab \né".encode())]
    return RandomModel(tokenizer.table.size, [*likely, *ENDS], seed)


def covers_of(
    tokenizer: TextTokenizer, score: Any, spelling: Canonical | None = None, *, ends: Sequence[int] = ENDS, **how: Any
) -> Covers:
    spelling = spelling or Canonical(tokenizer)
    return Covers(spelling, SortedTokens(spelling.token_bytes, tokenizer.table.size), score, ends, **how)


class Brute:
    """Sums over all sequences of tokens; whether one can become canonical is tried with every continuation."""

    def __init__(self, tokenizer: TextTokenizer, model: RandomModel) -> None:
        self.tokenizer, self.model, self.pieces = tokenizer, model, tokenizer.table.pieces()

    @cache  # noqa: B019
    def viable(self, ids: tuple[int, ...]) -> bool:
        data = b"".join(self.pieces[token] for token in ids)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            return error.end == len(data) and error.reason == "unexpected end of data"
        found = self.tokenizer.token_ids([text + more for more in CONTINUATIONS])
        return any(tuple(one[: len(ids)]) == ids for one in found)

    def z(self, data: bytes, *, end: bool = False) -> float:
        return self._z(data, (), b"", end)

    def _z(self, data: bytes, ids: tuple[int, ...], spelt: bytes, end: bool) -> float:
        if len(spelt) >= len(data):
            if not end:
                return 1.0
            whole = spelt == data and self.tokenizer.token_ids([data.decode()])[0] == list(ids)
            return float(np.exp(self.model.logp(ids)[list(ENDS)]).sum()) if whole else 0.0
        total, rest = 0.0, data[len(spelt) :]
        for token, piece in enumerate(self.pieces):
            if piece and (rest.startswith(piece) or piece.startswith(rest)) and self.viable((*ids, token)):
                p = math.exp(self.model.logp(ids)[token])
                total += p * self._z(data, (*ids, token), spelt + piece, end)
        return total

    def next(self, data: bytes) -> tuple[np.ndarray, float]:
        """P of the 257 symbols, and the share of Z that none of them has."""
        end = self.z(data, end=True) if is_text(data) else 0.0
        mass = np.array([*(self.z(data + bytes([byte])) for byte in range(256)), end])
        return mass / mass.sum(), 1 - mass.sum() / self.z(data)


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", TEXTS)
def test_every_symbol_as_by_all_sequences(toy: TextTokenizer, text: str) -> None:
    model, data = random_model(toy), text.encode()
    covers, brute = covers_of(toy, model, floor=0), Brute(toy, model)
    lost = []
    for at in range(len(data)):
        found, (p, share) = covers.next(), brute.next(data[:at])
        np.testing.assert_allclose(found.p, p, rtol=EXACT, atol=0)
        assert found.p.sum() == pytest.approx(1, abs=EXACT)
        assert found.lost == pytest.approx(share, abs=EXACT)
        assert found.undecided == 0
        lost.append(share)
        log_end, before = covers.log_end(), covers.take(data[at])
        assert math.exp(log_end) == pytest.approx(p[END], abs=EXACT)
        assert math.exp(before) == pytest.approx(p[data[at]], rel=EXACT)
    assert max(lost) > 0.01, "nothing was lost, so that nothing was tried"


class Counted(Canonical):
    """How many tokens it was asked about."""

    asked = 0

    def viable(self, ids: Sequence[int], following: Sequence[int]) -> list[bool]:
        self.asked += len(following)
        return super().viable(ids, following)


def test_what_may_stay_undecided_changes_little_and_saves_much(toy: TextTokenizer) -> None:
    data = b"ababba a ab  ab"
    exact, quick = Counted(toy), Counted(toy)
    slow, fast = covers_of(toy, random_model(toy), exact, floor=0), covers_of(toy, random_model(toy), quick, floor=1e-2)
    for byte in data:
        np.testing.assert_allclose(fast.next().p, slow.next().p, atol=2e-2)
        assert fast.next().undecided <= 1e-2
        assert fast.take(byte) == pytest.approx(slow.take(byte), abs=3e-2)
    assert quick.asked < exact.asked / 4


def test_nothing_is_lost_by_a_model_of_the_tokenizers_own_tokens(toy: TextTokenizer) -> None:
    """A model that gives all to tokens that may follow: Z(x) is the sum over the symbols, and P is Z(xb) / Z(x)."""
    plain, canonical = random_model(toy), Canonical(toy)
    texts = [token for token, data in enumerate(toy.table.pieces()) if data]

    def only(ids: Sequence[int], before: Any) -> tuple[np.ndarray, Any]:
        logp, state = plain(ids, before)
        allowed = np.full(toy.table.size, -np.inf)
        viable = [token for token, may in zip(texts, canonical.viable(ids, texts), strict=True) if may]
        allowed[viable] = logp[viable]
        if canonical.complete(ids):
            allowed[list(ENDS)] = logp[list(ENDS)]
        return allowed - np.logaddexp.reduce(allowed), state

    covers = covers_of(toy, only, floor=0)
    for byte in b"a ab\n\nab":
        found = covers.next()
        assert found.lost == pytest.approx(0, abs=EXACT)
        assert found.p.sum() == pytest.approx(1, abs=EXACT)
        covers.take(byte)


def test_a_model_of_bytes_is_itself() -> None:
    tokenizer = load_tokenizer("bytes")
    model = RandomModel(258, range(128))
    covers = covers_of(tokenizer, model, ends=(), floor=0)
    ids: tuple[int, ...] = ()
    for byte in "né".encode():
        p = np.exp(model.logp(ids)[:256])
        following = covers.next()
        kept = following.p[:256] > 0  # others make no UTF-8
        np.testing.assert_allclose(following.p[:256][kept], p[kept] / p[kept].sum(), rtol=EXACT)
        assert covers.take(byte) == pytest.approx(math.log(following.p[byte]), abs=EXACT)
        ids = (*ids, byte)


def test_bytes_that_no_tokens_cover(toy: TextTokenizer) -> None:
    covers = covers_of(toy, random_model(toy))
    assert covers.take(0xFF) == -math.inf
    with pytest.raises(ValueError, match="no tokens cover"):
        covers.next()


TEXT = "It's said, Ishmael -- some\n\nyears ago, 12 or “more”"


@pytest.mark.engine
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_pay_no_more_by_bytes_than_by_tokens(
    name: str, request: pytest.FixtureRequest, figure: Any
) -> None:
    """The tokenizer's own tokens are one cover of many."""
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(f"{name}_dir")
    tokenizer = load_tokenizer(str(folder))
    info, model = tokenizer.table.info, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context = info.bos_id if info.adds_bos else info.eos_id
    assert context is not None
    score, canonical = NextToken(model, context, info.size), Canonical(tokenizer)
    ends = [at for at, role in enumerate(tokenizer.table.role) if role in ("eos", "eot")]
    covers = covers_of(tokenizer, score, ends=ends)
    nats, lost = 0.0, []
    for byte in TEXT.encode():
        found = covers.next()
        lost.append(found.lost)
        assert found.p.sum() == pytest.approx(1, abs=EXACT)
        nats -= covers.take(byte)
    tokens = score.nats(canonical.encode(canonical.lead + TEXT.encode()))
    size = len(TEXT.encode()) * math.log(2)
    figure(
        f"{name}: {tokens / size:.4f} bits per byte by tokens, {nats / size:.4f} by bytes, {np.mean(lost):.2%} of the "
        f"mass lost, {score.passes / len(lost):.2f} forward passes per byte"
    )
    assert nats <= tokens
    assert nats > 0.8 * tokens
