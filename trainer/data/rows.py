"""All rows of a row group at once: checked, cut to the layout, and handed out per sample as views.

Positions of a row count its predicted tokens: all of them, or of conversations those that are taught. A chunk without
a row of the teacher there is a gap: what lies between taught spans, or has no counterpart in the teacher's text.

Shapes: R rows, S student tokens, P positions, C chunks, K entries, each counted over the whole row group; "x_R" of
R + 1 numbers are offsets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.data.layout import SCORE_COLUMNS, Layout
from xtoken.trainer.data.targets import RowGroup
from xtoken.trainer.losses.base import WEIGHT, Loss
from xtoken.trainer.ragged import Array, Columns, Ints, Ragged, running

NORMALISED_WITHIN = 1e-3  # float32 log-probabilities of up to 256 cells sum to 1 far closer than this
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Rows:
    """A row group's chunks.

    Attributes:
        token_R, chunk_R: where each row's tokens and chunks begin.
        owner_C: the row of each chunk. start_C, end_C: its first token and the one after its last, counted in its row.
        gap_C: it is a gap; none of plain text is.
        columns: the loss's.
    """

    token_R: Ints
    chunk_R: Ints
    owner_C: Ints
    start_C: Ints
    end_C: Ints
    gap_C: Bools
    columns: Mapping[str, Array]

    @classmethod
    def of(
        cls, token_R: Array, chunk_R: Array, end_C: Array, columns: Mapping[str, Array], gap_C: Bools | None = None
    ) -> "_Rows":
        """From offsets and ends."""
        chunks_R, end_C = np.diff(chunk_R), end_C.astype(np.int64)
        start_C = np.zeros(len(end_C), np.int64)
        start_C[1:] = end_C[:-1]
        start_C[chunk_R[:-1][chunks_R > 0]] = 0
        owner_C = np.repeat(np.arange(len(chunks_R)), chunks_R)
        gap_C = np.zeros(len(end_C), np.bool_) if gap_C is None else gap_C
        return cls(token_R.astype(np.int64), chunk_R.astype(np.int64), owner_C, start_C, end_C, gap_C, columns)

    @property
    def span_C(self) -> tuple[Ints, Ints]:
        """``start_C`` and ``end_C``, counted over all rows."""
        before_C = self.token_R[self.owner_C]
        return self.start_C + before_C, self.end_C + before_C


@dataclass(frozen=True)
class GroupTargets:
    """One teacher's targets for the samples of a row group.

    Attributes:
        whole: the valid chunks of all rows, each row's positions counted from its own first.
        chunk_R: the rows' offsets in these chunks. bounds: where each row's values of a column begin and end.
        score_R: what a sample's weight is a softmax of; NaN = the teacher has no distribution there.
    """

    whole: Ragged[Array]
    chunk_R: list[int]
    bounds: Mapping[str, tuple[list[int], list[int]]]
    score_R: list[float]

    def row(self, row: int) -> Ragged[Array]:
        """One sample's; views."""
        whole, chunks = self.whole, slice(self.chunk_R[row], self.chunk_R[row + 1])
        columns = {name: whole.columns[name][begin[row] : end[row]] for name, (begin, end) in self.bounds.items()}
        return Ragged(whole.first_C[chunks], whole.length_C[chunks], whole.next_C[chunks], columns, whole.spec)


def group_targets(group: RowGroup, loss: Loss, layout: Layout) -> GroupTargets:
    """Check and cut the rows of a row group.

    Raises:
        VerificationError: a row's lists do not fit each other, or hold an id outside the vocabulary.
    """
    columns = {name: group.lists[name][1] for name in loss.columns.names}
    rows = _Rows.of(group.lists["student_ids"][0], *group.lists["chunk_student_end"], columns)
    _check(group, rows, loss.columns, layout.vocabulary)
    if layout.chat:
        rows = _with_gaps(group, rows)
    score_R = [_score(group, row, layout.weighting) for row in range(len(group.sample_ids))]
    if type(loss).regroup is not Loss.regroup:
        rows = _regrouped(rows, loss)
    if loss.kinds is not None:
        _refuse_lengths(group, "chunk_teacher_end", rows.chunk_R)
        rows = replace(rows, columns={**rows.columns, WEIGHT: _chunk_weights(group, rows, loss.kinds)})
    return _cut(rows, _predicted(group, rows, layout), loss, layout, score_R)


def _with_gaps(group: RowGroup, rows: _Rows) -> _Rows:
    """Rows of conversations; all tokens of a chunk that is no gap are taught."""
    _refuse_lengths(group, "learn", rows.token_R)
    _refuse_lengths(group, "teacher_logprob", rows.chunk_R)
    rows = replace(rows, gap_C=np.isnan(group.lists["teacher_logprob"][1]))
    _refuse(group, rows.chunk_R, ~rows.gap_C & ~_inside(rows, group.lists["learn"][1]))
    return rows


