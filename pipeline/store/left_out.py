"""Columns that a subset dropped, as readers see them: null, or rows without entries.

Shapes: N samples of one batch, R teacher rows of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.columns import list_lengths
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CaptureManifest, CodecInfo
from xtoken.schemas.tables import MESSAGES, OPTIONAL, stored_as

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
        """What this capture lacks.

        Raises:
            VerificationError: it leaves out what no subset does.
        """
        refuse_partly_left_out(manifest)
        return cls(manifest.left_out, manifest.codec, manifest.parts_version)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the capture's parts."""
        return open_codec(self.codec).schema(self.names, version=self.version)

    def stored(self, columns: Sequence[str] | None) -> Sequence[str] | None:
        """Those of the wanted columns that are there, and what ``fill`` needs; None = all."""
        if columns is None or not self.names:
            return columns
        gone = _whole_groups(self.names, open_codec(self.codec))
        return [name for name in dict.fromkeys([*columns, _EVERY_ROW]) if name not in gone]

    def fill(self, batch: pa.RecordBatch, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """The batch with the wanted columns, those left out made up; all when ``columns`` is left out."""
        if not self.names:
            return batch
        filled = fill_left_out(batch, self.names, open_codec(self.codec))
        return filled if columns is None else filled.select(list(columns))


def without_rows(left_out: Sequence[str]) -> bool:
    """Whether the teacher's distributions are among what was dropped."""
    return bool(set(left_out).difference(OPTIONAL, {MESSAGES.name}))


def optional_columns(codec: Codec) -> dict[str, set[str]]:
    """Columns of each of ``xtoken.schemas.tables.OPTIONAL``, on disk and as readers know them."""
    more = {"rows": {*codec.own, *map(stored_as, codec.own)}, "text": {"text", MESSAGES.name}}
    return {name: more.get(name, {name}) for name in OPTIONAL}


def refuse_partly_left_out(manifest: CaptureManifest) -> None:
    """Raise VerificationError unless what a manifest leaves out is whole groups of optional columns."""
    codec, left = open_codec(manifest.codec), set(manifest.left_out)
    there = set(codec.schema(version=manifest.parts_version).names)
    groups = [there & group for group in optional_columns(codec).values()]
    if left != {name for group in groups if group <= left for name in group}:
        raise VerificationError(
            f"manifest.json: left_out {manifest.left_out} is not a list of whole groups of optional columns; fetch the "
            "artifact again"
        )


def fill_left_out(batch: pa.RecordBatch, left_out: Sequence[str], codec: Codec) -> pa.RecordBatch:
    """The batch with the dropped columns appended, under the names that readers know (``topk_ids``, not codes).

    It must hold ``realised_logprob`` where the teacher's distributions were dropped.
    """
    gone = _whole_groups(left_out, codec)
    messages = [MESSAGES] if "span_learn" in batch.schema.names else []
    for field in [*codec.schema(version=1), *messages]:
        if field.name in gone:
            batch = batch.append_column(field, _missing(batch, field, codec))
    return batch


def _whole_groups(names: Sequence[str], codec: Codec) -> set[str]:
    """All names of the groups that these columns are of, on disk and as readers know them."""
    return {name for group in optional_columns(codec).values() if group.intersection(names) for name in group}


def _missing(batch: pa.RecordBatch, field: pa.Field, codec: Codec) -> pa.Array:
    if field.nullable:
        return pa.nulls(batch.num_rows, field.type)
    per_row, value = codec.filled(field.name)
    return _lists(field, list_lengths(batch, _EVERY_ROW) * per_row, value)


def _lists(field: pa.Field, lengths_N: NDArray[np.int64], value: float) -> pa.Array:
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N)]).astype(np.int32)
    kind = field.type.value_type
    values = pa.array(np.full(int(offsets[-1]), value, kind.to_pandas_dtype()), kind)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=field.type)
