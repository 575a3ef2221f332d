"""A toy teacher: an exact distribution computed from the last two token ids, without any model.

A few hundred candidate tokens get hashed scores, every other token the same low score, so that
top-k, tail mass, ranks and the mass of tokens that start with a space are known in closed form for
any vocabulary. The whole pipeline is tested on it. Nothing but numpy is needed.

Shapes: R rows, C candidates, K entries asked for, U teacher vocabulary, n temperatures other than 1.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import Batch, Draws, Question, TeacherRows, entries_asked, refuse_k, stream_batches
from xtoken.pipeline.teachers.draws import Sampler, counted, draw_row
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.manifest import TeacherInfo, digest

_CANDIDATES = 256
_CONTEXT = 1 << 20
_BLOCK = 512
_GRAIN = 1024  # scores are multiples of 1/1024 nat: ties are exact, so that their order is the ids'
_SPREAD = 12 * _GRAIN


class FakeTeacher:
    """See the module; ``rows`` is a pure function of the token ids."""

    def __init__(
        self,
        info: TeacherInfo,
        k: int,
        starts_with_space: NDArray[np.bool_],
        temperatures: Sequence[float] = (),
        sampler: Sampler | None = None,
    ) -> None:
        self.info = info
        self.settings: dict[str, str | int | float | bool] = {}
        self._k = k
        self._temperatures = temperatures
        self._sampler = sampler
        self._space_U = starts_with_space
        self._floor = _floor(len(starts_with_space))

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score sequences (see ``xtoken.pipeline.teachers.base.Teacher``)."""
        return [self._sequence(ids) for ids in batch]

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """Batch by batch (see ``xtoken.pipeline.teachers.base.Teacher``)."""
        return stream_batches(self, batches)

    def generate(self, questions: Sequence[Question]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Words that follow from the seed alone, which are whole characters; half of the answers are cut."""
        words = np.flatnonzero(self._space_U)
        for number, question in enumerate(questions):
            random = np.random.default_rng(question.seed)
            count = int(random.integers(1, 2 * question.tokens + 1))
            ids = random.choice(words, min(count, question.tokens)).astype(np.int32)
            if count <= question.tokens and question.stops:
                ids[-1] = question.stops[0]
            yield number, ids

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:
        """None: there is no other way to the same rows."""
        del batch
        return None

    def _sequence(self, ids: NDArray[np.int32]) -> TeacherRows:
        before = np.concatenate([[len(self._space_U)], ids[:-2]]).astype(np.int64)
        last, target = ids[:-1].astype(np.int64), ids[1:].astype(np.int64)
        blocks = [
            self._block(before[start : start + _BLOCK], last[start : start + _BLOCK], target[start : start + _BLOCK])
            for start in range(0, len(last), _BLOCK)
        ]
        columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
        ids_RK, logprob_RK, target_R, rank_R, lse_R, space_R, lognorm_Rn = columns
        given = lognorm_Rn if self._temperatures else None
        draws = None if self._sampler is None else self._draw(before, last, self._sampler.uniforms(ids))
        return TeacherRows(ids_RK, logprob_RK, target_R, rank_R, lse_R, space_R, given, draws)

    def _draw(self, before_R: NDArray[np.int64], last_R: NDArray[np.int64], uniform_R: NDArray[np.float64]) -> Draws:
        """Tokens sampled from the distribution over all of them, one row at a time."""
        assert self._sampler is not None
        size, draws = len(self._space_U), self._sampler.draws
        ids_RD, entropy_R = np.zeros((len(last_R), draws), np.int32), np.zeros(len(last_R), np.float32)
        ids_RC, score_RC = _candidates(before_R, last_R, size)
        for row, uniform in enumerate(uniform_R.tolist()):
            score_U = np.full(size, self._floor)
            score_U[ids_RC[row]] = score_RC[row]
            p_U = np.exp(score_U)
            ids_RD[row] = draw_row(p_U, uniform, draws)
            mass = float(p_U.sum())
            entropy_R[row] = max(0.0, np.log(mass) - float(p_U @ score_U) / mass)
        return counted(ids_RD, entropy_R)

    def _block(
        self, before_R: NDArray[np.int64], last_R: NDArray[np.int64], target_R: NDArray[np.int64]
    ) -> tuple[NDArray[np.generic], ...]:
        """(ids, logprob, target_logprob, target_rank, lse, space_logprob, tau_lognorm) of a block of rows."""
        size = len(self._space_U)
        ids_RC, score_RC = _candidates(before_R, last_R, size)
        flat = size - ids_RC.shape[1]
        lse_R = np.log(np.exp(score_RC).sum(axis=1) + flat * np.exp(self._floor))
        ids_RK, score_RK = _extend(ids_RC, score_RC, min(self._k, size), self._floor)
        hit_RC = ids_RC == target_R[:, None]
        known_R = hit_RC.any(axis=1)
        target_score_R = np.where(known_R, np.where(hit_RC, score_RC, 0.0).sum(axis=1), self._floor)
        unlisted_R = ids_RC.shape[1] + target_R - (ids_RC < target_R[:, None]).sum(axis=1)
        rank_R = 1 + np.where(known_R, hit_RC.argmax(axis=1), unlisted_R)
        space_RC = self._space_U[ids_RC]
        others_R = self._space_U.sum() - space_RC.sum(axis=1)
        space_mass_R = np.where(space_RC, np.exp(score_RC), 0.0).sum(axis=1) + others_R * np.exp(self._floor)
        with np.errstate(divide="ignore"):
            space_R = np.log(space_mass_R) - lse_R
        return (
            ids_RK.astype(np.int32),
            (score_RK - lse_R[:, None]).astype(np.float32),
            (target_score_R - lse_R).astype(np.float32),
            rank_R.astype(np.int32),
            lse_R.astype(np.float32),
            np.minimum(space_R, 0.0).astype(np.float32),
            self._lognorm(score_RC, flat, lse_R),
        )

    def _lognorm(self, score_RC: NDArray[np.float64], flat: int, lse_R: NDArray[np.float64]) -> NDArray[np.float32]:
        """[R, n] log of the sum of p^(1/tau) at each temperature."""
        norms_Rn = np.zeros((len(lse_R), len(self._temperatures)))
        for index, tau in enumerate(self._temperatures):
            mass_R = np.exp((score_RC - lse_R[:, None]) / tau).sum(axis=1) + flat * np.exp((self._floor - lse_R) / tau)
            norms_Rn[:, index] = np.log(mass_R)
        return norms_Rn.astype(np.float32)


def open_teacher(config: TeacherGroup, codec: CodecGroup, table: TokenTable) -> FakeTeacher:
    """The toy teacher over ``table``'s vocabulary; ``config.teacher`` names the tokenizer only.

    Raises:
        XtokenError: k is larger than the vocabulary.
    """
    k = entries_asked(codec, table.size)
    refuse_k(codec, table.size, f"the vocabulary's {table.size} tokens")
    info = TeacherInfo(
        model=config.teacher,
        backend="fake",
        config_hash=digest([_CANDIDATES, _GRAIN, _SPREAD]),
        vocab_rows=table.size,
        context=_CONTEXT,
        dtype="float64",
        head_dtype="float64",
        device="cpu",
        capture_path="fake",
        engine_version="1",
    )
    sampler = Sampler.of(codec, table.size)
    return FakeTeacher(info, k, table.word_starts(codec.space), codec.temperatures, sampler)


def _floor(size: int) -> float:
    """Score of a token that is not a candidate: below every candidate's (0 and more), all of them weigh about e^2."""
    return float(min(-1.0, 2.0 - np.log(size)))


def _hash(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finalizer, on wrapping 64-bit integers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _candidates(
    before_R: NDArray[np.int64], last_R: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distinct candidate ids and their scores, best first and ties by lower id, both [R, C]."""
    count = min(_CANDIDATES, max(1, size // 2))
    seed_R = _hash((before_R * 1_000_003 + last_R + 1).astype(np.uint64))
    index_C = np.arange(count, dtype=np.uint64)
    # consecutive steps of one stride coprime to the vocabulary never meet the same id twice
    hashed_RC = ((seed_R % np.uint64(size))[:, None] + index_C * np.uint64(_stride(size))) % np.uint64(size)
    noise_RC = _hash(seed_R[:, None] + index_C * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    uniform_RC = (noise_RC.astype(np.float64) + 0.5) / 2.0**24
    score_RC = np.floor(np.minimum(-np.log(uniform_RC) * 1.5 * _GRAIN, _SPREAD)) / _GRAIN
    ids_RC = hashed_RC.astype(np.int64)
    order_RC = np.lexsort((ids_RC, -score_RC), axis=1)
    return np.take_along_axis(ids_RC, order_RC, axis=1), np.take_along_axis(score_RC, order_RC, axis=1)


def _stride(size: int) -> int:
    """A number coprime to ``size`` near its golden section."""
    stride = max(1, int(size * 0.6180339887))
    while np.gcd(stride, size) != 1:
        stride += 1
    return stride


def _extend(
    ids_RC: NDArray[np.int64], score_RC: NDArray[np.float64], k: int, floor: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first k entries of the whole ranking: candidates, then the lowest other ids at the floor."""
    count = ids_RC.shape[1]
    if k <= count:
        return ids_RC[:, :k], score_RC[:, :k]
    taken_RU = np.zeros((len(ids_RC), count + k), np.bool_)
    inside_RC = ids_RC < taken_RU.shape[1]
    row_RC = np.broadcast_to(np.arange(len(ids_RC))[:, None], ids_RC.shape)
    taken_RU[row_RC[inside_RC], ids_RC[inside_RC]] = True
    free_RU = np.argsort(taken_RU, axis=1, kind="stable")[:, : k - count]
    floor_RU = np.full(free_RU.shape, floor)
    return np.concatenate([ids_RC, free_RU], axis=1), np.concatenate([score_RC, floor_RU], axis=1)
