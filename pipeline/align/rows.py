"""The teacher rows of a batch, decoded, and which of them belong to each chunk.

Shapes: N samples, T teacher tokens, R teacher rows, C chunks, K kept entries, all samples of the batch together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import Joined, gaps, offsets_of
from xtoken.pipeline.align.kernels_rows import mean_rows, tempered
from xtoken.pipeline.project.stops import StopPair
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.schemas.codecs import registered
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CodecInfo
from xtoken.schemas.spans import row_of_token, rows_per_sample

_FINE = 2.0**-10  # nats; of 16 bits the largest is then 64 nats


@dataclass(frozen=True)
class Recipe:
    """What is built of the rows.

    Attributes:
        losses: names of ``xtoken.schemas.losses.LOSSES``.
        merge: how a chunk's rows become one: first | last | mean.
        tau: temperature of the targets.
        codec: how the capture stored its rows.
        entries: most entries of a P-KL target; None = all.
        rest_lost: the capture was imported from rows whose tail mass nobody knows.
    """

    losses: Sequence[str]
    merge: str
    tau: float
    codec: CodecInfo
    entries: int | None = None
    rest_lost: bool = False

    @property
    def rest_known(self) -> bool:
        """Whether the capture holds the tail mass at ``tau``."""
        return self.tau in self.codec.temperatures and not self.rest_lost

    @property
    def step(self) -> float:
        """Nats: unit of what targets hold in steps. That of the capture's rows, where targets are these rows; finer,
        where what they hold lies on no grid: rounding must not outweigh the rounding of the capture, nor bias means."""
        on_grid = self.tau == 1 and self.merge != "mean" and not self.drawn
        return self.codec.step if on_grid else _FINE

    @property
    def drawn(self) -> bool:
        """Whether rows are right in the mean only, so that targets must be linear in them."""
        return registered(self.codec.name).linear


@dataclass(frozen=True)
class Rows:
    """Rows that sum to 1 with the tail mass, or alone where the tail mass is unknown.

    Attributes:
        offsets: int64 [R + 1]; row r has entries ``offsets[r]:offsets[r + 1]``.
        ids: int32 [K], teacher ids.
        logprob: float64 [K], nats.
        rest: float64 [R], nats: log of the tail mass; -inf = none, NaN = unknown.
        p: float64 [K], probabilities of the entries.
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprob: NDArray[np.float64]
    rest: NDArray[np.float64]
    p: NDArray[np.float64]

    @classmethod
    def of(
        cls, offsets: NDArray[np.int64], ids: NDArray[np.int32], logprob: NDArray[np.float64], rest: NDArray[np.float64]
    ) -> "Rows":
        """Rows from their logarithms."""
        return cls(offsets, ids, logprob, rest, np.exp(logprob))


