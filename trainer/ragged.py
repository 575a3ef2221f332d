"""Chunks of some positions with their columns: the one ragged record that the trainer passes along.

What a teacher holds for a row group, a sample, a micro-batch or a block of positions is always the same record. Columns
are flat arrays without padding; where a chunk's or a position's entries begin follows from the count columns.

Shapes: P positions, C chunks, K entries summed over chunks or positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.tables import target_columns

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Ints = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """Which columns of the target table a loss reads, by axis.

    Attributes:
        chunk: one value per chunk, count columns included.
        token: one value per student token, count columns included.
        entries: count column -> columns with that many values per chunk or token.
    """

    chunk: tuple[str, ...] = ()
    token: tuple[str, ...] = ()
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, loss: str, *more: str) -> "Columns":
        """The columns that the schema holds for ``loss``, and ``more`` of every table's chunk columns."""
        stored = target_columns([loss], base=False)
        chunk = [name for name, axis in stored if axis == "chunk"]
        token = [name for name, axis in stored if axis == "token"]
        counts = dict.fromkeys(axis for _, axis in stored if axis not in ("chunk", "token"))
        entries = {count: tuple(name for name, axis in stored if axis == count) for count in counts}
        return cls((*chunk, *more), tuple(token), entries)

    @property
    def names(self) -> tuple[str, ...]:
        """All columns."""
        return (*self.chunk, *self.token, *(name for names in self.entries.values() for name in names))


@dataclass(frozen=True)
class Ragged(Generic[T]):
    """Chunks of consecutive positions, numpy arrays or (of a ``View``) tensors.

    Attributes:
        first_C: int64, the position that predicts the chunk's first token; ascending.
        length_C: int64, student tokens of the chunk: positions ``first_C`` to ``first_C + length_C - 1``.
        next_C: int64, the position that predicts the token after the chunk, -1 if its sample has none. It may lie
            behind the last position of a slice.
        columns: chunk columns of these C chunks, token columns of these P positions, and their entries.
        spec: the axes of the columns.
    """

    first_C: T
    length_C: T
    next_C: T
    columns: Mapping[str, T]
    spec: Columns

    @classmethod
    def empty(cls, spec: Columns, positions: int) -> "Ragged[Array]":
        """No chunk in ``positions`` positions: what a teacher that does not hold a sample has for it."""
        none = np.zeros(0, np.int64)
        columns = {name: np.zeros(positions if name in spec.token else 0, np.int32) for name in spec.names}
        return Ragged(none, none, none, columns, spec)

    @classmethod
    def concat(cls, parts: "Sequence[Ragged[Array]]", positions: Array, spec: Columns) -> "Ragged[Array]":
        """Parts one behind the other, each of so many ``positions``; copies."""
        offset_C = np.repeat(running(positions)[:-1], [len(part.first_C) for part in parts])
        joined: Ragged[Array] = Ragged(
            np.concatenate([part.first_C for part in parts]),
            np.concatenate([part.length_C for part in parts]),
            np.concatenate([part.next_C for part in parts]),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in spec.names},
            spec,
        )
        return joined.shifted(offset_C)

    def shifted(self: "Ragged[Array]", by: int | Array) -> "Ragged[Array]":
        """The same chunks at positions that are ``by`` (one number, or [C]) higher; their columns are not copied."""
        next_C = np.where(self.next_C >= 0, self.next_C + by, -1)
        return Ragged(self.first_C + by, self.length_C, next_C, self.columns, self.spec)

    def chunks(self: "Ragged[Array]", low: int, high: int) -> tuple[int, int]:
        """First chunk, and one past the last, whose first position lies in ``low`` to ``high``."""
        first, last = np.searchsorted(self.first_C, [low, high]).tolist()
        return first, last

    def slice(self: "Ragged[Array]", low: int, high: int) -> "Ragged[Array]":
        """Positions ``low`` to ``high`` and the chunks that start there, counted from ``low``.

        Columns are views, but for the counts: they become int64, as the sums over them on a device are.
        """
        chunks, positions = slice(*self.chunks(low, high)), slice(low, high)
        spans = dict.fromkeys(self.spec.chunk, chunks) | dict.fromkeys(self.spec.token, positions)
        for count, names in self.spec.entries.items():
            # entries follow the axis of their count column: that of the chunks, or that of the positions
            owner, starts = spans[count], self.entry_starts[count]
            spans |= dict.fromkeys(names, slice(int(starts[owner.start]), int(starts[owner.stop])))
        columns = {name: self.columns[name][span] for name, span in spans.items()}
        columns |= {name: columns[name].astype(np.int64) for name in self.spec.entries}
        piece = Ragged(self.first_C[chunks], self.length_C[chunks], self.next_C[chunks], columns, self.spec)
        return piece.shifted(-low)

    @cached_property
    def entry_starts(self) -> dict[str, Ints]:
        """Per count column, the first entry of each chunk or position, and the number of entries."""
        return {name: running(self.columns[name]) for name in self.spec.entries}


def running(count: Any) -> Ints:
    """[n + 1] sums of the counts before each, and of all."""
    sums = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=sums[1:])
    return sums
