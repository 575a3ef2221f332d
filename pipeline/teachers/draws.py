"""Tokens of whole teacher distributions (rows) by systematic sampling, with numpy and nothing else.

With C the cumulative distribution in the order of ids and one uniform number u of a row, token v is sampled

    floor(D C_v + u) - floor(D C_{v-1} + u)

times: D p_v in the mean over u, never a whole one away from it, and D in all. That is far less noise than D independent
samples. Sample j is the first token with C_v >= (j + 1 - u) / D, which is the same.

Sampled from is the distribution over the tokenizer's ids: what a padded output head puts behind them is left out and
the rest renormalised.

Shapes: T tokens of a sequence, R = T - 1 rows, D samples of a row, K different ids sampled, rows after each other,
U teacher vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import Draws
from xtoken.schemas.configs.capture import CodecGroup
from xtoken.schemas.errors import XtokenError


@dataclass(frozen=True)
class Sampler:
    """What rows are sampled with.

    Attributes:
        draws: D, of each row.
        seed: of the uniform numbers.
        size: ids from here on (a padded head) are not sampled.
    """

    draws: int
    seed: int
    size: int

    @classmethod
    def of(cls, codec: CodecGroup, size: int) -> "Sampler | None":
        """The sampler of a run; None where its codec asks for no sampled tokens."""
        sampling = codec.settings.sampling
        return None if sampling is None else cls(*sampling, size)

    def uniforms(self, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """[R] numbers in [0, 1) of a sequence of T tokens (BOS included).

        They follow from the seed and the tokens alone, so that batches, workers and shards change no sample. Raw output
        of the generator is used, which numpy promises not to change.
        """
        key = blake2b(f"{self.seed}:".encode() + ids.astype("<i4").tobytes(), digest_size=16).digest()
        raw_R = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(ids) - 1)
        return (raw_R >> np.uint64(11)).astype(np.float64) * 2.0**-53


def thresholds(uniform_R: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """[R, D] in (0, 1], ascending: sample j is the first token whose cumulative share reaches number j."""
    share_RD: NDArray[np.float64] = (np.arange(1, draws + 1) - uniform_R[:, None]) / draws
    return share_RD


def draw_row(p_U: NDArray[np.float64], uniform: float, draws: int) -> NDArray[np.int32]:
    """[D] ids sampled from one row, ascending.

    Args:
        p_U: what each id weighs; need not sum to 1.
        uniform: the row's number in [0, 1).
        draws: D.
    """
    running_U = np.cumsum(p_U)
    share_D = thresholds(np.array([uniform]), draws)[0]
    ids_D: NDArray[np.int32] = np.searchsorted(running_U, share_D * running_U[-1]).astype(np.int32)
    return ids_D


def refuse_empty(entropy_R: NDArray[np.float32], size: int) -> None:
    """Raise XtokenError where the tokenizer's ids carry no mass in a row, whose entropy is NaN then."""
    if np.isnan(entropy_R).any():
        raise XtokenError(
            f"a teacher row has no mass on the tokenizer's {size} tokens; this tokenizer is not the teacher's"
        )


def counted(ids_RD: NDArray[np.int32], entropy_R: NDArray[np.float32]) -> Draws:
    """Sampled tokens of rows in the order in which they are stored, from ids that ascend within each row."""
    rows, draws = ids_RD.shape
    new_RD = np.ones(ids_RD.shape, np.bool_)
    new_RD[:, 1:] = ids_RD[:, 1:] != ids_RD[:, :-1]
    at_K = np.flatnonzero(new_RD)
    count_K = np.diff(at_K, append=rows * draws)
    ids_K = ids_RD.ravel()[at_K]
    order_K = np.lexsort((ids_K, -count_K, at_K // draws))
    drawn_R = new_RD.sum(axis=1)
    return Draws(
        drawn_R.astype(np.int32), ids_K[order_K].astype(np.int32), count_K[order_K].astype(np.int32), entropy_R
    )


def join_draws(parts: Sequence[Draws | None]) -> Draws | None:
    """Consecutive rows as one; all parts have sampled tokens or none has."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts))
    if not present:
        return None
    names = ("drawn", "ids", "count", "entropy")
    return Draws(*(np.concatenate([getattr(part, name) for part in present]) for name in names))


def cut_draws(draws: Draws | None, start: int, stop: int) -> Draws | None:
    """Sampled tokens of rows ``start`` to ``stop``."""
    if draws is None:
        return None
    low, high = int(draws.drawn[:start].sum()), int(draws.drawn[:stop].sum())
    return Draws(draws.drawn[start:stop], draws.ids[low:high], draws.count[low:high], draws.entropy[start:stop])
