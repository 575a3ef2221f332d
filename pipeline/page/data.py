"""A sample as the JSON that its page's script reads: short, and exact where the store is.

Log-probabilities are whole numbers of a unit, later ranks as the distance to the rank before, so that errors never add
up; REST that is none is null, REST that is unknown is "?". Tokens are named by their place in a list of those used.

Shapes: T teacher tokens, R teacher rows, S student tokens, C chunks, K entries.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.html.visible import visible
from xtoken.pipeline.page.sample import Sample, Targets, Vocabulary
from xtoken.pipeline.store.codecs import open_codec

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
    found: dict[str, Any] = {
        "unit": UNIT,
        "t": teacher.places(sample.row["teacher_ids"]),
        "first": sample.row["first_row"],
        "realised": [_whole(value, UNIT) for value in sample.row["realised_logprob"]],
        **_rows(sample, teacher),
    }
    if sample.targets is None:
        found["chunks"] = _tokens_as_chunks(sample)
    else:
        student = Used(sample.targets.student)
        found["s"] = student.places(sample.targets.row["student_ids"])
        found["chunks"] = _chunks(sample, sample.targets)
        found["merge"], found["tau"] = sample.targets.manifest.merge, sample.targets.manifest.tau
        found["targets"] = _targets(sample.targets, teacher, student)
        found["moved"] = _moved(sample, sample.targets, teacher)
        found["student"] = student.listed()
    return {**found, "teacher": teacher.listed()}


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
    """The teacher's rows: tokens, steps, tail mass."""
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


def _tokens_as_chunks(sample: Sample) -> list[list[Any]]:
    """A capture alone has no chunks: each token stands for itself."""
    ends = list(range(1, len(sample.row["teacher_ids"]) + 1))
    nats = [None] * sample.row["first_row"] + [_whole(value, UNIT) for value in sample.row["realised_logprob"]]
    spans = chunk_bytes(sample, ends)
    return [[end, 0, visible(data), len(data), lp] for end, data, lp in zip(ends, spans, nats, strict=True)]


def _chunks(sample: Sample, targets: Targets) -> list[list[Any]]:
    """Index after the last teacher and student token, text, bytes, and log-probability of each chunk."""
    row = targets.row
    ends, spans = row["chunk_teacher_end"], chunk_bytes(sample, row["chunk_teacher_end"])
    nats = [None if math.isnan(value) else _whole(value, UNIT) for value in row["teacher_logprob"]]
    columns = (ends, row["chunk_student_end"], map(visible, spans), map(len, spans), nats)
    return [list(one) for one in zip(*columns, strict=True)]


def _moved(sample: Sample, targets: Targets, teacher: Used) -> dict[int, int]:
    """Where the mass goes of tokens in the sample's rows that W does not reach: a token, -1 REST, -2 nowhere."""
    if targets.projection is None or sample.rows is None:
        return {}
    route_U = targets.projection.routes(targets.manifest.unreached)  # type: ignore[arg-type]
    ids = np.unique(sample.rows.ids)
    gone = ids[route_U[ids] != ids]
    to = [place if place < 0 else teacher.places([place])[0] for place in route_U[gone].tolist()]
    return dict(zip(teacher.places(gone.tolist()), to, strict=True))


def _targets(targets: Targets, teacher: Used, student: Used) -> dict[str, Any]:
    """What each loss that the script knows holds, per chunk, for byte-prefix per student token."""
    row = targets.row
    made: dict[str, Callable[[], list[Any]]] = {
        "p-kl": lambda: _distributions(row, "pkl", teacher),
        "h-kl": lambda: _pairs(row, "hkl_common", "hkl_other", student),
        "byte-prefix": lambda: _prefixes(targets, student),
        "sparse-kl": lambda: _distributions(row, "skl", teacher),
        "gold": lambda: _pairs(row, "gold", "gold_other", student),
        "uld": lambda: [[gaps, lp] for gaps, lp in zip(_lists(row, "uld"), _factor(row), strict=True)],
        "alm": lambda: [_whole(value, UNIT) for value in row["alm_space_logprob"]],
    }
    return {loss: make() for loss, make in made.items() if loss in targets.manifest.losses}


def _distributions(row: dict[str, Any], name: str, used: Used) -> list[Any]:
    """[tokens, gaps, REST] of each row of a target."""
    rest = (_whole(value, UNIT) for value in row[f"{name}_rest_logprob"])
    return [[ids, gaps, r] for ids, gaps, r in zip(_ids(row, name, used), _lists(row, name), rest, strict=True)]


def _pairs(row: dict[str, Any], name: str, others: str, student: Used) -> list[Any]:
    """[student tokens, gaps, gaps of the others] of each chunk, and the factor where the loss has one."""
    factor = [[lp] for lp in _factor(row)] if name == "gold" else [[] for _ in row["chunk_student_end"]]
    columns = (_ids(row, name, student), _lists(row, name), _lists(row, others), factor)
    return [[ids, gaps, rest, *more] for ids, gaps, rest, more in zip(*columns, strict=True)]


def _prefixes(targets: Targets, student: Used) -> list[Any]:
    """[tokens, gaps, REST, child groups] of each student token; a group is [first token, tokens, log-mass]."""
    row, in_order = targets.row, _in_order_of_bytes(targets)
    groups = zip(
        _cut(row["child_low"], row["child_count"]),
        _cut(row["child_high"], row["child_count"]),
        _cut(row["child_logprob"], row["child_count"]),
        strict=True,
    )
    children = [
        [[student.places([in_order[low]])[0], high - low, _whole(lp, UNIT)] for low, high, lp in zip(*one, strict=True)]
        for one in groups
    ]
    return [[*one, more] for one, more in zip(_distributions(row, "prefix", student), children, strict=True)]


def _in_order_of_bytes(targets: Targets) -> list[int]:
    """The student's text tokens in order of (bytes, id); empty where no sample of these targets needs it."""
    if not targets.row["child_low"]:
        return []
    pieces, role = targets.student.pieces, targets.student.role
    return sorted((at for at, data in enumerate(pieces) if data and role[at] is None), key=pieces.__getitem__)


def _ids(row: dict[str, Any], name: str, used: Used) -> Iterator[list[int]]:
    return (used.places(ids) for ids in _cut(row[f"{name}_ids"], row[f"{name}_count"]))


def _lists(row: dict[str, Any], name: str) -> Iterator[list[int]]:
    return (_gaps(np.array(lp), UNIT) for lp in _cut(row[f"{name}_logprob"], row[f"{name}_count"]))


def _factor(row: dict[str, Any]) -> list[int | str | None]:
    return [_whole(value, UNIT) for value in row["factor_logprob"]]


def _cut(values: Sequence[Any], counts: Sequence[int]) -> Iterator[Sequence[Any]]:
    return (values[start:end] for start, end in pairwise(accumulate(counts, initial=0)))


def _gaps(logprob_K: NDArray[np.float64], unit: float) -> list[int]:
    level_K = np.floor(np.asarray(logprob_K, np.float64) / -unit + 0.5)
    found: list[int] = np.diff(level_K, prepend=0).astype(np.int64).tolist()
    return found


def _whole(logprob: float, unit: float) -> int | str | None:
    """-logprob in units; null of -inf, "?" of NaN."""
    if math.isnan(logprob):
        return _UNKNOWN
    return None if math.isinf(logprob) else math.floor(-logprob / unit + 0.5)
