"""Chunks that one side begins with a blank which the text does not have.

Llama-2 and its kin put a dummy space in front of a text and behind added tokens: their first token of "In 1998" is
" In", where another tokenizer has "In". Both cover the same bytes of the text, but W joins tokens of equal bytes, so
the teacher's row for such a chunk is shifted: each of its tokens gives its mass to the one with a blank more, or less.

Shapes: N samples, T tokens of a side, C chunks, R teacher rows, K kept entries, U teacher vocabulary; all samples of a
batch together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import Joined, chunks_per_sample, offsets_of
from xtoken.pipeline.align.rows import Rows
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.tokens import TokenTable

_NONE = -1
_LOST = 0.01  # more than that without a counterpart, and a row says too little of the student's tokens
_TINY = 1e-300  # no sum of probabilities is smaller


@dataclass(frozen=True)
class Shifted:
    """Rows with those of shifted chunks behind them.

    Attributes:
        rows: the rows there were, and two shifted ones for each such chunk.
        row_C: int64 [C], row of each chunk's first teacher token: a shifted one, or the one it was; -1 = none, also
            where tokens without a counterpart had more than a hundredth of the mass (less joins the tail mass).
        prefix_C: likewise, but that mass is on the longest token that the counterpart would begin with, or joins
            the tail mass if there is none.
        moved_C: bool [C], the chunk is one of these.
        brought_C: bool [C], the blank is the teacher's.
    """

    rows: Rows
    row_C: NDArray[np.int64]
    prefix_C: NDArray[np.int64]
    moved_C: NDArray[np.bool_]
    brought_C: NDArray[np.bool_]

    @classmethod
    def none(cls, rows: Rows, start_C: NDArray[np.int64]) -> "Shifted":
        """No chunk is shifted."""
        no_C = np.zeros(len(start_C), np.bool_)
        return cls(rows, start_C, start_C, no_C, no_C)


@dataclass(frozen=True)
class Blanks:
    """Both vocabularies, for the chunks that one side begins with a blank of its own."""

    student: TokenTable
    teacher: TokenTable
    _found: dict[tuple[int, bool, bool], int] = field(default_factory=dict)

    @cached_property
    def _known(self) -> dict[bytes, int]:
        return self.teacher.by_bytes()

    def counterparts(self, ids_K: NDArray[np.int32], *, longer: bool, prefix: bool) -> NDArray[np.int32]:
        """The teacher token with a blank more in front of each of these (or less), int32 [K]; -1 = none.

        Args:
            ids_K: teacher tokens; control tokens stay themselves.
            longer: a blank more.
            prefix: where there is no such token, the longest one that it would begin with.
        """
        return np.array([self._counterpart(token, longer, prefix) for token in ids_K.tolist()], np.int32)

    def _counterpart(self, token: int, longer: bool, prefix: bool) -> int:
        key = (token, longer, prefix)
        if key not in self._found:
            self._found[key] = self._search(token, longer, prefix)
        return self._found[key]

    def _search(self, token: int, longer: bool, prefix: bool) -> int:
        piece = self.teacher.token(token)
        if not piece:
            return token
        if not longer and piece[:1] != b" ":
            return token  # a text that begins with it has no dummy space to lose
        wanted = b" " + piece if longer else piece[1:]
        shortest = 1 if prefix else max(1, len(wanted))
        prefixes = (self._known.get(wanted[:size]) for size in range(len(wanted), shortest - 1, -1))
        return next((known for known in prefixes if known is not None), _NONE)

    def shift(
        self, batch: pa.RecordBatch, samples: Sequence[Joined], rows: Rows, start_C: NDArray[np.int64]
    ) -> Shifted:
        """Shift the rows of chunks that exactly one side begins with a blank of its own.

        Args:
            batch: columns of ``CaptureParts.read``.
            samples: those of the batch that are aligned.
            rows: the teacher's.
            start_C: row of each chunk's first teacher token, -1 = none.
        """
        theirs_C, mine_C = self._brought(batch, samples)
        moved_C = (theirs_C != mine_C) & (start_C >= 0)
        if not moved_C.any():
            return Shifted.none(rows, start_C)
        at_C, row_C, prefix_C = np.flatnonzero(moved_C), start_C.copy(), start_C.copy()
        shifted, kept = list[_Row](), list[bool]()
        for prefix in (False, True):
            for at in at_C:
                row = int(start_C[at])
                ids = rows.ids[rows.offsets[row] : rows.offsets[row + 1]]
                to = self.counterparts(ids, longer=not theirs_C[at], prefix=prefix)
                shifted.append(shifted_row(rows, row, to))
                lost = rows.p[rows.offsets[row] : rows.offsets[row + 1]][to < 0].sum()
                kept.append(prefix or bool(lost <= _LOST))
        place = np.where(kept, len(rows.rest) + np.arange(len(shifted)), _NONE)
        row_C[at_C], prefix_C[at_C] = np.split(place, 2)
        return Shifted(_with(rows, shifted), row_C, prefix_C, moved_C, moved_C & theirs_C)

    def _brought(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether the teacher, and the student, begins each chunk with a blank that the text lacks there, bool [C]."""
        ids, ends, from_N = _tokens(batch, samples)
        first_C, last_C = _ranges([one.chunks.teacher_end for one in samples], from_N)
        # a chunk begins where the teacher's token before it ends, and with it the student's
        at_start_C = first_C == np.repeat(from_N, chunks_per_sample(samples))
        begin_C = np.where(at_start_C, 0, np.append(ends, 0)[first_C - 1])
        theirs = _Side(self.teacher, ids, ends, first_C, last_C)
        mine_N = offsets_of([len(one.encoded.ids) for one in samples])[:-1]
        mine_ids, mine_ends = (
            np.concatenate([np.zeros(0, np.int32), *(getattr(one.encoded, name) for one in samples)])
            for name in ("ids", "ends")
        )
        mine = _Side(self.student, mine_ids, mine_ends, *_ranges([one.chunks.student_end for one in samples], mine_N))
        texts = _Texts(batch, samples)
        return theirs.brings(begin_C, texts), mine.brings(begin_C, texts)


