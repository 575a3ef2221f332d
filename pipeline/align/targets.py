"""From a batch of capture rows and the student's tokens to a batch of the target table.

What all tables have is built here, what a loss adds in its own file (``losses/``).

Shapes: N samples, S student tokens, R teacher rows, C chunks, K kept entries (all samples of a batch together),
U teacher vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import Joined, chunks_per_sample, offsets_of
from xtoken.pipeline.align.kernels import realised
from xtoken.pipeline.align.losses import builders
from xtoken.pipeline.align.losses.base import Source, Values
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.rows import Recipe, RowBatch
from xtoken.pipeline.store.columns import flat
from xtoken.schemas.losses import loss_columns
from xtoken.schemas.tables import target_columns, targets


def target_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], maps: Maps, recipe: Recipe
) -> tuple[pa.RecordBatch, Counter[str]]:
    """Rows of ``xtoken.schemas.tables.targets`` for these samples, and counts for ``Part.counts``.

    Counts: ``chunks`` with bytes or eos, ``chunks_1_1`` among them, ``chunks_with_row``, ``chunks_shifted``, which one
    side begins with a blank of its own; ``snapped`` samples of the student and ``teacher_snapped`` ones, ``ends_moved``
    and ``teacher_ends_moved``, tokens whose own end is not known; under ALM ``space_chunks``, those with a number in
    alm_space_logprob; under P-KL ``mass_*_ppm``: teacher mass in millionths of a chunk that is exact, reached by pieces
    only, moved, lost, and not kept (rest); divide by 1e6 times ``chunks_with_row`` for shares. Where the tail mass is
    unknown the shares are those of what was kept.

    Raises:
        VerificationError: lists of a sample do not fit each other.
    """
    rows = RowBatch.of(batch, recipe).folded(maps.stops)
    source = Source(batch, samples, maps, recipe, rows, *rows.spans(samples))
    values, counts = _base(source), _counts(source)
    known = {column.name for column in loss_columns(recipe.losses)}
    for loss in builders(recipe.losses):
        columns, figures = loss.columns(source)
        assert columns.keys() <= known, f"no column of the schema: {sorted(columns.keys() - known)}"
        values.update(columns)
        counts.update(figures)
    return _record_batch(values, source), counts


def _record_batch(values: Values, source: Source) -> pa.RecordBatch:
    """Values of all samples, one after the other, as lists of each sample's."""
    schema = targets(source.recipe.losses, chat=source.chat)
    columns = target_columns(source.recipe.losses, chat=source.chat)
    lengths = {
        "token": np.array([len(sample.encoded.ids) for sample in source.samples], np.int64),
        "chunk": chunks_per_sample(source.samples),
    }
    at = pa.array([sample.at for sample in source.samples], pa.int64())
    arrays: list[pa.Array] = [source.batch["sample_id"].take(at)]
    for name, axis in columns[1:]:
        field = schema.field(name)
        if axis == "sample":
            arrays.append(pa.array(values[name], field.type))
            continue
        if axis not in lengths:
            # a count column stands before what it counts
            per = next(column.axis for column in columns if column.name == axis)
            lengths[axis] = _sums(values[axis], lengths[per])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[axis])]).astype(np.int32)
        assert len(values[name]) == offsets[-1], f"{name} has {len(values[name])} values, not {offsets[-1]}"
        flat_values = pa.array(values[name], field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat_values, type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _sums(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of each sample's consecutive values, [N]."""
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    stops = np.cumsum(lengths_N)
    sums: NDArray[np.int64] = running[stops] - running[stops - lengths_N]
    return sums


def _base(source: Source) -> Values:
    samples = source.samples
    empty = np.zeros(0, np.int32)
    entropy_N, top1_N = _confidence(source)
    taught = [sample.learn for sample in samples if sample.learn is not None]
    return {
        "teacher_entropy": entropy_N,
        "teacher_top1": top1_N,
        "student_ids": np.concatenate([empty, *(sample.encoded.ids for sample in samples)]),
        "student_end": np.concatenate([empty, *(sample.encoded.ends for sample in samples)]),
        "chunk_student_end": np.concatenate([empty, *(sample.chunks.student_end for sample in samples)]),
        "chunk_teacher_end": np.concatenate([empty, *(sample.chunks.teacher_end for sample in samples)]),
        "teacher_logprob": _labels(source),
        **({"learn": np.concatenate([empty.astype(np.bool_), *taught])} if source.chat else {}),
    }


def _labels(source: Source) -> NDArray[np.float32]:
    """Column ``teacher_logprob``; -inf where an imported capture does not know one of the chunk's labels."""
    realised_R, start_C = flat(source.batch, "realised_logprob").astype(np.float64), source.start_C
    label_C = realised(realised_R, start_C, source.end_C)
    label_C[np.isnan(label_C) & (start_C >= 0)] = -np.inf
    return label_C


def _confidence(source: Source) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means over each sample's chunks with a row: entropy and largest probability at temperature 1, NaN = no row.

    Of draws: the stored entropy of whole rows, and the largest share. Of rows that a subset left out: NaN.
    """
    entropy_R, top1_R = source.rows.entropy, source.rows.top1
    chunks_N = chunks_per_sample(source.samples)
    has_row_C = source.start_C >= 0
    has_row_C[has_row_C] = ~np.isnan(entropy_R[source.start_C[has_row_C]])  # a row without entries has none
    sample_C = np.repeat(np.arange(len(chunks_N)), chunks_N)[has_row_C]
    row_C = source.start_C[has_row_C]
    rows_N = np.bincount(sample_C, minlength=len(chunks_N)).astype(np.float64)
    rows_N[rows_N == 0] = np.nan
    entropy_N = np.bincount(sample_C, weights=entropy_R[row_C], minlength=len(chunks_N)) / rows_N
    top1_N = np.bincount(sample_C, weights=top1_R[row_C], minlength=len(chunks_N)) / rows_N
    return entropy_N.astype(np.float32), top1_N.astype(np.float32)


def _counts(source: Source) -> Counter[str]:
    samples = source.samples
    return Counter(
        chunks=sum(sample.chunks.count for sample in samples),
        chunks_1_1=int(source.one_to_one.sum()),
        chunks_with_row=int((source.start_C >= 0).sum()),
        **_unknown(source),
        chunks_shifted=int(source.shifted.moved_C.sum()),
        snapped=sum(sample.encoded.snapped for sample in samples),
        **_precision(source),
    )


def _unknown(source: Source) -> dict[str, int]:
    """Of an imported capture, chunks with a label of unknown log-probability."""
    count = int(np.isneginf(_labels(source)).sum())
    return {"chunks_label_unknown": count} if count else {}


def _precision(source: Source) -> dict[str, int]:
    """Where either side's ends are not exact; nothing where the vocabularies are not at hand. What a template writes
    ends where it begins, so of conversations only samples are counted."""
    blanks, batch = source.maps.blanks, source.batch
    if blanks is None:
        return {}
    mine, theirs = blanks.student, blanks.teacher
    at_N = [sample.at for sample in source.samples]
    if source.chat:
        return {"teacher_snapped": sum(batch["snapped"][at].as_py() for at in at_N)}
    taken = pa.array(at_N, pa.int64())
    their_ids, their_ends = (batch[name].take(taken) for name in ("teacher_ids", "teacher_end"))
    own = [one.encoded for one in source.samples if len(one.encoded.ids)]
    if not own:
        return {"ends_moved": 0, "teacher_snapped": 0, "teacher_ends_moved": 0}
    my_ids, my_ends = np.concatenate([one.ids for one in own]), np.concatenate([one.ends for one in own])
    return {
        "ends_moved": mine.moved_ends(my_ids, my_ends, offsets_of([len(one.ids) for one in own])[:-1]),
        "teacher_snapped": sum(batch["snapped"].take(taken).to_pylist()),
        "teacher_ends_moved": theirs.moved_ends(
            their_ids.flatten().to_numpy(), their_ends.flatten().to_numpy(), their_ids.offsets.to_numpy()[:-1]
        ),
    }
