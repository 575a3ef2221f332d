"""Targets as arrays, for programs of others: ``xtoken.open_targets``.

Shapes: S student tokens and C chunks of one sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.tables import target_columns, targets
from xtoken.trainer.data.targets import GroupRef, RowGroup, Targets
from xtoken.trainer.ragged import Array

_ID = "sample_id"
_FIELDS = ("student_ids", "student_end", "chunk_student_end", "chunk_teacher_end", "teacher_logprob")


@dataclass(frozen=True)
class TargetSample:
    """One sample of targets. Logarithms are natural.

    Attributes:
        sample_id: as in the capture.
        student_ids: int32 [S], the student's tokens.
        student_end: int32 [S], the byte at which each token ends.
        chunk_student_end: int32 [C], index after each chunk's last student token.
        chunk_teacher_end: int32 [C], index after its last teacher token.
        teacher_logprob: float32 [C], of the chunk's tokens in the text; NaN: the teacher has no row there.
        columns: everything that is stored of the sample, by the names of ``xtoken.schemas.tables.targets``.
    """

    sample_id: str
    student_ids: NDArray[np.int32]
    student_end: NDArray[np.int32]
    chunk_student_end: NDArray[np.int32]
    chunk_teacher_end: NDArray[np.int32]
    teacher_logprob: NDArray[np.float32]
    columns: Mapping[str, Array]


class TargetSet:
    """Finished targets, opened: iterate over them for ``TargetSample`` in order; ``len`` counts them.

    Attributes:
        url: folder or URL.
        manifest: manifest.json as a dictionary; its fields are described in ``xtoken.schemas.manifest``.
        losses: that they serve.
        parts: numbers of their parts.
    """

    def __init__(self, url: str) -> None:
        self._targets = Targets(url)
        self.url, found = url, self._targets.manifest
        self.manifest: dict[str, Any] = found.model_dump(mode="json")
        self.losses = tuple(found.losses)
        self.parts = tuple(part.index for part in found.parts)
        self._schema = targets(found.losses, chat=found.chat is not None)
        every = target_columns(found.losses, chat=found.chat is not None)
        self._names = tuple(column.name for column in every if column.name != _ID)

    def __len__(self) -> int:
        return self._targets.samples

    def __iter__(self) -> Iterator[TargetSample]:
        for ref in self._targets.groups:
            yield from self._samples(ref)

    def part(self, number: int) -> list[TargetSample]:
        """All samples of a part.

        Raises:
            XtokenError: there is no such part.
            VerificationError: it is damaged.
        """
        return [sample for ref in self._of_parts([number]) for sample in self._samples(ref)]

    def batches(
        self, columns: Sequence[str] | None = None, parts: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The table of ``xtoken.schemas.tables.targets``, whatever form it has on disk.

        Args:
            columns: names; all when left out.
            parts: numbers; all when left out.

        Raises:
            XtokenError: no such column or part.
        """
        names = self._schema.names if columns is None else list(columns)
        if unknown := [name for name in names if name not in self._schema.names]:
            raise XtokenError(f"{self.url} has no column {unknown[0]!r}; it has {', '.join(self._schema.names)}")
        schema = pa.schema([self._schema.field(name) for name in names])
        for ref in self._targets.groups if parts is None else self._of_parts(parts):
            group = self._targets.read(ref, tuple(name for name in names if name != _ID))
            yield pa.record_batch([_column(group, field) for field in schema], schema=schema)

    def to_pandas(self, columns: Sequence[str] | None = None, parts: Sequence[int] | None = None) -> Any:
        """``batches`` as one data frame, a row per sample; needs pandas."""
        return pa.Table.from_batches(self.batches(columns, parts)).to_pandas()

    def _of_parts(self, parts: Sequence[int]) -> list[GroupRef]:
        for number in parts:
            if number not in self.parts:
                raise XtokenError(f"{self.url} has no part {number}; it has {len(self.parts)}, from {self.parts[0]} on")
        return [ref for ref in self._targets.groups if ref.part in parts]

    def _samples(self, ref: GroupRef) -> Iterator[TargetSample]:
        group = self._targets.read(ref, self._names)
        for row, sample_id in enumerate(group.sample_ids):
            found = {name: group.values(name, row) for name in self._names}
            if len(found["student_end"]) != len(found["student_ids"]):
                raise VerificationError(f"sample {sample_id!r}: student_end has another length than its tokens")
            yield TargetSample(sample_id=sample_id, columns=found, **{name: found[name] for name in _FIELDS})


def _column(group: RowGroup, field: pa.Field) -> pa.Array:
    if field.name == _ID:
        return pa.array(group.sample_ids, field.type)
    offsets, values = group.lists[field.name]
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, field.type.value_type), type=field.type)


def open_targets(url: str) -> TargetSet:
    """Open finished targets.

    Args:
        url: folder, or URL that fsspec knows.

    Raises:
        XtokenError: there are none.
        VerificationError: a part is missing or torn.
    """
    return TargetSet(url.rstrip("/"))
