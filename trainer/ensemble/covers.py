"""The probability of the next byte under a model of tokens: exact, by all tokenizations that cover the bytes so far.

A cover of bytes x is a sequence of tokens that spells x, or x and a little more: only its last token may reach beyond
x. Z(x) is the sum, over the covers that the tokenizer would write (``xtoken.pipeline.tokens.canonical``), of the
products of their tokens' probabilities. With 257 symbols, the bytes and END (the model ends the text),

    P(b | x) = Z(x b) / (sum over bytes b' of Z(x b') + Z(x END)).

What the denominator lacks of Z(x) went to tokens that the tokenizer would not write there: it is lost, and reported.

Shapes: V ids of the model, M tokens that spell something, in order of their bytes.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

END = 256  # behind the bytes
# Share of Z that nobody looks at. It counts as what it seems, so that bits are off by far less: on real models by 2e-5
# of them, where 1e-5 of Z takes three times as long.
FLOOR = 1e-3
_UNKNOWN, _VIABLE, _REFUSED = 0, 1, -1
_KEPT = 1 << 14  # arrays of 257 places
_FEW = 64  # tokens that are asked about one by one
# Log-probabilities [V] of the token behind ids, and what a call for one id more goes on from; it is given what the
# call for one id less gave.
Score = Callable[[Sequence[int], Any], tuple[NDArray[np.float64], Any]]


class Spelling(Protocol):
    """How a tokenizer writes; see ``xtoken.pipeline.tokens.canonical.Canonical``."""

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """[V] what each token stands for; nothing for control tokens."""
        ...

    @property
    def lead(self) -> bytes:
        """What the tokens of a text begin with, and the text does not."""
        ...

    def lead_of(self, data: bytes) -> bytes:
        """What they begin with in front of this text, which may have it already."""
        ...

    def encode(self, data: bytes) -> list[int]:
        """The tokens of a text, ``lead_of`` it included."""
        ...

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether a text with these tokens may end here."""
        ...

    def viable(self, ids: Sequence[int], following: Sequence[int]) -> list[bool]:
        """Which tokens may follow."""
        ...


@dataclass(frozen=True)
class Next:
    """What may follow bytes.

    Attributes:
        p: float64 [257], sums to 1.
        lost: share of the mass on tokens that the tokenizer would not write here, and on control tokens other than END.
        undecided: share of the mass that nobody has looked at; it counts as what it seems.
    """

    p: NDArray[np.float64]
    lost: float
    undecided: float


class SortedTokens:
    """The tokens that spell something, in order of their bytes.

    Attributes:
        id_M: int64, their ids.
        pieces: their bytes.
    """

    def __init__(self, token_bytes: Sequence[bytes], size: int) -> None:
        """Of a vocabulary, of which a model's head has the first ``size`` ids."""
        spelt = [token for token, data in enumerate(token_bytes[:size]) if data]
        self.id_M = np.array(sorted(spelt, key=lambda token: (token_bytes[token], token)), np.int64)
        self.pieces = [token_bytes[token] for token in self.id_M.tolist()]
        self._splits: dict[bytes, NDArray[np.int64]] = {}

    def spelling(self, data: bytes) -> range:
        """The tokens with these bytes."""
        return range(bisect_left(self.pieces, data), bisect_left(self.pieces, data + b"\0"))

    def splits(self, data: bytes) -> NDArray[np.int64]:
        """[257] where the tokens begin that start with ``data`` and go on with each byte, and where all of them end."""
        found = self._splits.get(data)
        if found is None:
            low = bisect_left(self.pieces, data + b"\0")
            starts = [low := bisect_left(self.pieces, data + bytes([byte]), low) for byte in range(256)]
            beyond = data.rstrip(b"\xff")
            after = beyond[:-1] + bytes([beyond[-1] + 1]) if beyond else None
            end = len(self.pieces) if after is None else bisect_left(self.pieces, after, low)
            if len(self._splits) >= _KEPT:
                self._splits.clear()
            found = self._splits[data] = np.array([*starts, end], np.int64)
        return found


@dataclass(eq=False)
class _Stem:
    """Whole tokens at the beginning of the bytes; what may follow them is not looked at before it matters.

    Attributes:
        end: bytes that they spell.
        weight: log-probability of the tokens.
        before: what ``Score`` gave for the tokens without the last.
        tails: until it is looked at: these tokens and all longer ones that go on from them, with the bytes they spell.
            Where none is left, the tokens lead nowhere.
        after: what ``Score`` gave for these.
        logp_M, p_M: of what follows; None until it is looked at.
        known_M: whether a token may follow.
        p_end: probability of END, 0 where no text may end.
    """

    ids: tuple[int, ...]
    end: int
    weight: float
    before: Any
    tails: list[tuple[tuple[int, ...], int]]
    after: Any = None
    logp_M: NDArray[np.float64] | None = None
    p_M: NDArray[np.float64] | None = None
    known_M: NDArray[np.int8] | None = None
    p_end: float = 0.0