def _predicted(group: RowGroup, rows: _Rows, layout: Layout) -> Bools:
    """[S] the token is predicted: it is taught, and something stands before it."""
    first_R = rows.token_R[:-1][np.diff(rows.token_R) > 0]
    predicted_S = group.lists["learn"][1].copy() if layout.chat else np.ones(rows.token_R[-1], np.bool_)
    if layout.context is None:
        predicted_S[first_R] = False
    return predicted_S


def _inside(rows: _Rows, of_S: Bools) -> Bools:
    """[C] all tokens of the chunk are ``of_S``."""
    (first_C, stop_C), before_S = rows.span_C, running(of_S)
    inside_C: Bools = before_S[stop_C] - before_S[first_C] == stop_C - first_C
    return inside_C


def _chunk_weights(group: RowGroup, rows: _Rows, kinds: tuple[float, float]) -> NDArray[np.float64]:
    """[C] by whether a chunk is one token on either side."""
    teacher = _Rows.of(rows.token_R, *group.lists["chunk_teacher_end"], {})
    one_C = (rows.end_C - rows.start_C == 1) & (teacher.end_C - teacher.start_C == 1)
    return np.where(one_C, *kinds)


def _cut(rows: _Rows, predicted_S: Bools, loss: Loss, layout: Layout, score_R: list[float]) -> GroupTargets:
    position_S = running(predicted_S)
    kept_R = np.minimum(np.diff(rows.token_R), layout.max_tokens)
    low_R, high_R = position_S[rows.token_R[:-1]], position_S[rows.token_R[:-1] + kept_R]
    (first_C, stop_C), length_C = rows.span_C, rows.end_C - rows.start_C
    valid_C = (length_C > 0) & (rows.end_C <= kept_R[rows.owner_C]) & _inside(rows, predicted_S)
    valid_C &= loss.valid(first_C, rows.columns) & ~rows.gap_C
    if loss.kinds is not None:
        valid_C &= rows.columns[WEIGHT] > 0
    # the token after a chunk that ends where the sample is cut is not predicted, as if the sample ended there
    followed_C = (rows.end_C < kept_R[rows.owner_C]) & np.append(predicted_S, False)[stop_C]
    next_C = np.where(followed_C, position_S[stop_C] - low_R[rows.owner_C], -1)
    # where everything is chosen, as nearly always, a slice makes views; a mask would copy every column
    chosen, taken_S = _all_or(valid_C), _all_or(predicted_S)
    valid_R = running(valid_C)[rows.chunk_R]
    columns, bounds = dict[str, Array](), dict[str, tuple[list[int], list[int]]]()
    for name in loss.spec.chunk:
        columns[name], bounds[name] = rows.columns[name][chosen], (valid_R[:-1].tolist(), valid_R[1:].tolist())
    for name in loss.columns.token:
        columns[name], bounds[name] = rows.columns[name][taken_S], (low_R.tolist(), high_R.tolist())
    for count_name, names in loss.columns.entries.items():
        values, count = {name: rows.columns[name] for name in names}, rows.columns[count_name]
        if count_name in loss.columns.chunk:
            values, begin_R, stop_R = _entries_of_chunks(values, running(count), rows.chunk_R, valid_C, valid_R)
        else:
            taken_K = taken_S if isinstance(taken_S, slice) else np.repeat(predicted_S, count)
            entry_P = running(count[taken_S])
            values = {name: array[taken_K] for name, array in values.items()}
            begin_R, stop_R = entry_P[low_R], entry_P[high_R]
        columns |= values
        bounds |= dict.fromkeys(names, (begin_R.tolist(), stop_R.tolist()))
    first_P_C = position_S[first_C] - low_R[rows.owner_C]
    whole = Ragged(first_P_C[chosen], length_C[chosen], next_C[chosen], columns, loss.spec)
    return GroupTargets(whole, valid_R.tolist(), bounds, score_R)


def _all_or(mask: Bools) -> slice | Bools:
    """What chooses where the mask is true."""
    return slice(None) if mask.all() else mask


def _entries_of_chunks(
    values: Mapping[str, Array], entry_C: Ints, chunk_R: Ints, valid_C: Bools, valid_R: Ints
) -> tuple[dict[str, Array], Ints, Ints]:
    """Entries of valid chunks, and where each row's begin and end; copied only if others stand among them.

    Args:
        entry_C: offsets of the chunks' entries. valid_R: offsets of the rows' valid chunks.
    """
    count_C = np.diff(entry_C)
    kept_R = running(count_C * valid_C)[chunk_R]
    at = np.flatnonzero(valid_C)
    some_R = valid_R[1:] > valid_R[:-1]
    begin_R, stop_R = np.zeros((2, len(some_R)), np.int64)
    begin_R[some_R] = entry_C[at[valid_R[:-1][some_R]]]
    stop_R[some_R] = entry_C[at[valid_R[1:][some_R] - 1] + 1]
    if (stop_R - begin_R == np.diff(kept_R)).all():
        return dict(values), begin_R, stop_R
    chosen_K = np.repeat(valid_C, count_C)
    return {name: array[chosen_K] for name, array in values.items()}, kept_R[:-1], kept_R[1:]


