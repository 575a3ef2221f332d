"""What ``check_chat.sql`` judges of conversations, from the columns of the capture and of the targets.

Nothing here asks how chunks were made. Shapes: N samples, S student tokens, T teacher tokens, C chunks, G spans of all
samples of a batch together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import Joined, offsets_of
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.schemas.spans import tokens_with_row
from xtoken.schemas.tables import target_columns


def chat_summary(
    batch: pa.RecordBatch, samples: Sequence[Joined], targets: pa.RecordBatch, losses: Sequence[str]
) -> dict[str, Any]:
    """``learn``, ``taught`` of the teacher's tokens, ``teacher_logprob``, bytes that are taught and that the student
    cannot have, and the entries that stand in chunks or tokens without a target; a row per sample."""
    at = pa.array([sample.at for sample in samples], pa.int64())
    taught = pa.array(tokens_with_row(batch))
    offsets = pa.array(offsets_of(list_lengths(batch, "teacher_ids")).astype(np.int32))
    return {
        "learn": targets["learn"],
        "teacher_logprob": targets["teacher_logprob"],
        "taught": pa.ListArray.from_arrays(offsets, taught).take(at),
        "taught_bytes": pa.array(taught_bytes(batch)).take(at),
        "lost_bytes": pa.array([sample.lost_bytes for sample in samples], pa.int64()),
        "in_gaps": pa.array(_in_gaps(targets, losses)),
    }


def taught_bytes(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Bytes of each sample's taught spans, [N]."""
    lengths_N = list_lengths(batch, "span_byte_end")
    end_G = flat(batch, "span_byte_end").astype(np.int64)
    width_G = np.diff(end_G, prepend=0)
    first_N = (np.cumsum(lengths_N) - lengths_N)[lengths_N > 0]
    width_G[first_N] = end_G[first_N]
    return _sums(np.where(flat(batch, "span_learn"), width_G, 0), lengths_N)


def _in_gaps(targets: pa.RecordBatch, losses: Sequence[str]) -> NDArray[np.int64]:
    """Entries of each sample's targets, of any loss, that stand in chunks without a log-probability, [N]."""
    no_target_C = np.isnan(flat(targets, "teacher_logprob"))
    tokens_C = np.concatenate([np.zeros(0, np.int64), *_tokens(targets)])
    no_target = {"chunk": no_target_C, "token": np.repeat(no_target_C, tokens_C)}
    columns = target_columns(losses, base=False, chat=True)
    counts = [column for column in columns if column.axis in no_target and column.name in {one.axis for one in columns}]
    found_N = np.zeros(targets.num_rows, np.int64)
    for name, axis in counts:
        found_N += _sums(np.where(no_target[axis], flat(targets, name), 0), list_lengths(targets, name))
    return found_N


def _tokens(targets: pa.RecordBatch) -> list[NDArray[np.int64]]:
    """The student's tokens of each chunk, sample by sample."""
    return [np.diff(ends.values.to_numpy(), prepend=0).astype(np.int64) for ends in targets["chunk_student_end"]]


def _sums(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of each sample's consecutive values, [N]."""
    running = offsets_of(values)
    sums_N: NDArray[np.int64] = np.diff(running[offsets_of(lengths_N)])
    return sums_N