class Covers:
    """All covers of a growing string of bytes under one model.

    Mass that cannot matter is not looked at: beginnings that few covers go through are left without a forward pass,
    and improbable tokens unchecked, while together they are below ``floor`` of Z. Both are looked at once it matters.
    """

    def __init__(
        self,
        spelling: Spelling,
        tokens: SortedTokens,
        score: Score,
        ends: Sequence[int],
        floor: float = FLOOR,
        lead: bytes | None = None,
    ) -> None:
        """Start with no bytes.

        Args:
            spelling: of the model's tokenizer.
            tokens: of the same, as many as the model has.
            score: the model behind its context token.
            ends: ids that end a text.
            floor: share of Z that may stay undecided; 0 is exact.
            lead: of the text that is to come (``Spelling.lead_of``); ``Spelling.lead`` when left out.
        """
        self._spelling, self._score, self._ends, self._floor = spelling, score, list(ends), floor
        self._tokens = tokens
        self._data = spelling.lead if lead is None else lead
        self._stems = [self._stem((), 0, 0.0, None)]
        self._settle()

    def next(self) -> Next:
        """The distribution of the next symbol.

        Raises:
            ValueError: the bytes so far have no cover.
        """
        mass, lost, undecided = self._masses()
        total = float(mass.sum())
        if total <= 0:
            raise ValueError(f"no tokens cover the bytes {self._data[-40:]!r}")
        return Next(mass / total, lost / (total + lost), undecided / (total + lost))

    def take(self, byte: int) -> float:
        """log P(byte | bytes so far), -inf where it cannot follow; the byte is added."""
        denominator = self._log_total()
        self._data += bytes([byte])
        for stem in list(self._stems):
            if stem.p_M is not None:
                self._spawn(stem, len(self._data))
            else:
                self._follow(stem, len(self._data))
        self._stems = [stem for stem in self._stems if self._leads_on(stem)]
        self._settle()
        # what goes on from here, with what is lost here: Z of the bytes and the new one
        mass, lost, _ = self._masses()
        total = float(mass.sum()) + lost
        return self._shift() + math.log(total) - denominator if total > 0 else -math.inf

    def log_end(self) -> float:
        """log P(END | bytes so far)."""
        end = float(self._masses()[0][END])
        return self._shift() + math.log(end) - self._log_total() if end > 0 else -math.inf

    def _shift(self) -> float:
        """The largest weight: masses are relative to it, and do not underflow."""
        return max((stem.weight for stem in self._stems), default=0.0)

    def _log_total(self) -> float:
        total = float(self._masses()[0].sum())
        return self._shift() + math.log(total) if total > 0 else math.inf

    def _range(self, stem: _Stem) -> tuple[int, int]:
        """The tokens that begin with the rest of the bytes and go on."""
        splits = self._tokens.splits(self._data[stem.end :])
        return int(splits[0]), int(splits[-1])

    def _leads_on(self, stem: _Stem) -> bool:
        low, high = self._range(stem)
        return stem.end == len(self._data) or (low < high if stem.p_M is not None else bool(stem.tails))

    def _stem(self, ids: tuple[int, ...], end: int, weight: float, before: Any) -> _Stem:
        stem = _Stem(ids, end, weight, before, [(ids, end)])
        for stop in range(end + 1, len(self._data) + 1):
            self._follow(stem, stop)
        return stem

    def _follow(self, stem: _Stem, stop: int) -> None:
        """Which tails of a beginning nobody has looked at go on with the bytes up to ``stop``."""
        tails = []
        for ids, end in stem.tails:
            rest = self._data[end:stop]
            splits = self._tokens.splits(rest)
            longer = range(int(splits[0]), int(splits[-1]))
            # many are not worth the time: a tail more does no harm
            if len(longer) > _FEW or any(self._may(ids, longer)):
                tails.append((ids, end))
            exact = self._tokens.spelling(rest)
            following = [int(self._tokens.id_M[at]) for at in exact]
            tails += [((*ids, token), stop) for token, may in zip(following, self._may(ids, exact), strict=True) if may]
        stem.tails = tails

    def _may(self, ids: Sequence[int], places: range) -> list[bool]:
        return self._spelling.viable(ids, self._tokens.id_M[places.start : places.stop].tolist()) if places else []

    def _masses(self) -> tuple[NDArray[np.float64], float, float]:
        """[257] by next symbol, what is lost, and how much of the first is undecided, relative to ``_shift``."""
        mass, lost, undecided, shift = np.zeros(257), 0.0, 0.0, self._shift()
        for stem in self._stems:
            weight = math.exp(stem.weight - shift)
            if stem.p_M is None or stem.known_M is None:
                undecided += weight
                continue
            splits = self._tokens.splits(self._data[stem.end :])
            low, high = self._range(stem)
            known_M, p_M = stem.known_M[low:high], stem.p_M[low:high]
            sums = _segments(np.where(known_M == _REFUSED, 0.0, p_M), splits - low)
            mass[:256] += weight * sums
            undecided += weight * float(p_M[known_M == _UNKNOWN].sum())
            if stem.end == len(self._data):
                mass[END] += weight * stem.p_end
                lost += weight * max(0.0, 1 - float(sums.sum()) - stem.p_end)
        return mass, lost, undecided

    def _settle(self) -> None:
        """Look at beginnings and tokens, the heaviest first, until the rest is below the floor."""
        while True:
            mass, lost, _ = self._masses()
            shift = self._shift()
            asleep = sorted((s for s in self._stems if s.p_M is None), key=lambda stem: stem.weight)
            weights = np.exp(np.array([stem.weight - shift for stem in asleep]))
            budget = self._floor * (float(mass.sum()) + lost + float(weights.sum())) / 2
            awake = asleep[int((np.cumsum(weights) <= budget).sum()) :]
            for stem in awake:
                self._wake(stem)
            if not awake and not self._check(budget, shift):
                return

    def _wake(self, stem: _Stem) -> None:
        """Look at what follows a beginning, and at the longer ones that it brings."""
        logp_V, stem.after = self._score(stem.ids, stem.before)
        stem.before, stem.tails = None, []
        stem.logp_M = logp_V[self._tokens.id_M]
        stem.p_M, stem.known_M = np.exp(stem.logp_M), np.zeros(len(stem.logp_M), np.int8)
        if stem.end == len(self._data) and self._spelling.complete(stem.ids):
            stem.p_end = float(np.exp(logp_V[self._ends]).sum())
        for stop in range(stem.end + 1, len(self._data) + 1):
            self._spawn(stem, stop)

    def _spawn(self, stem: _Stem, stop: int) -> None:
        """The beginnings that one token more makes, which ends at byte ``stop``."""
        assert stem.logp_M is not None
        places = [at for at in self._tokens.spelling(self._data[stem.end : stop]) if stem.logp_M[at] > -math.inf]
        for at in self._viable(stem, np.array(places, np.int64)):
            ids = (*stem.ids, int(self._tokens.id_M[at]))
            child = self._stem(ids, stop, stem.weight + float(stem.logp_M[at]), stem.after)
            if self._leads_on(child):
                self._stems.append(child)

    def _viable(self, stem: _Stem, places_M: NDArray[np.int64]) -> list[int]:
        """Those of these tokens that may follow a beginning; what is found is kept."""
        assert stem.known_M is not None
        unknown = places_M[stem.known_M[places_M] == _UNKNOWN]
        if len(unknown):
            found = np.array(self._spelling.viable(stem.ids, self._tokens.id_M[unknown].tolist()))
            stem.known_M[unknown] = np.where(found, _VIABLE, _REFUSED)
        kept: list[int] = places_M[stem.known_M[places_M] == _VIABLE].tolist()
        return kept

    def _check(self, budget: float, shift: float) -> bool:
        """Decide about the most probable unknown tokens until the others are within the budget; False: they are."""
        places, masses, owners = [], [], []
        for at, stem in enumerate(self._stems):
            if stem.p_M is None or stem.known_M is None:
                continue
            low, high = self._range(stem)
            unknown = np.flatnonzero((stem.known_M[low:high] == _UNKNOWN) & (stem.p_M[low:high] > 0)) + low
            places.append(unknown)
            masses.append(stem.p_M[unknown] * math.exp(stem.weight - shift))
            owners.append(np.full(len(unknown), at))
        mass = np.concatenate([np.zeros(0), *masses])
        if mass.sum() <= budget or not len(mass):
            return False
        order = np.argsort(mass, kind="stable")
        chosen = order[int((np.cumsum(mass[order]) <= budget).sum()) :]
        place, owner = np.concatenate(places), np.concatenate(owners)
        for at in np.unique(owner[chosen]).tolist():
            self._viable(self._stems[at], place[chosen[owner[chosen] == at]])
        return True


def _segments(values: NDArray[np.float64], splits: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of the values between consecutive splits, each by itself: a difference of sums would lose small ones."""
    sums = np.zeros(len(splits) - 1)
    filled = splits[1:] > splits[:-1]
    if filled.any():
        sums[filled] = np.add.reduceat(values, splits[:-1][filled])
    return sums
