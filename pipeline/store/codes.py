"""Codes: a permutation of the teacher's ids in which the tokens of the corpus come first.

Small numbers leave the upper bytes of a column empty, and ids in the order of a tokenizer's training are small for no
reason that a corpus knows of. The permutation lies in ``vocab.parquet``; everything above this module sees ids.

Shapes: U teacher vocabulary.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import CAPTURE_VOCAB, VOCAB, holds_codes, read_as

Codes = NDArray[np.int32]


def codes_by_use(tokens: Iterable[NDArray[np.int32]], size: int) -> Codes:
    """int32 [U], the code of each id: by falling count among ``tokens``, then by id."""
    count_U = np.zeros(size, np.int64)
    for ids in tokens:
        count_U += np.bincount(ids, minlength=size)
    return inverse(np.argsort(-count_U, kind="stable").astype(np.int32))


def inverse(permutation: Codes) -> Codes:
    """The permutation that undoes this one."""
    found = np.empty_like(permutation)
    found[permutation] = np.arange(len(permutation), dtype=np.int32)
    return found


def with_codes(vocab: pa.Table, codes: Codes) -> pa.Table:
    """A vocabulary table (``xtoken.schemas.tables.VOCAB``) with its codes."""
    return vocab.append_column(CAPTURE_VOCAB.field("code"), pa.array(codes)).cast(CAPTURE_VOCAB)


def read_codes(vocab: pa.Table) -> Codes | None:
    """int32 [U], the code of each id, of a vocabulary table; None where it has none (schema version 1).

    Raises:
        VerificationError: other columns, or codes that are not a permutation.
    """
    if vocab.schema.equals(VOCAB):
        return None
    if not vocab.schema.equals(CAPTURE_VOCAB):
        raise VerificationError(f"vocab.parquet has columns {vocab.column_names[:20]}, not those of the format")
    found: Codes = vocab.sort_by("token_id")["code"].to_numpy()
    if found.dtype != np.int32 or not np.array_equal(np.sort(found), np.arange(len(found))):
        raise VerificationError("the codes of vocab.parquet are not 0 to V-1 once each; fetch the artifact again")
    return found


def restore_ids(batch: pa.RecordBatch, id_of_code: Codes | None) -> pa.RecordBatch:
    """The batch with ``topk_ids`` or ``draw_ids`` in the place of codes.

    Raises:
        VerificationError: a code outside the vocabulary.
    """
    if id_of_code is None:
        return batch
    for at, field in enumerate(batch.schema):
        if holds_codes(field.name):
            batch = batch.set_column(at, field.with_name(read_as(field.name)), _mapped(batch.column(at), id_of_code))
    return batch


def recode(batch: pa.RecordBatch, code_of_code: Codes) -> pa.RecordBatch:
    """The batch in the codes of another capture, ``code_of_code[c]`` for ``c``.

    Raises:
        VerificationError: a code outside the vocabulary.
    """
    for at, field in enumerate(batch.schema):
        if holds_codes(field.name):
            batch = batch.set_column(at, field, _mapped(batch.column(at), code_of_code))
    return batch


def _mapped(column: pa.ListArray, table: Codes) -> pa.ListArray:
    """A list column, each element replaced by the table's."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) and (values.min() < 0 or values.max() >= len(table)):
        raise VerificationError(
            f"a code is outside 0 to {len(table) - 1}; 'xtoken verify' on the capture lists what is damaged"
        )
    lengths = np.diff(column.offsets.to_numpy())
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(table[values]), type=column.type)
