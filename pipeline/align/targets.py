"""From a batch of capture rows and the student's tokens to a batch of the target table.

Shapes: N samples, S student tokens, R teacher rows, C chunks, K kept entries (all samples of a batch together),
U teacher vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.blanks import Blanks, Shifted
from xtoken.pipeline.align.chunks import Joined, chunks_per_sample
from xtoken.pipeline.align.kernels import realised
from xtoken.pipeline.align.kernels_project import FATES, MASS_CLASSES, project_rows
from xtoken.pipeline.align.kernels_targets import split_targets
from xtoken.pipeline.align.prefix import PrefixMaps, prefix_columns
from xtoken.pipeline.align.rows import Recipe, RowBatch, Rows, merge_rows
from xtoken.pipeline.project.projection import TO_REST, Projection, Unreached
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.tables import target_columns, targets

_PPM = 1_000_000
Values = dict[str, NDArray[Any]]


class Routes(NamedTuple):
    """The sparse map that teacher rows go through, as ``project_rows`` takes it."""

    fate_U: NDArray[np.int8]
    mass_class_U: NDArray[np.int8]
    offset_U: NDArray[np.int64]
    to_M: NDArray[np.int32]
    share_M: NDArray[np.float64]

    @classmethod
    def of(cls, route_U: NDArray[np.int32], column_U: NDArray[np.int8]) -> "Routes":
        """Routes of W: a token stays, or all its mass goes to one other token, to REST, or nowhere.

        Args:
            route_U: ``Projection.routes``.
            column_U: ``Projection.columns_by_kind``.
        """
        stays_U, spread_U = route_U == np.arange(len(route_U)), route_U >= 0
        fate_U = np.select([stays_U, spread_U, route_U == TO_REST], [0, 1, 2], 3).astype(np.int8)
        class_U = np.select([stays_U, spread_U], [column_U, MASS_CLASSES.index("moved")], MASS_CLASSES.index("lost"))
        moved_U = fate_U == FATES.index("spread")
        offset_U = np.concatenate([np.zeros(1, np.int64), np.cumsum(moved_U)])
        to_M = route_U[moved_U]
        return cls(fate_U, class_U.astype(np.int8), offset_U, to_M, np.ones(len(to_M)))


@dataclass(frozen=True)
class Maps:
    """W and the vocabularies as the kernels need them; arrays [U] over the teacher's (see ``Projection``).

    Attributes:
        student_size, teacher_size: tokens of each vocabulary.
        student_text: the student's tokens with bytes.
        routes: where each teacher token's mass goes.
        pair_U: the student token paired with it in H-KL's common set, or -1.
        matched_U: likewise in strict GOLD's.
        prefix: for byte-prefix, else None.
        blanks: both vocabularies where the teacher's is known, else None.
        moves: mass of teacher tokens that the student cannot reach moves to a prefix of theirs.
    """

    student_size: int
    teacher_size: int
    student_text: int
    routes: Routes
    pair_U: NDArray[np.int32]
    matched_U: NDArray[np.int32]
    prefix: PrefixMaps | None
    blanks: Blanks | None = None
    moves: bool = True

    @classmethod
    def of(
        cls,
        projection: Projection,
        unreached: Unreached,
        student: TokenTable,
        teacher: TokenTable | None = None,
        *,
        prefix: bool = True,
    ) -> "Maps":
        """Maps of one projection under one policy for unreached teacher tokens.

        Args:
            projection: W.
            unreached: what becomes of teacher tokens that no row of W reaches.
            student: its tokens.
            teacher: its tokens; without them no row is shifted and there are no maps for byte-prefix.
            prefix: make the maps for byte-prefix.
        """
        return cls(
            projection.student.size,
            projection.teacher.size,
            sum(bool(size) and role is None for size, role in zip(student.lengths.tolist(), student.role, strict=True)),
            Routes.of(projection.routes(unreached), projection.columns_by_kind()),
            projection.common_student(),
            projection.matched_student(),
            PrefixMaps.of(student, teacher, projection) if teacher is not None and prefix else None,
            None if teacher is None else Blanks(student, teacher),
            unreached == "prefix",
        )


@dataclass(frozen=True)
class _Source:
    """What the columns of a batch are made of."""

    batch: pa.RecordBatch
    samples: Sequence[Joined]
    maps: Maps
    recipe: Recipe
    rows: RowBatch
    start_C: NDArray[np.int64]
    end_C: NDArray[np.int64]

    @cached_property
    def shifted(self) -> Shifted:
        """Rows, with those of chunks that one side begins with a blank of its own shifted."""
        rows = self.rows.rows
        if self.maps.blanks is None:
            return Shifted.none(rows, self.start_C)
        return self.maps.blanks.shift(self.batch, self.samples, rows, self.start_C)

    @cached_property
    def plain(self) -> tuple[Rows, NDArray[np.int64]]:
        """Rows as the teacher gave them, and which is each chunk's."""
        return merge_rows(self.rows.rows, self.start_C, self.end_C, self.recipe.merge, self.maps.teacher_size)

    def merged(self, *, prefix: bool = False) -> tuple[Rows, NDArray[np.int64]]:
        """Rows in the student's terms, and which is each chunk's; a mean has no shifted rows, and leaves them out.

        Args:
            prefix: see ``Shifted.prefix_C``.
        """
        (rows, row_C), shifted = self.plain, self.shifted
        moved_C = shifted.moved_C
        if not moved_C.any():
            return rows, row_C
        if self.recipe.merge == "mean":
            return rows, np.where(moved_C, -1, row_C)
        instead_C = shifted.prefix_C if prefix else shifted.row_C
        return shifted.rows, np.where(moved_C & (row_C == self.start_C), instead_C, row_C)

    def split(self, pair_U: NDArray[np.int32]) -> tuple[NDArray[Any], ...]:
        """``split_targets`` of every chunk."""
        rows, row_C = self.merged()
        return split_targets(row_C, rows.offsets, rows.ids, rows.logprob, pair_U)


