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

from xtoken.pipeline.align.chunks import Joined
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
        theirs_C, mine_C = self._teacher_brings(batch, samples), self._student_brings(batch, samples)
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

    def _teacher_brings(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> NDArray[np.bool_]:
        ids, ends = (_each(batch, name) for name in ("teacher_ids", "teacher_end"))
        return _of_chunks(
            [
                _brings(self.teacher, ids[one.at], ends[one.at], one.chunks.teacher_end, *_place(batch, ends, one))
                for one in samples
            ]
        )

    def _student_brings(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> NDArray[np.bool_]:
        ends = _each(batch, "teacher_end")
        return _of_chunks(
            [
                _brings(self.student, mine.ids, mine.ends, one.chunks.student_end, *_place(batch, ends, one))
                for one in samples
                for mine in [one.encoded]
            ]
        )


def _each(batch: pa.RecordBatch, name: str) -> list[NDArray[np.int32]]:
    """A list column, sample by sample."""
    return np.split(flat(batch, name), np.cumsum(list_lengths(batch, name))[:-1])


def _place(
    batch: pa.RecordBatch, ends: Sequence[NDArray[np.int32]], sample: Joined
) -> tuple[NDArray[np.int32], pa.Scalar]:
    """The byte at which each chunk begins, which is where the teacher's token before it ends, and the text."""
    first_C = np.concatenate([np.zeros(1, np.int32), sample.chunks.teacher_end])[:-1]
    return np.concatenate([np.zeros(1, np.int32), ends[sample.at]])[first_C], batch["text"][sample.at]


def _of_chunks(flags_N: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(0, np.bool_), *flags_N])


def _brings(
    table: TokenTable,
    ids_T: NDArray[np.int32],
    end_T: NDArray[np.int32],
    chunk_end_C: NDArray[np.int32],
    begin_C: NDArray[np.int32],
    text: pa.Scalar,
) -> NDArray[np.bool_]:
    """Whether the first token of each chunk of a sample has a blank in front that the text lacks there, bool [C].

    ``begin_C`` is the byte at which each chunk begins.
    """
    first_C = np.concatenate([np.zeros(1, np.int32), chunk_end_C[:-1]])[: len(chunk_end_C)]
    known_C = first_C < chunk_end_C  # a gap may hold no token of a side
    first_C = np.where(known_C, first_C, 0)
    stop_C = end_T[first_C]
    size_C = (table.offsets[1:] - table.offsets[:-1])[ids_T[first_C]]
    brings_C: NDArray[np.bool_] = known_C & (size_C == stop_C - begin_C + 1) & (stop_C > begin_C)
    data = text.as_py().encode() if brings_C.any() else b""
    for at in np.flatnonzero(brings_C):
        piece = table.token(int(ids_T[first_C[at]]))
        brings_C[at] = piece == b" " + data[begin_C[at] : stop_C[at]]
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