def _tokens(
    batch: pa.RecordBatch, samples: Sequence[Joined]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """The teacher's ids and ends of a batch, and where those of these samples start, [N]."""
    from_N = offsets_of(list_lengths(batch, "teacher_ids"))[[one.at for one in samples]]
    return flat(batch, "teacher_ids"), flat(batch, "teacher_end"), from_N


def _ranges(
    end_C: Sequence[NDArray[np.int32]], from_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token of each chunk and the one after its last, [C], counted over all samples; from their ends in each."""
    lengths = [len(ends) for ends in end_C]
    last_C = np.concatenate([np.zeros(0, np.int64), *end_C]) + np.repeat(from_N, lengths)
    first_C = np.concatenate([np.zeros(1, np.int64), last_C])[:-1]
    filled = np.array(lengths, np.int64) > 0
    first_C[offsets_of(lengths)[:-1][filled]] = from_N[filled]
    return first_C, last_C


class _Texts:
    """The bytes of samples, by the chunk."""

    def __init__(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> None:
        self._texts, self._at = batch["text"], [one.at for one in samples]
        self._chunk_N = offsets_of(chunks_per_sample(samples))
        self._data: dict[int, bytes] = {}

    def of(self, chunk: int) -> bytes:
        sample = self._at[int(np.searchsorted(self._chunk_N, chunk, side="right")) - 1]
        if sample not in self._data:
            self._data[sample] = self._texts[sample].as_py().encode()
        return self._data[sample]


@dataclass(frozen=True)
class _Side:
    """One side's tokens of all samples, and the first and the one after the last of each chunk."""

    table: TokenTable
    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    first_C: NDArray[np.int64]
    last_C: NDArray[np.int64]

    def brings(self, begin_C: NDArray[np.int32], texts: _Texts) -> NDArray[np.bool_]:
        """Whether the first token of each chunk has a blank in front that the text lacks there, bool [C].

        Args:
            begin_C: the byte at which each chunk begins.
            texts: of the samples.
        """
        brings_C = np.zeros(len(begin_C), np.bool_)
        known = np.flatnonzero(self.first_C < self.last_C)  # a gap may hold no token of a side
        token, begin, stop = self.ids[self.first_C[known]], begin_C[known], self.ends[self.first_C[known]]
        size = self.table.offsets[token + 1] - self.table.offsets[token]
        likely = (size == stop - begin + 1) & (stop > begin)
        for chunk, one, start, end in zip(
            *(values[likely].tolist() for values in (known, token, begin, stop)), strict=True
        ):
            brings_C[chunk] = self.table.token(one) == b" " + texts.of(chunk)[start:end]
        return brings_C


_Row = tuple[NDArray[np.int32], NDArray[np.float64], float]


def _with(rows: Rows, added: Sequence[_Row]) -> Rows:
    """Rows with others behind them."""
    ids, logprob, rest = zip(*added, strict=True)
    ends = rows.offsets[-1] + np.cumsum([len(one) for one in ids])
    return Rows.of(
        np.concatenate([rows.offsets, ends]),
        np.concatenate([rows.ids, *ids]),
        np.concatenate([rows.logprob, *logprob]),
        np.concatenate([rows.rest, rest]),
    )


def shifted_row(rows: Rows, row: int, to_K: NDArray[np.int32]) -> _Row:
    """Ids, log-probabilities and the tail mass of a row whose K entries give their mass to others, most probable first.

    Mass of tokens that have no other joins the tail mass; where that is unknown, what is left sums to 1 again.
    """
    p, rest = rows.p[rows.offsets[row] : rows.offsets[row + 1]], float(rows.rest[row])
    ids, place = np.unique(to_K[to_K >= 0], return_inverse=True)
    mass: NDArray[np.float64] = np.bincount(place, weights=p[to_K >= 0], minlength=len(ids)).astype(np.float64)
    lost = float(p[to_K < 0].sum())
    if np.isnan(rest):
        mass = mass / max(float(mass.sum()), _TINY)
    elif lost > 0:
        rest = float(np.log(np.exp(rest) + lost))
    order = np.argsort(-mass, kind="stable")
    with np.errstate(divide="ignore"):
        return ids[order].astype(np.int32), np.log(mass[order]), rest
