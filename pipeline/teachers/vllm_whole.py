"""Figures of whole rows on their way through vLLM, which has room for ids and floats of the top k only.

Of each row vLLM carries ids and floats [1 + W], the label's first. W = K + E is asked for where vLLM's own rows have K,
and the E columns behind the K are ours: floats are log-sum-exp, log P(a word begins), normalisers and entropy; ids are
the sampled tokens.

Shapes: N rows, K entries, E further columns, W = K + E, D sampled tokens of a row, n temperatures other than 1, U width
of the output head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.base import Draws, entries_asked
from xtoken.pipeline.teachers.draws import Sampler, counted, refuse_empty
from xtoken.pipeline.teachers.logit_rows import RowFigures, RowReader, refuse_overflow
from xtoken.pipeline.teachers.vllm_replies import Entries
from xtoken.schemas.configs.capture import CodecGroup

if TYPE_CHECKING:  # vLLM's workers import this file, and its CPU build stumbles over numba
    from xtoken.pipeline.tokens import TokenTable

UNIFORMS = "xtoken_uniforms"
"""Name in ``SamplingParams.extra_args`` of a prompt's numbers for sampling: the bytes of float64 [R]."""
_LSE, _SPACE, _TAUS = 0, 1, 2
_SLACK = 1e-4  # nats: float32 rounding of a sum
_SAMPLE_SLACK = 0.1  # samples: a sum of probabilities in float32 against one in float64


class Figures(NamedTuple):
    """Fields of ``TeacherRows`` that the top k does not give."""

    lse: NDArray[np.float32]
    space_logprob: NDArray[np.float32]
    tau_lognorm: NDArray[np.float32] | None
    draws: Draws | None