def target_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], maps: Maps, recipe: Recipe
) -> tuple[pa.RecordBatch, Counter[str]]:
    """Rows of ``xtoken.schemas.tables.targets`` for these samples, and counts for ``Part.counts``.

    Counts: ``chunks`` with bytes or eos, ``chunks_1_1`` among them, ``chunks_with_row``, ``chunks_shifted``, which one
    side begins with a blank of its own; ``snapped`` samples of the student and ``teacher_snapped`` ones, ``ends_moved``
    and ``teacher_ends_moved``, tokens whose own end is not known; under ALM ``space_chunks``, those with a number in
    alm_space_logprob; under P-KL ``mass_*_ppm``: teacher mass in millionths of a chunk that is exact, reached by pieces
    only, moved, lost, and not kept (rest); divide by 1e6 times ``chunks_with_row`` for shares. Where REST is unknown
    the shares are those of what was kept.

    Raises:
        VerificationError: lists of a sample do not fit each other.
    """
    rows = RowBatch.of(batch, recipe)
    source = _Source(batch, samples, maps, recipe, rows, *rows.spans(samples))
    values, counts = _base(source), _counts(source)
    for loss in recipe.losses:
        found, figures = _COLUMNS[loss](source)
        values.update(found)
        counts.update(figures)
    return _record_batch(values, source), counts


