"""Bits per byte of models of any tokenizers, and of the mean of what each expects of the next byte."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.ensemble.covers import Covers, SortedTokens, Spelling
from xtoken.trainer.ensemble.next_token import NextToken
from xtoken.trainer.student.model import check_context, head_width, load_student, pick_device

WINDOW = 512  # bytes that are measured in one piece: covers keep a cache each


@dataclass(frozen=True)
class ByteModel:
    """A model by name, and how its tokenizer writes.

    Attributes:
        ends: ids that end a text, eos and eot.
    """

    name: str
    tokenizer: TokenizerInfo
    spelling: Spelling
    ends: tuple[int, ...]


class ByteSample(Protocol):
    """A piece of text; see ``xtoken.pipeline.corpus.byte_windows.ByteWindow``."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def data(self) -> bytes:
        """Whole characters."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the document ends with it."""
        ...


@dataclass
class _Tally:
    """A model, and sums over the bytes that it has read; nats of the ensemble are counted by the first."""

    name: str
    spelling: Spelling
    tokens: SortedTokens
    score: NextToken
    ends: tuple[int, ...]
    nats: float = 0.0
    token_nats: float = 0.0
    lost: float = 0.0
    undecided: float = 0.0
    seconds: float = 0.0

    def figures(self, size: int) -> dict[str, Any]:
        """See ``measure_bytes``."""
        return {
            "model": self.name,
            "bits_per_byte": self.nats / math.log(2) / size,
            "token_bits_per_byte": self.token_nats / math.log(2) / size,
            "lost": self.lost / size,
            "undecided": self.undecided / size,
            "seconds_per_byte": self.seconds / size,
            "passes_per_byte": self.score.passes / size,
        }


def measure_bytes(
    config: EvalConfig, models: Sequence[ByteModel], samples: Sequence[ByteSample], progress: Progress
) -> dict[str, Any]:
    """Bits per byte under the mean over the models of P(next byte), and under each.

    The end of a document counts with its bits and no bytes, where every model has a token for it.

    Returns:
        ``bits_per_byte``, ``bytes``, ``seconds_per_byte``; and by model ``bits_per_byte``; ``token_bits_per_byte``, of
        the tokenizer's own tokens, which is never less; ``lost`` and ``undecided``, means over bytes (see ``Next``);
        ``seconds_per_byte``; ``passes_per_byte``, forward passes.

    Raises:
        XtokenError: no text, a model without a token in front of it, or one that cannot be loaded or is too short.
    """
    if not samples:
        raise XtokenError(
            f"the held-out text {config.text} is empty, or its first character has more bytes than --max-bytes; give a "
            "longer one, or a larger --max-bytes"
        )
    contexts = [_context(model) for model in models]
    tallies = [_load(config, model, context) for model, context in zip(models, contexts, strict=True)]
    size, nats = sum(len(sample.data) for sample in samples), 0.0
    progress.start("bits per byte", size, "bytes")
    for sample in samples:
        nats += _measure(tallies, sample, progress)
    progress.finish()
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "bytes": size,
        "seconds_per_byte": sum(tally.seconds for tally in tallies) / size,
        "models": [tally.figures(size) for tally in tallies],
    }


def _context(model: ByteModel) -> int:
    context = context_token(model.tokenizer)
    if context is None:
        raise XtokenError(
            f"the tokenizer of {model.name} has neither BOS nor EOS to put in front of a text, so the model expects no "
            "first byte; give a model that has one"
        )
    return context


def _load(config: EvalConfig, model: ByteModel, context: int) -> _Tally:
    loaded = load_student(model.name, pick_device(config.device), config.trust_remote_code).eval()
    check_context(loaded, WINDOW + 1, model.name)
    size = min(model.tokenizer.size, head_width(loaded))
    ends = tuple(token for token in model.ends if token < size)
    tokens = SortedTokens(model.spelling.token_bytes, size)
    return _Tally(model.name, model.spelling, tokens, NextToken(loaded, context, size), ends)


def _measure(tallies: Sequence[_Tally], sample: ByteSample, progress: Progress) -> float:
    """Nats of one sample under the mean; those of each model are added up."""
    with_end = sample.complete and all(tally.ends for tally in tallies)
    covers, nats = [_begin(tally, sample, with_end) for tally in tallies], 0.0
    for at, byte in enumerate(sample.data):
        nats += _mean([_step(tally, one, byte) for tally, one in zip(tallies, covers, strict=True)], sample, at)
        progress.advance(1)
    if with_end:
        ends = [one.log_end() for one in covers]
        nats += _mean(ends, sample, len(sample.data))
        for tally, logp in zip(tallies, ends, strict=True):
            tally.nats -= logp
    return nats


def _begin(tally: _Tally, sample: ByteSample, with_end: bool) -> Covers:
    start = time.perf_counter()
    spelling, score = tally.spelling, tally.score
    lead = spelling.lead_of(sample.data)
    covers = Covers(spelling, tally.tokens, score, tally.ends, lead=lead)
    tally.seconds += time.perf_counter() - start
    tally.token_nats += score.nats(spelling.encode(lead + sample.data), tally.ends if with_end else ())
    return covers


def _step(tally: _Tally, covers: Covers, byte: int) -> float:
    """log P of the next byte under one model."""
    start = time.perf_counter()
    following = covers.next()
    logp = covers.take(byte)
    tally.seconds += time.perf_counter() - start
    tally.nats -= logp
    tally.lost += following.lost
    tally.undecided += following.undecided
    return logp


def _mean(logp: Sequence[float], sample: ByteSample, at: int) -> float:
    """-log of the mean of probabilities."""
    if not np.isfinite(logp).all():
        raise XtokenError(
            f"{sample.id}: a model gives probability 0 to what stands at byte {at}, and so has no bits per byte there; "
            "leave this document out"
        )
    return math.log(len(logp)) - float(np.logaddexp.reduce(logp))