@dataclass(frozen=True)
class Whole:
    """What is wanted of whole rows, and in which columns it lies.

    Attributes:
        k: K.
        starts_U: bool, tokens that begin a word.
        temperatures: [n], of the normalisers.
        sampler: None where nothing is sampled.
    """

    k: int
    starts_U: NDArray[np.bool_]
    temperatures: tuple[float, ...] = ()
    sampler: Sampler | None = None

    @classmethod
    def of(cls, codec: CodecGroup, table: "TokenTable", vocab_rows: int) -> "Whole":
        """What a codec asks for of a head so wide."""
        starts_U = np.zeros(vocab_rows, np.bool_)
        found = table.word_starts(codec.space)[:vocab_rows]
        starts_U[: len(found)] = found
        sampler = Sampler.of(codec, table.size)
        return cls(entries_asked(codec, vocab_rows), starts_U, tuple(codec.temperatures), sampler)

    @property
    def width(self) -> int:
        """W."""
        return self.k + _columns(len(self.temperatures), 0 if self.sampler is None else self.sampler.draws)

    def wire(self) -> tuple[Any, ...]:
        """Arguments from which ``from_wire`` makes the same, of types that every transport of vLLM's carries."""
        sampler = None if self.sampler is None else [self.sampler.draws, self.sampler.seed, self.sampler.size]
        return self.k, len(self.starts_U), np.packbits(self.starts_U).tobytes(), list(self.temperatures), sampler

    @classmethod
    def from_wire(
        cls, k: int, size: int, starts: bytes, temperatures: list[float], sampler: list[int] | None
    ) -> "Whole":
        """See ``wire``."""
        starts_U = np.unpackbits(np.frombuffer(starts, np.uint8), count=size).astype(np.bool_)
        return cls(k, starts_U, tuple(temperatures), None if sampler is None else Sampler(*sampler))

    def reader(self, device: torch.device) -> RowReader:
        """What computes the figures."""
        space_P = torch.from_numpy(np.flatnonzero(self.starts_U)).to(device)
        return RowReader(self.k, space_P, self.temperatures, self.sampler)

    def uniforms(self, ids: NDArray[np.int32]) -> dict[str, bytes] | None:
        """``SamplingParams.extra_args`` of a prompt."""
        return None if self.sampler is None else {UNIFORMS: self.sampler.uniforms(ids).tobytes()}

    def packed(self, found: RowFigures, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int64 and floats float32, both [N, 1 + W]."""
        ids_NW = target_N.new_zeros((len(target_N), 1 + self.width))
        float_NW = found.logprob.new_zeros((len(target_N), 1 + self.width))
        ids_NW[:, 0], float_NW[:, 0] = target_N, found.target_logprob
        ids_NW[:, 1 : 1 + self.k], float_NW[:, 1 : 1 + self.k] = found.ids, found.logprob
        ids_NE, float_NE = ids_NW[:, 1 + self.k :], float_NW[:, 1 + self.k :]
        float_NE[:, _LSE], float_NE[:, _SPACE] = found.lse, found.space_logprob
        float_NE[:, _TAUS : self._entropy] = found.tau_lognorm
        if self.sampler is not None:
            float_NE[:, self._entropy] = found.entropy
            ids_NE[:, : self.sampler.draws] = found.draws
        return ids_NW, float_NW

    def unpacked(self, found: Entries) -> tuple[Entries, Figures]:
        """A reply's entries [N, 1 + W] as those of the top k and the figures.

        Raises:
            XtokenError: the logits are not finite numbers, or there was nothing to sample from.
        """
        ids_NW, float_NW, rank_N = found
        ids_NE, float_NE = ids_NW[:, 1 + self.k :], float_NW[:, 1 + self.k :]
        lse_N = float_NE[:, _LSE].copy()
        refuse_overflow(lse_N)
        draws = None
        if self.sampler is not None:
            entropy_N = float_NE[:, self._entropy].copy()
            refuse_empty(entropy_N, self.sampler.size)
            draws = counted(ids_NE[:, : self.sampler.draws], entropy_N)
        tau_Nn = float_NE[:, _TAUS : self._entropy].copy() if self.temperatures else None
        ids_NK, float_NK = ids_NW[:, : 1 + self.k].copy(), float_NW[:, : 1 + self.k].copy()
        return (ids_NK, float_NK, rank_N), Figures(lse_N, float_NE[:, _SPACE].copy(), tau_Nn, draws)

    def broken(self, found: Figures) -> str | None:
        """What of the figures no row can have; None where all is as it may be. Costs next to nothing."""
        if not (found.space_logprob <= 0).all():
            return "log P(a word begins) is NaN, or above 0"
        if found.tau_lognorm is not None and not np.isfinite(found.tau_lognorm).all():
            return "a normaliser is not finite"
        if found.draws is None or self.sampler is None:
            return None
        inside = (found.draws.ids >= 0).all() and (found.draws.ids < self.sampler.size).all()
        return None if inside else "a sampled token lies outside the tokenizer's vocabulary"

    def misfit(self, top: Entries, found: Figures) -> str | None:
        """What of the figures does not fit the entries; None where all of it does. For a self-test."""
        ids_NK, logprob_NK = top[0][:, 1:], top[1][:, 1:].astype(np.float64)
        p_NK = np.exp(logprob_NK)
        tail_N = np.maximum(1.0 - p_NK.sum(axis=1), 0.0)
        least_N = np.where(self.starts_U[ids_NK], p_NK, 0.0).sum(axis=1)
        space_N = np.exp(found.space_logprob.astype(np.float64))
        if not ((space_N >= least_N - _SLACK) & (space_N <= least_N + tail_N + _SLACK)).all():
            return "P(a word begins) does not fit the most probable tokens"
        for at, tau in enumerate(self.temperatures):
            assert found.tau_lognorm is not None
            least_N = np.log(np.exp(logprob_NK / tau).sum(axis=1))
            most = max(0.0, (1 - 1 / tau) * np.log(len(self.starts_U)))  # of one distribution that is sure, or even
            norm_N, slack = found.tau_lognorm[:, at].astype(np.float64), _SLACK / min(tau, 1.0)
            if not ((norm_N >= least_N - slack) & (norm_N <= most + slack)).all():
                return f"the normaliser at temperature {tau:g} does not fit the most probable tokens"
        return None if found.draws is None or self.sampler is None else _draws_misfit(top, found.draws, self.sampler)

    @property
    def _entropy(self) -> int:
        return _TAUS + len(self.temperatures)


def _draws_misfit(top: Entries, draws: Draws, sampler: Sampler) -> str | None:
    """Of systematic samples, a token has as many as its share says, up or down by less than one."""
    if not (draws.entropy <= np.log(sampler.size) + _SLACK).all():
        return "an entropy is above that of an even distribution"
    first_N, p_N = top[0][:, 1], np.exp(top[1][:, 1].astype(np.float64))
    row_K = np.repeat(np.arange(len(draws.drawn)), draws.drawn)
    count_N = np.bincount(row_K, np.where(draws.ids == first_N[row_K], draws.count, 0), len(first_N))
    inside_N = first_N < sampler.size
    if not (count_N >= sampler.draws * p_N - 1 - _SAMPLE_SLACK)[inside_N].all():  # a padded head's mass comes on top
        return "the most probable token was not sampled as often as it is probable"
    return None


def columns(codec: CodecGroup) -> int:
    """E of a codec."""
    sampling = codec.settings.sampling
    return _columns(len(codec.temperatures), 0 if sampling is None else sampling[0])


def _columns(temperatures: int, draws: int) -> int:
    return max(_TAUS + temperatures + (draws > 0), draws)