def _record_batch(values: Values, source: _Source) -> pa.RecordBatch:
    """Values of all samples, one after the other, as lists of each sample's."""
    schema = targets(source.recipe.losses)
    lengths = {
        "token": np.array([len(sample.encoded.ids) for sample in source.samples], np.int64),
        "chunk": chunks_per_sample(source.samples),
    }
    at = pa.array([sample.at for sample in source.samples], pa.int64())
    arrays: list[pa.Array] = [source.batch["sample_id"].take(at)]
    for name, axis in target_columns(source.recipe.losses)[1:]:
        field = schema.field(name)
        if axis == "sample":
            arrays.append(pa.array(values[name], field.type))
            continue
        if axis not in lengths:
            # a count column stands before what it counts
            per = next(column.axis for column in target_columns(source.recipe.losses) if column.name == axis)
            lengths[axis] = _sums(values[axis], lengths[per])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[axis])]).astype(np.int32)
        flat_values = pa.array(values[name], field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat_values, type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _sums(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of each sample's consecutive values, [N]."""
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
    stops = np.cumsum(lengths_N)
    sums: NDArray[np.int64] = running[stops] - running[stops - lengths_N]
    return sums


def _base(source: _Source) -> Values:
    samples, start_C, end_C = source.samples, source.start_C, source.end_C
    empty = np.zeros(0, np.int32)
    entropy_N, top1_N = _confidence(source)
    return {
        "teacher_entropy": entropy_N,
        "teacher_top1": top1_N,
        "student_ids": np.concatenate([empty, *(sample.encoded.ids for sample in samples)]),
        "student_end": np.concatenate([empty, *(sample.encoded.ends for sample in samples)]),
        "chunk_student_end": np.concatenate([empty, *(sample.chunks.student_end for sample in samples)]),
        "chunk_teacher_end": np.concatenate([empty, *(sample.chunks.teacher_end for sample in samples)]),
        "teacher_logprob": realised(flat(source.batch, "realised_logprob").astype(np.float64), start_C, end_C),
    }


def _confidence(source: _Source) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means over each sample's chunks with a row: entropy and largest probability at temperature 1, NaN = no row.

    Of draws: the stored entropy of whole rows, and the largest share. Of rows that a subset left out: NaN.
    """
    entropy_R, top1_R = source.rows.entropy, source.rows.top1
    chunks_N = chunks_per_sample(source.samples)
    sample_C = np.repeat(np.arange(len(chunks_N)), chunks_N)[source.start_C >= 0]
    row_C = source.start_C[source.start_C >= 0]
    rows_N = np.bincount(sample_C, minlength=len(chunks_N)).astype(np.float64)
    rows_N[rows_N == 0] = np.nan
    entropy_N = np.bincount(sample_C, weights=entropy_R[row_C], minlength=len(chunks_N)) / rows_N
    top1_N = np.bincount(sample_C, weights=top1_R[row_C], minlength=len(chunks_N)) / rows_N
    return entropy_N.astype(np.float32), top1_N.astype(np.float32)


def _counts(source: _Source) -> Counter[str]:
    samples = source.samples
    return Counter(
        chunks=sum(len(sample.chunks.student_end) - int(sample.chunks.lead) for sample in samples),
        chunks_1_1=sum(sample.chunks.one_to_one for sample in samples),
        chunks_with_row=int((source.start_C >= 0).sum()),
        chunks_shifted=int(source.shifted.moved_C.sum()),
        snapped=sum(sample.encoded.snapped for sample in samples),
        **_precision(source),
    )


def _precision(source: _Source) -> dict[str, int]:
    """Where either side's ends are not exact; nothing where the vocabularies are not at hand."""
    blanks, batch = source.maps.blanks, source.batch
    if blanks is None:
        return {}
    mine, theirs = blanks.student, blanks.teacher
    at_N = [sample.at for sample in source.samples]
    stops = np.cumsum(list_lengths(batch, "teacher_ids"))[:-1]
    ids, ends = (np.split(flat(batch, name), stops) for name in ("teacher_ids", "teacher_end"))
    return {
        "ends_moved": sum(mine.moved_ends(one.encoded.ids, one.encoded.ends) for one in source.samples),
        "teacher_snapped": sum(batch["snapped"][at].as_py() for at in at_N),
        "teacher_ends_moved": sum(theirs.moved_ends(ids[at], ends[at]) for at in at_N),
    }


def _ce(source: _Source) -> tuple[Values, Mapping[str, int]]:  # noqa: ARG001
    return {}, {}


def _pkl(source: _Source) -> tuple[Values, Mapping[str, int]]:
    """P-KL's columns. Of draws, mass that no teacher token of W's takes has no cell: REST's share of the student
    would depend on which tokens were drawn, and renormalising without it divides by a draw."""
    rows, row_C = source.merged(prefix=source.maps.moves)
    closed = source.recipe.merge == "mean"
    kept = (rows.offsets, rows.ids, rows.logprob, rows.p, rows.rest)
    most = source.recipe.entries or len(rows.ids)
    count_C, ids_K, logprob_K, rest_C, mass_C5 = project_rows(row_C, *kept, *source.maps.routes, closed, most)
    if source.recipe.drawn:
        rest_C[count_C > 0] = -np.inf
    columns = {"pkl_count": count_C, "pkl_ids": ids_K, "pkl_logprob": logprob_K, "pkl_rest_logprob": rest_C}
    shares = zip(MASS_CLASSES, mass_C5.sum(axis=0).tolist(), strict=True)
    return columns, {f"mass_{name}_ppm": round(share * _PPM) for name, share in shares}


def _hkl(source: _Source) -> tuple[Values, Mapping[str, int]]:
    names = ("hkl_common_count", "hkl_common_ids", "hkl_common_logprob", "hkl_other_count", "hkl_other_logprob")
    return dict(zip(names, source.split(source.maps.pair_U), strict=True)), {}


def _gold(source: _Source) -> tuple[Values, Mapping[str, int]]:
    names = ("gold_count", "gold_ids", "gold_logprob", "gold_other_count", "gold_other_logprob")
    columns = dict(zip(names, source.split(source.maps.matched_U), strict=True))
    return {**columns, "factor_logprob": _factor(source)}, {}


def _uld(source: _Source) -> tuple[Values, Mapping[str, int]]:
    # probabilities by size alone: whose they are does not matter, so no row is shifted
    rows, row_C = source.plain
    none_U = np.full(source.maps.teacher_size, -1, np.int32)
    _, _, _, count_C, logprob_K = split_targets(row_C, rows.offsets, rows.ids, rows.logprob, none_U)
    return {"uld_count": count_C, "uld_logprob": logprob_K, "factor_logprob": _factor(source)}, {}


def _factor(source: _Source) -> NDArray[np.float32]:
    """The realised tokens before a chunk's last row or after its first; NaN = no row."""
    start_C, end_C = source.start_C, source.end_C
    if source.recipe.merge == "last":
        return realised(source.rows.realised, start_C, end_C - 1)
    return realised(source.rows.realised, np.where(start_C < 0, -1, start_C + 1), end_C)


def _alm(source: _Source) -> tuple[Values, Mapping[str, int]]:
    """Log P(starts with a space) of the row after each chunk, where the sample has one."""
    batch, offset_N = source.batch, source.rows.offset_N
    has_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
    space_R = np.full(int(offset_N[-1]), np.nan, np.float32)
    space_R[np.repeat(has_N, np.diff(offset_N))] = flat(batch, "space_logprob")
    at_N = np.array([sample.at for sample in source.samples], np.int64)
    at_C = np.repeat(at_N, chunks_per_sample(source.samples))
    within_C = (source.end_C >= offset_N[at_C]) & (source.end_C < offset_N[at_C + 1])
    space_C = np.full(len(at_C), np.nan, np.float32)
    space_C[within_C] = space_R[source.end_C[within_C]]
    return {"alm_space_logprob": space_C}, {"space_chunks": int((~np.isnan(space_C)).sum())}


def _prefix(source: _Source) -> tuple[Values, Mapping[str, int]]:
    assert source.maps.prefix is not None, "byte-prefix needs both vocabularies"
    columns = prefix_columns(
        source.batch,
        source.samples,
        source.shifted,
        source.start_C,
        source.maps.prefix,
        roots_only=source.recipe.drawn,
    )
    return columns, {}


def _skl(source: _Source) -> tuple[Values, Mapping[str, int]]:
    count_C, ids_K, logprob_K, _, _ = source.split(np.arange(source.maps.teacher_size, dtype=np.int32))
    rows, row_C = source.merged()
    rest_C = np.zeros(len(row_C), np.float32)
    rest_C[row_C >= 0] = rows.rest[row_C[row_C >= 0]]
    return {"skl_count": count_C, "skl_ids": ids_K, "skl_logprob": logprob_K, "skl_rest_logprob": rest_C}, {}


_COLUMNS: dict[str, Callable[[_Source], tuple[Values, Mapping[str, int]]]] = {
    "ce": _ce,
    "p-kl": _pkl,
    "h-kl": _hkl,
    "gold": _gold,
    "uld": _uld,
    "alm": _alm,
    "byte-prefix": _prefix,
    "sparse-kl": _skl,
}
