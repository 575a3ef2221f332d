"""Columns that a subset dropped, as readers see them: null, or rows that kept no entry and are all REST.

Shapes: N samples of one batch, R teacher rows of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.columns import list_lengths
from xtoken.schemas.manifest import CaptureManifest, CodecInfo
from xtoken.schemas.tables import CODED, DROPPABLE, capture

# One value per row that says "no entry kept": REST is then 1.
_PER_ROW = {"kept": 0, "rest_gap": 0, "drawn": 0, "entropy": np.nan}
_ALL_REST = np.iinfo(np.int16).max
_EVERY_ROW = "realised_logprob"  # never dropped, one value per row


@dataclass(frozen=True)
class LeftOut:
    """What a capture's readers fill in.

    Attributes:
        names: columns that a subset dropped, as its manifest has them; none of a whole capture.
        codec: of the capture.
        version: of its schema.
    """

    names: Sequence[str]
    codec: CodecInfo
    version: int

    @classmethod
    def of(cls, manifest: CaptureManifest) -> "LeftOut":
        """What this capture lacks."""
        return cls(manifest.left_out, manifest.codec, manifest.schema_version)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the capture's parts."""
        return capture(self.codec.temperatures, self.codec.name, self.names, version=self.version)

    def stored(self, columns: Sequence[str] | None) -> Sequence[str] | None:
        """Those of the wanted columns that are there, and what ``fill`` needs; None = all."""
        if columns is None or not self.names:
            return columns
        gone = _whole_groups(self.names)
        return [name for name in dict.fromkeys([*columns, _EVERY_ROW]) if name not in gone]

    def fill(self, batch: pa.RecordBatch, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """The batch with the wanted columns, those left out made up; all when ``columns`` is left out."""
        if not self.names:
            return batch
        filled = fill_left_out(batch, self.names, self.codec)
        return filled if columns is None else filled.select(list(columns))


def without_rows(left_out: Sequence[str]) -> bool:
    """Whether the teacher's distributions are among what was dropped."""
    return bool(set(left_out).intersection(DROPPABLE["rows"]))


def fill_left_out(batch: pa.RecordBatch, left_out: Sequence[str], codec: CodecInfo) -> pa.RecordBatch:
    """The batch with the dropped columns appended, under the names that readers know (``topk_ids``, not codes).

    It must hold ``realised_logprob`` where the teacher's distributions were dropped.
    """
    gone = _whole_groups(left_out)
    for field in capture(codec.temperatures, codec.name, version=1):
        if field.name in gone:
            batch = batch.append_column(field, _missing(batch, field, codec))
    return batch


def _whole_groups(names: Sequence[str]) -> set[str]:
    """All names of the groups that these columns are of, on disk and as readers know them."""
    gone = {name for group in DROPPABLE.values() if set(group).intersection(names) for name in group}
    return gone | {CODED.get(name, name) for name in gone}


def _missing(batch: pa.RecordBatch, field: pa.Field, codec: CodecInfo) -> pa.Array:
    if field.nullable:
        return pa.nulls(batch.num_rows, field.type)
    rows_N = list_lengths(batch, _EVERY_ROW)
    if field.name == "tau_rest_odds":
        return _lists(field, rows_N * (len(codec.temperatures) - 1), _ALL_REST)
    if field.name in _PER_ROW:
        return _lists(field, rows_N, _PER_ROW[field.name])
    return _lists(field, np.zeros_like(rows_N), 0)


def _lists(field: pa.Field, lengths_N: NDArray[np.int64], value: float) -> pa.Array:
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)]).astype(np.int32)
    kind = field.type.value_type
    values = pa.array(np.full(int(offsets[-1]), value, kind.to_pandas_dtype()), kind)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=field.type)
