"""A sample as the JSON that its page's script reads: short, and exact where the store is.

Log-probabilities are whole numbers of a unit, later ranks as the distance to the rank before, so that errors never add
up; no tail mass is null, an unknown one is "?". Tokens are named by their place in a list of those used.

Shapes: T teacher tokens, R teacher rows, S student tokens, C chunks, K entries.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.html.visible import visible
from xtoken.pipeline.page.sample import Sample, Targets, Vocabulary
from xtoken.pipeline.page.turns import chunks_as_boxes, spans_of, tokens_as_boxes, turns
from xtoken.pipeline.store.codecs import open_codec
from xtoken.schemas.losses import LOSSES, LossSchema

UNIT = 1e-4  # nats, of everything but a capture's rows
_UNKNOWN = "?"


class Used:
    """The tokens of one vocabulary that a page shows, numbered in order of their first use."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._place: dict[int, int] = {}

    def places(self, ids: Sequence[int]) -> list[int]:
        """Places of tokens in ``listed``."""
        return [self._place.setdefault(token, len(self._place)) for token in ids]

    def listed(self) -> list[Any]:
        """[id, piece] of each."""
        return [[token, self._vocabulary.shown(token)] for token in self._place]


def sample_data(sample: Sample) -> dict[str, Any]:
    """Everything that the script draws; see the module for how numbers are written."""
    teacher = Used(sample.teacher)
    shown: dict[str, Any] = {
        "unit": UNIT,
        "t": teacher.places(sample.row["teacher_ids"]),
        "row": sample.row_of_token,
        "realised": [_whole(value, UNIT) for value in sample.row["realised_logprob"]],
        **_rows(sample, teacher),
    }
    if sample.targets is None:
        shown["chunks"] = _tokens_as_chunks(sample)
    else:
        student = Used(sample.targets.student)
        shown["s"] = student.places(sample.targets.row["student_ids"])
        shown["chunks"] = _chunks(sample, sample.targets)
        shown["merge"], shown["tau"] = sample.targets.manifest.merge, sample.targets.manifest.tau
        shown["layout"], shown["targets"] = _targets(sample.targets, teacher, student)
        shown["learn"] = [int(one) for one in sample.targets.row.get("learn", [])]
        shown["moved"] = _moved(sample, sample.targets, teacher)
        shown["student"] = student.listed()
    if sample.is_chat:
        shown |= _conversation(sample, shown["chunks"])
    return {**shown, "teacher": teacher.listed()}


def _conversation(sample: Sample, chunks: Sequence[list[Any]]) -> dict[str, Any]:
    """Boxes in the place of chunks, each with its chunk (-1: none) and its span; the spans, and whose turn they are."""
    spans, ends = spans_of(sample.row), sample.row["teacher_end"]
    if sample.targets is None:
        boxes = tokens_as_boxes(spans)
    else:
        row = sample.targets.row
        both = [(end, student, nats is not None) for end, student, _, _, nats in chunks]
        boxes = chunks_as_boxes(spans, ends, both, row["student_end"])
    texts = chunk_bytes(sample, [box.teacher_end for box in boxes])
    shown = [
        [box.teacher_end, box.student_end, visible(data), len(data), chunks[box.chunk][4] if box.chunk >= 0 else None]
        for box, data in zip(boxes, texts, strict=True)
    ]
    return {
        "chunks": [[*one, box.chunk, box.span] for one, box in zip(shown, boxes, strict=True)],
        "spans": [[span.kind, int(span.learn)] for span in spans],
        "turns": turns(spans),
    }


def chunk_bytes(sample: Sample, ends: Sequence[int]) -> list[bytes]:
    """Bytes between tokens: of the text, or of the tokens where it was not stored.

    Args:
        ends: index after the last teacher token of each span.
    """
    row, spans = sample.row, list(pairwise([0, *ends]))
    if row["text"] is not None:
        data, at = row["text"].encode(), [0, *row["teacher_end"]]
        return [data[at[start] : at[end]] for start, end in spans]
    pieces = [sample.teacher.pieces[token] for token in row["teacher_ids"]]
    widths = np.diff(row["teacher_end"], prepend=0).tolist()
    if not row["snapped"]:  # a dummy space in front belongs to no text
        pieces = [piece[max(0, len(piece) - width) :] for piece, width in zip(pieces, widths, strict=True)]
    return [b"".join(pieces[start:end]) for start, end in spans]


def _rows(sample: Sample, teacher: Used) -> dict[str, Any]:
    """The teacher's distributions: tokens, steps, tail mass."""
    if sample.rows is None:
        return {"rows": None}
    rows, codec = sample.rows, open_codec(sample.manifest.codec)
    unit = codec.unit or UNIT
    ends = rows.offsets.tolist()
    shown = [
        [teacher.places(rows.ids[start:end].tolist()), _gaps(rows.logprob[start:end], unit), _whole(tail, unit)]
        for (start, end), tail in zip(pairwise(ends), rows.tail_logprob.tolist(), strict=True)
    ]
    more = codec.page_data(sample.row)
    if "entropy" in more:
        more["entropy"] = [_whole(-entropy, UNIT) for entropy in more["entropy"]]
    return {"rows": shown, "step": unit, **more}


_LABELS = "teacher_logprob"


def _tokens_as_chunks(sample: Sample) -> list[list[Any]]:
    """A capture alone has no chunks: each token stands for itself."""
    ends = list(range(1, len(sample.row["teacher_ids"]) + 1))
    realised = sample.row["realised_logprob"]
    nats = [None if row < 0 else _whole(realised[row], UNIT) for row in sample.row_of_token]
    spans = chunk_bytes(sample, ends)
    return [[end, 0, visible(data), len(data), lp] for end, data, lp in zip(ends, spans, nats, strict=True)]


