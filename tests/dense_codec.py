"""A codec for the tests, in one file: whole teacher distributions as float16. It is not a format that xtoken publishes.

Shapes: R rows, U teacher vocabulary, K = R * U entries, most probable first in each row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.base import Codec, list_field
from xtoken.pipeline.store.codecs.row_stats import RowStats
from xtoken.pipeline.store.codecs.rows import Unpacked
from xtoken.pipeline.store.columns import check_ids, flat, list_lengths, refuse
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.codecs import CodecSettings
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CodecInfo

_ROWS_SQL = """\
-- Whole rows.
-- Needs: rows
SELECT
    * EXCLUDE (dense_codes, dense_half),
    list_transform(realised_logprob, lambda one: len(dense_half) // len(realised_logprob))::INTEGER[] AS kept,
    list_transform(realised_logprob, lambda one: 0.0)::DOUBLE[] AS rest,
    NULL::DOUBLE[] AS entropy,
    dense_codes AS codes,
    unpack_rows(
        list_transform(realised_logprob, lambda one: len(dense_half) // len(realised_logprob))::INTEGER[],
        dense_codes,
        dense_half
    ) AS unpacked
FROM capture._samples
"""
_RECIPE = """\
`dense_half` has the bits of float16 log-probabilities.$code_note

```sql
SELECT sample_id, len($ids) AS entries FROM 'data/*.parquet' LIMIT 10;
```
===
The same in NumPy.

```python
logprob = sample["dense_half"].to_numpy().view(np.float16)
```
"""


@dataclass(frozen=True)
class PackedDense:
    """int32 [K] ids and the bits of float16 [K] log-probabilities in nats."""

    dense_ids: NDArray[np.int32]
    dense_half: NDArray[np.uint16]


class DenseCodec(Codec):
    """Every token of the vocabulary in every row: no tail, no count of entries."""

    columns = ("realised_logprob", "dense_ids", "dense_half")
    sql_types = ("INTEGER[]", "INTEGER[]", "USMALLINT[]")
    rows_sql = _ROWS_SQL
    recipe = _RECIPE
    sentence = "codec `dense`: the whole distribution in float16"
    limits: list[str] = []  # noqa: RUF012

    @classmethod
    def record(cls, settings: CodecSettings) -> CodecInfo:
        """It has no settings."""
        del settings
        return CodecInfo(name="dense")

    @property
    def fields(self) -> list[pa.Field]:
        """See ``Codec.fields``."""
        return [
            list_field("dense_codes", pa.int32(), "[K] teacher tokens by their code, most probable first"),
            list_field("dense_half", pa.uint16(), "[K] nats: bits of float16 log-probabilities"),
        ]

    def encode(self, rows: TeacherRows, vocab_size: int) -> PackedDense:
        """See ``Codec.encode``: what a padded head has beyond the vocabulary is left out."""
        known_RE = rows.ids < vocab_size
        if (known_RE.sum(axis=1) != vocab_size).any():
            raise XtokenError(f"the teacher did not give all {vocab_size} tokens of a row; use --backend hf")
        return PackedDense(rows.ids[known_RE], rows.logprob[known_RE].astype(np.float16).view(np.uint16))

    def no_rows(self) -> PackedDense:
        """See ``Codec.no_rows``."""
        return PackedDense(np.zeros(0, np.int32), np.zeros(0, np.uint16))

    def decode(self, batch: pa.RecordBatch) -> Unpacked:
        """See ``Codec.decode``."""
        realised_R, ids_K, half_K = (flat(batch, name) for name in self.columns)
        rows = len(realised_R)
        offsets = np.arange(rows + 1, dtype=np.int64) * (len(ids_K) // max(rows, 1))
        return Unpacked(offsets, ids_K, half_K.view(np.float16).astype(np.float64), np.full(rows, -np.inf))

    def lengths(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64]) -> Mapping[str, NDArray[np.int64]]:
        """See ``Codec.lengths``."""
        width = int(list_lengths(batch, "dense_ids").sum()) // max(int(rows_N.sum()), 1)
        return dict.fromkeys(("dense_ids", "dense_half"), rows_N * width)

    def check(self, batch: pa.RecordBatch, rows_N: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
        """See ``Codec.check``."""
        entries_N = rows_N * vocab_size
        for name in ("dense_ids", "dense_half"):
            refuse(batch, list_lengths(batch, name) != entries_N, f"{name} does not hold the whole vocabulary")
        check_ids(batch, "dense_ids", entries_N, vocab_size)
        return entries_N

    def fidelity(self, stats: RowStats) -> tuple[list[tuple[str, object]], str]:
        """See ``Codec.fidelity``."""
        return [("entropy, mean in nats", stats.entropy_nats / stats.rows)], "Nothing was left out."

    def sql_logprob(self, count_R: NDArray[np.int64], value_K: NDArray[np.int64]) -> NDArray[np.float64]:
        """See ``Codec.sql_logprob``."""
        del count_R
        return value_K.astype(np.uint16).view(np.float16).astype(np.float64)

    def page_data(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Codec.page_data``."""
        del row
        return {"dense": True}


CODEC = DenseCodec
