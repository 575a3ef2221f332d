"""Chunks that one side begins with a blank which the text does not have.

Llama-2 and its kin put a dummy space in front of a text and behind added tokens: their first token of "In 1998" is
" In", where another tokenizer has "In". Both cover the same bytes of the text, but W joins tokens of equal bytes, so
the teacher's row for such a chunk is shifted: each of its tokens gives its mass to the one with a blank more, or less.

Shapes: N samples, T tokens of a side, C chunks, R teacher rows, K kept entries, U teacher vocabulary; all samples of a
batch together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.align.chunks import Joined
from pipeline.align.rows import Rows
from pipeline.store.columns import flat, list_lengths
from pipeline.tokens import TokenTable

_NONE = -1
_TINY = 1e-300  # no sum of probabilities is smaller


@dataclass(frozen=True)
class Shifted:
    """Rows with those of shifted chunks behind them.

    Attributes:
        rows: the rows there were, and the shifted ones.
        row_C: int64 [C], row of each chunk's first teacher token: a shifted one, or the one it was; -1 = none.
        chunks: how many chunks have a shifted row.
    """

    rows: Rows
    row_C: NDArray[np.int64]
    chunks: int


@dataclass(frozen=True)
class Blanks:
    """Both vocabularies, for the chunks that one side begins with a blank of its own."""

    student: TokenTable
    teacher: TokenTable

    @cached_property
    def longer_U(self) -> NDArray[np.int32]:
        """The teacher token with a blank more in front, -1 = none; control tokens stay themselves."""
        return self._shifted(lambda piece: b" " + piece)

    @cached_property
    def shorter_U(self) -> NDArray[np.int32]:
        """The teacher token without the blank it begins with, -1 = none; control tokens stay themselves."""
        return self._shifted(lambda piece: piece[1:] if piece[:1] == b" " else b"")

    def _shifted(self, change: Callable[[bytes], bytes]) -> NDArray[np.int32]:
        known = self.teacher.by_bytes()
        pieces = enumerate(self.teacher.pieces())
        return np.array([known.get(change(piece), _NONE) if piece else at for at, piece in pieces], np.int32)

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
        at_C = np.flatnonzero((theirs_C != mine_C) & (start_C >= 0))
        row_C = start_C.copy()
        row_C[at_C] = len(rows.rest) + np.arange(len(at_C))
        if not len(at_C):
            return Shifted(rows, row_C, 0)
        found = [shifted_row(rows, int(start_C[at]), self.shorter_U if theirs_C[at] else self.longer_U) for at in at_C]
        ids, logprob, rest = zip(*found, strict=True)
        ends = rows.offsets[-1] + np.cumsum([len(one) for one in ids])
        appended = Rows.of(
            np.concatenate([rows.offsets, ends]),
            np.concatenate([rows.ids, *ids]),
            np.concatenate([rows.logprob, *logprob]),
            np.concatenate([rows.rest, rest]),
        )
        return Shifted(appended, row_C, len(at_C))

    def _teacher_brings(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> NDArray[np.bool_]:
        stops = np.cumsum(list_lengths(batch, "teacher_ids"))
        ids = np.split(flat(batch, "teacher_ids"), stops[:-1])
        ends = np.split(flat(batch, "teacher_end"), stops[:-1])
        return _of_chunks(
            [
                _brings(self.teacher, ids[one.at], ends[one.at], one.chunks.teacher_end, batch["text"][one.at])
                for one in samples
            ]
        )

    def _student_brings(self, batch: pa.RecordBatch, samples: Sequence[Joined]) -> NDArray[np.bool_]:
        return _of_chunks(
            [
                _brings(self.student, one.encoded.ids, one.encoded.ends, one.chunks.student_end, batch["text"][one.at])
                for one in samples
            ]
        )


def _of_chunks(found: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(0, np.bool_), *found])


def _brings(
    table: TokenTable,
    ids_T: NDArray[np.int32],
    end_T: NDArray[np.int32],
    chunk_end_C: NDArray[np.int32],
    text: pa.Scalar,
) -> NDArray[np.bool_]:
    """Whether the first token of each chunk of a sample has a blank in front that the text lacks there, bool [C]."""
    first_C = np.concatenate([np.zeros(1, np.int32), chunk_end_C[:-1]])[: len(chunk_end_C)]
    known_C = first_C < chunk_end_C  # a lead chunk may hold no token of a side
    first_C = np.where(known_C, first_C, 0)
    start_T = np.concatenate([np.zeros(1, np.int32), end_T[:-1]])
    begin_C, stop_C = start_T[first_C], end_T[first_C]
    size_C = (table.offsets[1:] - table.offsets[:-1])[ids_T[first_C]]
    brings_C: NDArray[np.bool_] = known_C & (size_C == stop_C - begin_C + 1) & (stop_C > begin_C)
    data = text.as_py().encode() if brings_C.any() else b""
    for at in np.flatnonzero(brings_C):
        piece = table.token(int(ids_T[first_C[at]]))
        brings_C[at] = piece == b" " + data[begin_C[at] : stop_C[at]]
    return brings_C


def shifted_row(
    rows: Rows, row: int, to_U: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float64], np.float64]:
    """Ids, log-probabilities and REST of a row whose tokens give their mass to others, most probable first.

    Mass of tokens that have no other goes to REST; where REST is unknown, what is left sums to 1 again.
    """
    span = slice(rows.offsets[row], rows.offsets[row + 1])
    to, p, rest = to_U[rows.ids[span]], rows.p[span], rows.rest[row]
    ids, place = np.unique(to[to >= 0], return_inverse=True)
    mass: NDArray[np.float64] = np.bincount(place, weights=p[to >= 0], minlength=len(ids)).astype(np.float64)
    lost = float(p[to < 0].sum())
    if np.isnan(rest):
        mass = mass / max(float(mass.sum()), _TINY)
    elif lost > 0:
        rest = np.log(np.exp(rest) + lost)
    order = np.argsort(-mass, kind="stable")
    with np.errstate(divide="ignore"):
        return ids[order].astype(np.int32), np.log(mass[order]), np.float64(rest)