def _chunks(sample: Sample, targets: Targets) -> list[list[Any]]:
    """Index after the last teacher and student token, text, bytes, and log-probability of each chunk."""
    row = targets.row
    ends, spans = row["chunk_teacher_end"], chunk_bytes(sample, row["chunk_teacher_end"])
    # NaN: no target; -inf: an import does not know a label
    nats = [None if math.isnan(one) else _UNKNOWN if one == -math.inf else _whole(one, UNIT) for one in row[_LABELS]]
    columns = (ends, row["chunk_student_end"], map(visible, spans), map(len, spans), nats)
    return [list(one) for one in zip(*columns, strict=True)]


def _moved(sample: Sample, targets: Targets, teacher: Used) -> dict[int, int]:
    """Where the mass of tokens that W does not reach goes: a token, -1 the tail mass, -2 nowhere."""
    if targets.projection is None or sample.rows is None:
        return {}
    route_U = targets.projection.routes(targets.manifest.unreached)  # type: ignore[arg-type]
    ids = np.unique(sample.rows.ids)
    gone = ids[route_U[ids] != ids]
    to = [place if place < 0 else teacher.places([place])[0] for place in route_U[gone].tolist()]
    return dict(zip(teacher.places(gone.tolist()), to, strict=True))


def _targets(targets: Targets, teacher: Used, student: Used) -> tuple[dict[str, Any], dict[str, Any]]:
    """How each loss with columns is laid out, and its values at each chunk or student token.

    A layout is the axis and a list of [kind, word] parts; a place holds the values of each part after the other:
    ``tokens`` (of side "t" or "s"): tokens and gaps; ``list``: gaps; ``tail``; ``groups``: [first token, tokens,
    log-mass] of each; ``value`` (with its label).
    """
    layout, values = {}, {}
    for loss in targets.manifest.losses:
        if LOSSES[loss].columns:
            layout[loss], columns = _loss(LOSSES[loss], targets, teacher, student)
            values[loss] = [list(place) for place in zip(*columns, strict=True)]
    return layout, values


def _loss(
    schema: LossSchema, targets: Targets, teacher: Used, student: Used
) -> tuple[dict[str, Any], list[Iterable[Any]]]:
    """The layout of a loss, and a column for each value of a place; a loss with token columns is drawn by tokens."""
    row = targets.row
    axis = "token" if any(column.axis == "token" for column in schema.columns) else "chunk"
    parts: list[list[str]] = []
    columns: list[Iterable[Any]] = []
    for table in schema.entry_tables:
        for count in table.counts:
            if schema.column(count).axis == axis:
                shown, made = _entries(schema, count, targets, teacher, student)
                parts, columns = parts + shown, columns + made
        tail = schema.tail_of(table)
        if tail is not None and tail.axis == axis:
            parts.append(["tail", ""])
            columns.append([_whole(value, UNIT) for value in row[tail.name]])
    for column in schema.along(axis, "value"):
        parts.append(["value", column.label or column.name])
        columns.append([_whole(value, UNIT) for value in row[column.name]])
    through_w = any(column.holds == "teacher ids" for column in schema.columns)
    return {"axis": axis, "parts": parts, "moved": through_w}, columns


def _entries(
    schema: LossSchema, count: str, targets: Targets, teacher: Used, student: Used
) -> tuple[list[list[str]], list[Iterable[Any]]]:
    """The part of one count column."""
    row, counts = targets.row, targets.row[count]
    ids = schema.along(count, "student ids", "teacher ids", "shared ids")
    ranks, logprobs = schema.along(count, "ranks"), schema.along(count, "logprob")
    if not logprobs:
        return [], []
    levels = _cut(row[logprobs[0].name], counts)
    if len(ranks) == 2:
        low, high = (_cut(row[column.name], counts) for column in ranks)
        in_order = _in_order_of_bytes(targets.student) if row[ranks[0].name] else []
        groups = [
            [[student.places([in_order[a]])[0], b - a, _whole(value, UNIT)] for a, b, value in zip(*one, strict=True)]
            for one in zip(low, high, levels, strict=True)
        ]
        return [["groups", ""]], [groups]
    gaps = [_gaps(np.array(values), UNIT) for values in levels]
    if not ids:
        return [["list", ""]], [gaps]
    side = "s" if ids[0].holds == "student ids" else "t"
    used = student if side == "s" else teacher
    return [["tokens", side]], [[used.places(tokens) for tokens in _cut(row[ids[0].name], counts)], gaps]


def _in_order_of_bytes(student: Vocabulary) -> list[int]:
    """The student's text tokens in order of (bytes, id)."""
    pieces, role = student.pieces, student.role
    return sorted((at for at, data in enumerate(pieces) if data and role[at] is None), key=pieces.__getitem__)


def _cut(values: Sequence[Any], counts: Sequence[int]) -> Iterator[Sequence[Any]]:
    return (values[start:end] for start, end in pairwise(accumulate(counts, initial=0)))


def _gaps(logprob_K: NDArray[np.float64], unit: float) -> list[int]:
    level_K = np.floor(np.asarray(logprob_K, np.float64) / -unit + 0.5)
    gaps: list[int] = np.diff(level_K, prepend=0).astype(np.int64).tolist()
    return gaps


def _whole(logprob: float, unit: float) -> int | str | None:
    """-logprob in units; null of -inf, "?" of NaN."""
    if math.isnan(logprob):
        return _UNKNOWN
    return None if math.isinf(logprob) else math.floor(-logprob / unit + 0.5)
