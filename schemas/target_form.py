"""Targets as they lie on disk, and as everything above this module sees them.

Up to version 5 of the schema both are the same. Since version 6 entries that the reader makes sum to 1 are whole
numbers of a step (``gaps.py``), and tokens stand by their code in ``codes.parquet``, which is small for tokens that
the teacher's distributions hold often. ``xtoken.schemas.tables.targets`` has the types of either.

Shapes: C targets (of chunks or tokens), K entries of all of them together; U a vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.gaps import NO_TAIL, from_gaps, looked_up, probabilities, to_gaps
from xtoken.schemas.losses import GapColumns, gap_columns, holds_ids, lean_fields, loss_columns
from xtoken.schemas.tables import CHAT_TARGETS, CODES, LEAN_TARGETS, targets

CODES_FILE = "codes.parquet"
_DAMAGED = "'xtoken verify' on the targets lists what is damaged"
Ids = NDArray[np.int32]
# Offsets [N + 1] and values of list columns, by name; of a column with one value per sample each is a list of one.
Lists = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class TokenCodes:
    """The id of each code, int32 [U]: a permutation of the teacher's vocabulary, and one of the student's."""

    teacher: Ids
    student: Ids

    def table(self) -> pa.Table:
        """As ``codes.parquet`` holds them."""
        size = max(len(self.teacher), len(self.student))
        sides = [_padded(ids, size) for ids in (self.teacher, self.student)]
        return pa.table([pa.array(np.arange(size, dtype=np.int32)), *sides], schema=CODES)

    @classmethod
    def of(cls, table: pa.Table, teacher: int, student: int) -> "TokenCodes":
        """From ``codes.parquet``.

        Args:
            table: as read.
            teacher, student: sizes of the vocabularies.

        Raises:
            VerificationError: other columns, or what is no permutation.
        """
        if not table.schema.equals(CODES):
            raise VerificationError(f"{CODES_FILE} has columns {table.column_names[:20]}, not those of the format")
        in_order = np.array_equal(table["code"].to_numpy(), np.arange(max(teacher, student)))
        sides = [table[name].combine_chunks() for name in ("teacher_id", "student_id")]
        ids = [side.drop_null().to_numpy() for side in sides]
        for side, found, size in zip(sides, ids, (teacher, student), strict=True):
            once = np.array_equal(np.sort(found), np.arange(size)) and not side[:size].null_count
            if not (in_order and once):
                raise VerificationError(f"{CODES_FILE} does not hold each token once; fetch the targets again")
        return cls(*ids)


def _padded(ids: Ids, size: int) -> pa.Array:
    nothing = np.arange(size) >= len(ids)
    return pa.array(np.concatenate([ids, np.zeros(size - len(ids), np.int32)]), mask=nothing)


def needs_codes(losses: Iterable[str], version: int) -> bool:
    """Whether targets have ``codes.parquet``."""
    return version >= LEAN_TARGETS and any(map(holds_ids, loss_columns(losses)))


@dataclass(frozen=True)
class TargetForm:
    """How the parts of a target folder hold their columns.

    Attributes:
        losses, version: of its manifest.
        step: nats; of versions before 6 without meaning.
        codes: None where no column holds tokens by code.
    """

    losses: Sequence[str]
    version: int
    step: float = 0.0
    codes: TokenCodes | None = None

    @cached_property
    def schema(self) -> pa.Schema:
        """Of a part."""
        return targets(self.losses, self.version)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Names on disk of columns that are stored otherwise than they are read, by the names that readers know."""
        if not self.lean:
            return {}
        return {name: field.name for name, field in lean_fields(self.losses).items()}

    @cached_property
    def _gaps(self) -> list[GapColumns]:
        return gap_columns(self.losses) if self.lean else []

    @cached_property
    def _ids(self) -> dict[str, Ids]:
        """The id of each code, by the name of the column that readers see."""
        if self.codes is None:
            return {}
        sides = {"student ids": self.codes.student}
        ids = filter(holds_ids, loss_columns(self.losses))
        return {column.name: sides.get(column.holds, self.codes.teacher) for column in ids}

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        return probabilities(self.step)

    @property
    def lean(self) -> bool:
        """Whether there are steps, codes and a tail mass that ``read`` makes entries sum to 1 with."""
        return self.version >= LEAN_TARGETS

    @property
    def chat(self) -> bool:
        """Whether the targets are of conversations, and say which tokens are taught."""
        return self.version >= CHAT_TARGETS

    @property
    def otherwise(self) -> list[str]:
        """Columns, as readers call them, that are stored otherwise than they are read."""
        return list(self._renamed)

    def stored(self, names: Iterable[str]) -> list[str]:
        """The columns on disk that ``read`` needs to give ``names``, each once."""
        wanted = list(names)
        for gaps in self._gaps:
            if gaps.logprob in wanted or gaps.tail in wanted:
                wanted += [gaps.count, gaps.logprob, *([gaps.tail] if gaps.tail else [])]
        return list(dict.fromkeys(self._renamed.get(name, name) for name in wanted))

    def read(self, lists: Lists, names: Sequence[str]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """Columns as readers see them.

        Args:
            lists: the columns of ``stored(names)``, of any number of samples.
            names: wanted.

        Raises:
            VerificationError: a code outside its vocabulary, or lists that do not fit each other.
        """
        found = {name: lists[name] for name in names if name not in self._renamed}
        for name in names:
            if name in self._ids:
                offsets, codes = lists[self._renamed[name]]
                found[name] = offsets, _looked_up(self._ids[name], codes, self._renamed[name])
        for gaps in self._gaps:
            if gaps.logprob in names or gaps.tail in names:
                found |= {name: one for name, one in self._from_gaps(lists, gaps).items() if name in names}
        return {name: found[name] for name in names}

    def _from_gaps(self, lists: Lists, gaps: GapColumns) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        offsets, gap_K = lists[self._renamed[gaps.logprob]]
        count_C = lists[gaps.count][1]
        none_C = np.full(len(count_C), NO_TAIL, np.uint16)
        tail_offsets, tail_C = lists[self._renamed[gaps.tail]] if gaps.tail else (offsets, none_C)
        if len(tail_C) != len(count_C) or (count_C < 0).any() or int(count_C.sum(dtype=np.int64)) != len(gap_K):
            raise VerificationError(
                f"{gaps.count} does not sum to the entries of {self._renamed[gaps.logprob]}; {_DAMAGED}"
            )
        logprob_K, rest_C = from_gaps(count_C, gap_K, tail_C, self.step, self._table, bool(gaps.tail))
        found = {gaps.logprob: (offsets, logprob_K)}
        return found | ({gaps.tail: (tail_offsets, rest_C)} if gaps.tail else {})

    def read_batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A whole batch of a part as readers see it (see ``read``)."""
        if not self._renamed:
            return batch
        schema = targets(self.losses, chat=self.chat)
        lists = {field.name: _list_of(batch[field.name]) for field in batch.schema if pa.types.is_list(field.type)}
        columns = self.read(lists, [field.name for field in schema if pa.types.is_list(field.type)])
        return _batch(schema, {name: batch[name] for name in schema.names if name not in columns}, columns)

    def stored_batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch that readers would see, as it is written.

        Raises:
            VerificationError: a target's entries do not fall, which is a defect of what built them.
        """
        if not self._renamed:
            return batch
        columns = {}
        for name, ids in self._ids.items():
            offsets, values = _list_of(batch[name])
            codes = np.empty(len(ids), np.int32)
            codes[ids] = np.arange(len(ids), dtype=np.int32)
            columns[self._renamed[name]] = offsets, codes[values]
        for gaps in self._gaps:
            columns |= self._to_gaps(batch, gaps)
        plain = {name: batch[name] for name in self.schema.names if name not in columns}
        return _batch(self.schema, plain, columns)

    def _to_gaps(self, batch: pa.RecordBatch, gaps: GapColumns) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        (count_offsets, count_C), (offsets, logprob_K) = (_list_of(batch[name]) for name in (gaps.count, gaps.logprob))
        none_C = np.full(len(count_C), -np.inf, np.float32)
        tail_offsets, tail_C = _list_of(batch[gaps.tail]) if gaps.tail else (count_offsets, none_C)
        gap_K, tail_gap_C, bad = to_gaps(count_C, logprob_K, tail_C, self.step)
        if bad >= 0:
            sample = int(np.searchsorted(count_offsets, bad, side="right")) - 1
            raise VerificationError(
                f"sample {batch['sample_id'][sample].as_py()!r}: entries of {gaps.logprob} do not fall, or are no "
                "log-probabilities. Nothing of its part was written; this is a defect of xtoken, please report it"
            )
        found = {self._renamed[gaps.logprob]: (offsets, gap_K)}
        return found | ({self._renamed[gaps.tail]: (tail_offsets, tail_gap_C)} if gaps.tail else {})


def _looked_up(ids: Ids, codes: NDArray[Any], name: str) -> Ids:
    found, right = looked_up(ids, codes)
    if not right:
        raise VerificationError(f"{name} has a code outside 0 to {len(ids) - 1}; {_DAMAGED}")
    return found


def _list_of(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Offsets from 0 and values."""
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0], column.flatten().to_numpy(zero_copy_only=False)


def _batch(
    schema: pa.Schema, plain: Mapping[str, pa.Array], lists: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
) -> pa.RecordBatch:
    arrays = []
    for field in schema:
        if field.name in plain:
            arrays.append(plain[field.name])
            continue
        offsets, values = lists[field.name]
        flat = pa.array(values, field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
