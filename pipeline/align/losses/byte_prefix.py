"""Byte-prefix: the teacher's distributions in the student's tokens, at every boundary of the student's.

At a boundary of both sequences all entries take part (root); inside a teacher token those that start with the bytes
already emitted (interior), renormalised by their mass: what of the tail mass would start with them is unknown and left
out. ``prefix.py`` has the maps of the pair.

Shapes: N samples, S student tokens, C chunks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.blanks import Shifted
from xtoken.pipeline.align.chunks import Joined, chunks_per_sample
from xtoken.pipeline.align.kernels_prefix import boundary_rows, child_entries, prefix_entries
from xtoken.pipeline.align.kernels_targets import merged
from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.pipeline.align.prefix import PrefixMaps
from xtoken.pipeline.store.columns import flat, list_lengths


class Builder(TargetBuilder):
    """Columns ``prefix_*`` and ``child_*``."""

    needs_prefix_maps: ClassVar[bool] = True
    revision: ClassVar[int] = 1  # 0: phi was the longest student token that fits
    rules: ClassVar[Mapping[str, str]] = {
        "a child range is empty or outside the student's tokens": (
            "child_low_low < 0 OR child_high_high > $text OR child_high_above_child_low < 1"
        ),
    }

    def columns(self, source: Source) -> Built:
        """See ``prefix_columns``."""
        maps = source.maps.prefix
        assert maps is not None, "byte-prefix needs both vocabularies"
        drawn = source.recipe.drawn
        batch, samples = source.batch, source.samples
        return prefix_columns(batch, samples, source.shifted, source.start_C, maps, roots_only=drawn), {}


def prefix_columns(
    batch: pa.RecordBatch,
    samples: Sequence[Joined],
    shifted: Shifted,
    start_C: NDArray[np.int64],
    maps: PrefixMaps,
    *,
    roots_only: bool = False,
) -> dict[str, NDArray[Any]]:
    """The columns of byte-prefix, all samples one after the other.

    Args:
        batch: columns of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        shifted: the teacher's rows, at the targets' temperature.
        start_C: row of each chunk's first teacher token, -1 = none.
        maps: of the pair.
        roots_only: rows are samples. Interior targets would be ratios of them and child groups depend on which tokens
            were drawn, so there are none; roots hold no tail mass, whose share of the student depends on that too.
    """
    row_S, token_S, before_S = _boundaries(batch, samples, start_C, shifted, maps)
    rows = shifted.rows
    if roots_only:
        row_S[before_S > 0] = -1
    teacher, student = maps.teacher, maps.student
    vocab = (teacher.data, teacher.offsets)
    raw_S, raw_K, rawp_K, rest_S = prefix_entries(
        row_S, token_S, before_S, rows.offsets, rows.ids, rows.logprob, rows.rest, *vocab, maps.phi_B, maps.role_U
    )
    count_S, ids_K, logprob_K = merged(raw_S, raw_K, rawp_K)
    if roots_only:
        rest_S[count_S > 0] = -np.inf
    last_S = np.concatenate([np.zeros(0, np.bool_), *map(_last, samples)])
    child_S, low_K, high_K, mass_K = child_entries(
        np.full_like(row_S, -1) if roots_only else row_S,
        before_S,
        np.concatenate([np.zeros(0, np.int32), *(sample.encoded.ids for sample in samples)]),
        last_S,
        rows.offsets,
        rows.ids,
        rows.logprob,
        *vocab,
        maps.rank_U,
        maps.alone_U,
        *(student.data, student.offsets, maps.sorted_student, maps.sorted_M),
    )
    return {
        "prefix_count": count_S,
        "prefix_ids": ids_K,
        "prefix_logprob": logprob_K,
        "prefix_rest_logprob": rest_S,
        "child_count": child_S,
        "child_low": low_K,
        "child_high": high_K,
        "child_logprob": mass_K,
    }


def _boundaries(
    batch: pa.RecordBatch,
    samples: Sequence[Joined],
    start_C: NDArray[np.int64],
    shifted: Shifted,
    maps: PrefixMaps,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """``boundary_rows`` of all samples, one after the other, with shifted roots."""
    stops = np.cumsum(list_lengths(batch, "teacher_ids"))
    ids = np.split(flat(batch, "teacher_ids"), stops[:-1])
    ends = np.split(flat(batch, "teacher_end"), stops[:-1])
    starts = np.split(start_C, np.cumsum(chunks_per_sample(samples)))
    per_sample = [
        boundary_rows(
            sample.encoded.ends,
            ends[sample.at],
            sample.chunks.student_end,
            sample.chunks.teacher_end,
            start,
            ids[sample.at],
            np.frombuffer(batch["text"][sample.at].as_py().encode(), np.uint8),
            maps.teacher.data,
            maps.teacher.offsets,
        )
        for sample, start in zip(samples, starts, strict=False)  # after the last sample nothing is left
    ]
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    rows, tokens, before = zip(empty, *per_sample, strict=True)
    row_S, before_S = np.concatenate(rows), np.concatenate(before)
    _shift_roots(row_S, before_S, samples, shifted)
    return row_S, np.concatenate(tokens), before_S


def _shift_roots(
    row_S: NDArray[np.int64], before_S: NDArray[np.int32], samples: Sequence[Joined], shifted: Shifted
) -> None:
    """Mend the first student token of each shifted chunk.

    Where the teacher brings a blank, it has emitted that one byte when the student begins; where the student does, its
    tokens are compared with those of a shifted row.
    """
    tokens_N = np.array([len(sample.encoded.ids) for sample in samples], np.int64)
    base_C = np.repeat(np.cumsum(tokens_N) - tokens_N, chunks_per_sample(samples))
    first_C = np.concatenate([np.zeros(0, np.int64), *(_starts(sample.chunks.student_end) for sample in samples)])
    mine_C = shifted.moved_C & ~shifted.brought_C
    row_S[(base_C + first_C)[mine_C]] = shifted.prefix_C[mine_C]
    before_S[(base_C + first_C)[shifted.brought_C]] = 1


def _last(sample: Joined) -> NDArray[np.bool_]:
    """Tokens behind which nothing of a chunk comes: the last of a sample, and those before a gap, bool [S]."""
    last_S = np.zeros(len(sample.encoded.ids) + 1, np.bool_)
    last_S[_starts(sample.chunks.student_end)[sample.chunks.gap]] = True
    last_S[-1] = True
    return last_S[1:]


def _starts(end_C: NDArray[np.int32]) -> NDArray[np.int64]:
    starts: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), end_C[:-1].astype(np.int64)])
    return starts[: len(end_C)]