@dataclass(frozen=True)
class RowBatch:
    """All rows of a batch.

    Attributes:
        rows: at the recipe's temperature.
        entropy: float64 [R], nats, at temperature 1, the tail as one cell (of samples: of all); NaN = no entries.
        top1: float64 [R], the largest probability at temperature 1 (of samples: the largest share); NaN = no entries.
        realised: float64 [R], nats: log-probability of the token in the text at the recipe's temperature.
        offset_N: int64 [N + 1]; sample n has rows ``offset_N[n]:offset_N[n + 1]``.
        token_N: int64 [N + 1]; sample n has teacher tokens ``token_N[n]:token_N[n + 1]``.
        row_T: int64 [T + 1], the row of each teacher token, -1 = none, and -1 behind the last.
    """

    rows: Rows
    entropy: NDArray[np.float64]
    top1: NDArray[np.float64]
    realised: NDArray[np.float64]
    offset_N: NDArray[np.int64]
    token_N: NDArray[np.int64]
    row_T: NDArray[np.int64]

    @classmethod
    def of(cls, batch: pa.RecordBatch, recipe: Recipe) -> "RowBatch":
        """Decode a batch of ``CaptureParts.read``.

        Raises:
            VerificationError: lists of a sample do not fit each other.
        """
        codec = open_codec(recipe.codec)
        without_N = list_lengths(batch, "teacher_ids") - rows_per_sample(batch)
        rows_N = _rows_of(batch, without_N)
        _check_lengths(batch, rows_N, without_N, codec)
        whole = codec.whole(batch)
        plain = Rows(whole.offsets, whole.ids, whole.logprob, whole.tail_logprob, whole.p)
        rows, realised_R = plain, flat(batch, "realised_logprob").astype(np.float64)
        if recipe.tau != 1:
            rest_R = codec.tail_at(batch, recipe.tau, len(plain.rest))
            logprob_K, shift_R = tempered(plain.offsets, plain.logprob, rest_R, recipe.tau)
            rows = Rows.of(plain.offsets, plain.ids, logprob_K, rest_R)
            # The scale comes from rounded entries, so the token may end up a step above certainty.
            realised_R = np.minimum(realised_R / recipe.tau - shift_R, 0.0)
        unknown_R = np.diff(plain.offsets) == 0
        entropy_R, top1_R = (np.where(unknown_R, np.nan, values) for values in (whole.entropy, whole.top1))
        offset_N, token_N = (offsets_of(lengths) for lengths in (rows_N, list_lengths(batch, "teacher_ids")))
        return cls(rows, entropy_R, top1_R, realised_R, offset_N, token_N, np.append(row_of_token(batch), -1))

    def folded(self, stops: StopPair | None) -> "RowBatch":
        """The same with the mass of the teacher's eos on what ends an answer; entropy and top1 stay."""
        if stops is None or stops.teacher_eos is None:
            return self
        return replace(self, rows=joined_tokens(self.rows, stops.teacher_eos, stops.teacher))

    def spans(self, samples: Sequence[Joined]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of each chunk's teacher tokens, start and end [C]; start -1 where the first token has no row."""
        empty = np.zeros(0, np.int64)
        tokens = [sample.chunks.teacher_end + self.token_N[sample.at] for sample in samples]
        starts = [np.append(self.token_N[one.at], end)[: len(end)] for one, end in zip(samples, tokens, strict=True)]
        before_T = np.append(0, np.cumsum(self.row_T[:-1] >= 0))  # rows of the tokens before each
        start_C = np.where(gaps(samples), -1, self.row_T[np.concatenate([empty, *starts])])
        return start_C, before_T[np.concatenate([empty, *tokens])]

    def after(self, samples: Sequence[Joined]) -> NDArray[np.int64]:
        """The row behind each chunk, that of the sample's next teacher token, [C]; -1 = none."""
        found = [np.zeros(0, np.int64)]
        for sample in samples:
            end_C = sample.chunks.teacher_end + self.token_N[sample.at]
            found.append(np.where(end_C < self.token_N[sample.at + 1], self.row_T[end_C], -1))
        return np.concatenate(found)


def joined_tokens(rows: Rows, token: int, to: int) -> Rows:
    """Rows in which one token's mass is another's."""
    from_K = np.flatnonzero(rows.ids == token)
    if not len(from_K):
        return rows
    to_K = np.flatnonzero(rows.ids == to)
    row_of, row_to = (np.searchsorted(rows.offsets, at, side="right") - 1 for at in (from_K, to_K))
    _, both, there = np.intersect1d(row_of, row_to, return_indices=True)
    ids, logprob, p = rows.ids.copy(), rows.logprob.copy(), rows.p.copy()
    ids[from_K] = to
    logprob[to_K[there]] = np.logaddexp(logprob[to_K[there]], logprob[from_K[both]])
    p[to_K[there]] += p[from_K[both]]
    kept = np.ones(len(ids), np.bool_)
    kept[from_K[both]] = False
    return Rows(offsets_of(kept.astype(np.int64))[rows.offsets], ids[kept], logprob[kept], rows.rest, p[kept])


def merge_rows(
    rows: Rows, start_C: NDArray[np.int64], end_C: NDArray[np.int64], merge: str, size: int
) -> tuple[Rows, NDArray[np.int64]]:
    """The one row of each chunk: rows, and the index of each chunk's among them [C], -1 = none.

    Args:
        rows: at the targets' temperature.
        start_C, end_C: from ``RowBatch.spans``.
        merge: first | last | mean (of log-probabilities: see ``mean_rows``; the tail mass is then what
            it leaves to 1).
        size: U, the teacher's vocabulary.
    """
    if merge == "first":
        return rows, start_C
    if merge == "last":
        return rows, np.where(start_C < 0, -1, end_C - 1)
    means = mean_rows(start_C, end_C, rows.offsets, rows.ids, rows.logprob, rows.rest, size)
    return Rows.of(*means), np.where(start_C < 0, -1, np.arange(len(start_C)))


def _rows_of(batch: pa.RecordBatch, without_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distributions of each sample, [N]: what two of three columns agree on, so that the odd one can be named."""
    tokens = [list_lengths(batch, name) - without_N for name in ("teacher_ids", "teacher_end")]
    rows_N: NDArray[np.float64] = np.median([*tokens, list_lengths(batch, "realised_logprob")], axis=0)
    return rows_N.astype(np.int64)


def _check_lengths(
    batch: pa.RecordBatch, rows_N: NDArray[np.int64], without_N: NDArray[np.int64], codec: Codec
) -> None:
    """Raise VerificationError where a sample's lists do not fit each other (compiled loops do not look)."""
    tokens_N = rows_N + without_N
    wanted = {"teacher_ids": tokens_N, "teacher_end": tokens_N, "realised_logprob": rows_N}
    wanted |= {name: length_N for name, length_N in codec.lengths(batch, rows_N).items() if name in batch.schema.names}
    has_space_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
    wanted["space_logprob"] = np.where(has_space_N, rows_N, 0)
    for name, length_N in wanted.items():
        bad_N = list_lengths(batch, name) != length_N
        if bad_N.any():
            sample = batch["sample_id"][int(bad_N.argmax())].as_py()
            raise VerificationError(
                f"sample {sample!r}: {name} has another length than its rows; "
                "'xtoken verify' on the capture lists what is damaged"
            )
