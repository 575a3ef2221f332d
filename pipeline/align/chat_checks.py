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
    """The columns that ``check_chat.sql`` names beside those of all targets, a row per sample; and ``teacher_logprob``.

    Args:
        batch: of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        targets: their targets.
        losses: that the targets serve.
    """
    at_N = np.array([sample.at for sample in samples], np.int64)
    chunks_N, tokens_N = list_lengths(targets, "chunk_student_end"), list_lengths(targets, "student_ids")
    has_target_C = ~np.isnan(flat(targets, "teacher_logprob"))
    mine = _Side(targets, "chunk_student_end", offsets_of(tokens_N)[:-1], chunks_N)
    theirs = _Side(targets, "chunk_teacher_end", offsets_of(list_lengths(batch, "teacher_ids"))[at_N], chunks_N)
    untaught_C = mine.sums(~flat(targets, "learn")) + theirs.sums(~tokens_with_row(batch))
    width_T = _widths(flat(batch, "teacher_end"), list_lengths(batch, "teacher_ids"))
    in_gaps_N = np.zeros(len(at_N), np.int64)
    for name, axis in _counts(losses):
        entries_C = mine.sums(flat(targets, name)) if axis == "token" else flat(targets, name)
        in_gaps_N += _sums(np.where(has_target_C, 0, entries_C), chunks_N)
    return {
        "learn": targets["learn"],
        "teacher_logprob": targets["teacher_logprob"],
        "untaught": _extreme(np.maximum, np.where(has_target_C, untaught_C, 0), chunks_N),
        "chunk_tokens": _extreme(np.minimum, mine.size_C + theirs.size_C, chunks_N),
        "chunk_bytes": _sums(np.where(has_target_C, theirs.sums(width_T), 0), chunks_N),
        "taught_bytes": taught_bytes(batch)[at_N],
        "lost_bytes": pa.array([sample.lost_bytes for sample in samples], pa.int64()),
        "in_gaps": in_gaps_N,
    }


class _Side:
    """One side's tokens of every chunk."""

    def __init__(
        self, targets: pa.RecordBatch, name: str, from_N: NDArray[np.int64], chunks_N: NDArray[np.int64]
    ) -> None:
        """Take the ends of chunks over.

        Args:
            targets: a batch.
            name: column of the ends of chunks.
            from_N: where each sample's tokens start.
            chunks_N: of each sample.
        """
        self.size_C = _widths(flat(targets, name), chunks_N)
        self._end_C = flat(targets, name) + np.repeat(from_N, chunks_N)

    def sums(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """What a value of each token adds up to in each chunk, [C]; ends outside the tokens count as the nearest."""
        running = offsets_of(values.astype(np.int64))
        last_C, first_C = (np.clip(end, 0, len(values)) for end in (self._end_C, self._end_C - self.size_C))
        sums_C: NDArray[np.int64] = running[last_C] - running[first_C]
        return sums_C


def taught_bytes(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Bytes of each sample's taught spans, [N]."""
    lengths_N = list_lengths(batch, "span_byte_end")
    width_G = _widths(flat(batch, "span_byte_end"), lengths_N)
    return _sums(np.where(flat(batch, "span_learn"), width_G, 0), lengths_N)


def _counts(losses: Sequence[str]) -> list[tuple[str, str]]:
    """Columns that count entries of chunks or tokens, with which of the two."""
    columns = target_columns(losses, base=False, chat=True)
    counted = {column.axis for column in columns}
    return [(one.name, one.axis) for one in columns if one.axis in ("chunk", "token") and one.name in counted]


def _widths(ends: NDArray[Any], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Steps of each sample's ends, from 0 on."""
    width: NDArray[np.int64] = np.diff(ends.astype(np.int64), prepend=0)
    first_N = offsets_of(lengths_N)[:-1][lengths_N > 0]
    width[first_N] = ends[first_N]
    return width


def _extreme(by: np.ufunc, values: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The greatest or the least of each sample's values, [N]; of none 0 and 1, which break no rule."""
    found_N = np.full(len(lengths_N), int(by is np.minimum), np.int64)
    filled_N = lengths_N > 0
    if filled_N.any():
        found_N[filled_N] = by.reduceat(values, offsets_of(lengths_N)[:-1][filled_N])
    return found_N


def _sums(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of each sample's consecutive values, [N]."""
    sums_N: NDArray[np.int64] = np.diff(offsets_of(values)[offsets_of(lengths_N)])
    return sums_N