def _regrouped(rows: _Rows, loss: Loss) -> _Rows:
    """Rows whose chunks the loss joins, run by run of a row and never over a gap: such columns are short."""
    assert set(loss.columns.names) == set(loss.columns.chunk), "joined chunks have one value each"
    if not len(rows.end_C):
        return rows
    gaps = np.flatnonzero(rows.gap_C)
    cuts_G = np.unique(np.concatenate([rows.chunk_R, gaps, gaps + 1]))
    joined = [
        loss.regroup(rows.end_C[low:high], {name: rows.columns[name][low:high] for name in rows.columns})
        for low, high in pairwise(cuts_G.tolist())
    ]
    columns = {name: np.concatenate([arrays[name] for _, arrays in joined]) for name in rows.columns}
    length_G = np.array([len(end_C) for end_C, _ in joined], np.int64)
    chunk_R = running(length_G)[np.searchsorted(cuts_G, rows.chunk_R)]
    gap_C = np.repeat(rows.gap_C[cuts_G[:-1]], length_G)
    return _Rows.of(rows.token_R, chunk_R, np.concatenate([end_C for end_C, _ in joined]), columns, gap_C)


def _check(group: RowGroup, rows: _Rows, spec: Columns, vocabulary: int) -> None:
    ids_S = group.lists["student_ids"][1]
    if len(ids_S) and (ids_S.min() < 0 or ids_S.max() >= vocabulary):
        _refuse(group, rows.token_R, (ids_S < 0) | (ids_S >= vocabulary))
    length_C = np.diff(rows.token_R)[rows.owner_C]
    _refuse(group, rows.chunk_R, (rows.end_C < rows.start_C) | (rows.end_C > length_C))
    for names, offset_R in ((spec.chunk, rows.chunk_R), (spec.token, rows.token_R)):
        for name in names:
            _refuse_lengths(group, name, offset_R)
    for count_name, names in spec.entries.items():
        offset_R = rows.chunk_R if count_name in spec.chunk else rows.token_R
        count = rows.columns[count_name]
        _refuse(group, offset_R, count < 0)
        for name in names:
            _refuse_lengths(group, name, running(count)[offset_R])
    for name in rows.columns:
        if name.endswith("_rest_logprob") and not group.whole:
            offset_R = rows.chunk_R if name in spec.chunk else rows.token_R
            _refuse(group, offset_R, ~_normalised(rows.columns, name))


def _refuse_lengths(group: RowGroup, name: str, offset_R: Ints) -> None:
    """Refuse a column unless its lists are as long as the offsets say."""
    wrong_R = np.diff(group.lists[name][0]) != np.diff(offset_R)
    _refuse(group, np.arange(len(offset_R)), wrong_R)


def _refuse(group: RowGroup, offset_R: Ints, wrong: Bools) -> None:
    """Refuse the row that the first wrong item belongs to."""
    if not wrong.any():
        return
    row = int(np.searchsorted(offset_R, np.argmax(wrong), side="right")) - 1
    raise VerificationError(
        f"sample {group.sample_ids[row]!r} in part {group.ref.part} of the targets contradicts itself; "
        "run 'xtoken verify' on the targets and write them again"
    )


def _normalised(columns: Mapping[str, Array], rest_name: str) -> Bools:
    """Entries and tail mass (if known) sum to 1 wherever there are entries; without that a KL could fall below zero."""
    prefix = rest_name.removesuffix("rest_logprob")
    filled = columns[prefix + "count"] > 0
    first_F = running(columns[prefix + "count"])[:-1][filled]
    right = np.ones(len(filled), np.bool_)
    if len(first_F):
        # float32 sums of at most some hundred cells are off by 1e-5; what overflows is not normalised
        with np.errstate(over="ignore", invalid="ignore"):
            kept_F = np.add.reduceat(np.exp(columns[prefix + "logprob"]), first_F)
            tail_F = np.exp(np.nan_to_num(columns[rest_name][filled], nan=-np.inf))
            right[filled] = np.abs(kept_F + tail_F - 1) < NORMALISED_WITHIN
    return right


def _score(group: RowGroup, row: int, weighting: str) -> float:
    """Higher = more trusted. CE is per student token, so that teachers of other tokenizers compare."""
    if weighting == "static":
        return 0.0
    (name,) = SCORE_COLUMNS[weighting]
    value = group.values(name, row).astype(np.float64)
    if weighting == "ce":
        known_C = ~np.isnan(value)
        tokens = np.diff(group.values("chunk_student_end", row), prepend=0)[known_C].sum()
        return float(value[known_C].sum() / tokens) if tokens else math.nan
    return float(-value[0] if weighting == "entropy" else value[0])
