"""A W whose weights were trained (``--learn-w``): its folder, and which rows moved most.

Shapes: N entries of W, V student vocabulary.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.project.build import common_set
from xtoken.pipeline.project.files import read_tables, refuse_other_projection, write_projection
from xtoken.pipeline.project.page import literal
from xtoken.pipeline.project.projection import EXACT, Projection
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import read_side_table
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import ProjectionManifest, TargetManifest, read_manifest

STUDENT_VOCAB_FILE = "student_vocab.parquet"
ROWS_LISTED = 50
MOVED_AT_ALL = 1e-3  # a row whose distance is smaller has not moved to speak of
_SUM_SLACK = 1e-4  # float32 softmax of a few entries
Row = dict[str, Any]


def write_learned(source: str, weights: NDArray[np.float32], out: str, trained_on: str) -> ProjectionManifest:
    """Write a projection folder with the W of a target folder under trained weights.

    Which entries exist and what is unreached stay; the common set follows the new weights.

    Args:
        source: target folder that was trained on.
        weights: float32 [N], one per entry of its w.parquet, in that order; rows sum to 1.
        out: folder for w.parquet, unreached.parquet and manifest.json, whose coverage lists the rows that moved most.
        trained_on: what the weights were trained on, for the manifest.

    Raises:
        XtokenError: the weights are no W on these entries, or ``out`` holds something else.
        VerificationError: a table of ``source`` is not the one its manifest records.
    """
    manifest = read_manifest(source, TargetManifest)
    before = read_tables(source, manifest.files, manifest.student, manifest.teacher_tokenizer)
    vocab = read_side_table(Folder(source), STUDENT_VOCAB_FILE, manifest.files).sort_by("token_id")
    options = {"rule": "learned", "trained_on": trained_on, "from_w": before.hash}
    refuse_other_projection(out, before.student, before.teacher, options)
    after = reweighted(before, weights, np.array(vocab["byte_fallback"].to_pylist(), np.bool_))
    distance_V = distances(before, after)
    figures = {
        "trained_on": trained_on,
        "rows_with_a_choice": int((np.bincount(before.student_id) > 1).sum()),
        "rows_moved": int((distance_V > MOVED_AT_ALL).sum()),
        "largest_move": round(float(distance_V.max(initial=0.0)), 6),
        "moved": named(moved_rows(before, after, ROWS_LISTED), before, vocab),
    }
    return write_projection(out, after, options, figures)


def reweighted(before: Projection, weights: NDArray[np.float32], byte_fallback: NDArray[np.bool_]) -> Projection:
    """The same entries under other weights [N], each row's largest first again.

    Args:
        before: W.
        weights: in the order of its entries.
        byte_fallback: bool [V], the student's ``<0xHH>`` tokens.

    Raises:
        XtokenError: another number of weights, one that is negative or not finite, or a row that does not sum to 1.
    """
    if weights.shape != before.weight.shape:
        raise XtokenError(f"W has {len(before.weight):,} entries, but {weights.size:,} weights were given")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise XtokenError("trained weights of W must be finite and at least 0; train again with a smaller --w-lr")
    totals = np.bincount(before.student_id, weights=weights)[before.student_id]
    if len(totals) and abs(totals - 1).max() > _SUM_SLACK:
        at = int(abs(totals - 1).argmax())
        raise XtokenError(f"row {before.student_id[at]} of the trained W sums to {totals[at]:.6f}, rows must sum to 1")
    order = np.lexsort((-weights, before.student_id))
    student_id, teacher_id, weight = before.student_id[order], before.teacher_id[order], weights[order]
    kind = before.kind[order]
    common = common_set(student_id, teacher_id, weight.astype(np.float32), kind, byte_fallback)
    return replace(
        before,
        student_id=student_id,
        teacher_id=teacher_id,
        weight=weight.astype(np.float32),
        kind=kind,
        common=common,
    )


def distances(before: Projection, after: Projection) -> NDArray[np.float64]:
    """Total variation between the two rows of each student token, float64 [V], 0 to 1.

    Raises:
        XtokenError: the two have entries in different places.
    """
    old, new = _by_pair(before), _by_pair(after)
    if not (np.array_equal(old[0], new[0]) and np.array_equal(old[1], new[1])):
        raise XtokenError("the two W have entries in different places, so their rows cannot be compared")
    change = abs(new[2].astype(np.float64) - old[2])
    total: NDArray[Any] = np.bincount(old[0], weights=change, minlength=before.student.size)
    return total / 2


def moved_rows(before: Projection, after: Projection, limit: int) -> list[Row]:
    """The rows that differ most, largest distance first, then lower student id.

    Returns:
        At most ``limit`` of ``{"student_id", "distance", "teacher_id": [..], "before": [..], "after": [..]}``; the
        three lists of equal length in order of ``before``. Rows that did not move at all are left out.

    Raises:
        XtokenError: the two have entries in different places.
    """
    distance_V = distances(before, after)
    order = np.argsort(-distance_V, kind="stable")[:limit]
    return [_moved(before, after, s, float(distance_V[s])) for s in order.tolist() if distance_V[s] > 0]


def _moved(before: Projection, after: Projection, s: int, distance: float) -> Row:
    old, new = (_row(one, s) for one in (before, after))
    return {
        "student_id": s,
        "distance": round(distance, 6),
        "teacher_id": list(old),
        "before": list(old.values()),
        "after": [new[t] for t in old],
    }


def _row(projection: Projection, s: int) -> dict[int, float]:
    low, high = np.searchsorted(projection.student_id, [s, s + 1])
    weight = (round(float(value), 6) for value in projection.weight[low:high])
    return dict(zip(projection.teacher_id[low:high].tolist(), weight, strict=True))


def _by_pair(projection: Projection) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    order = np.lexsort((projection.teacher_id, projection.student_id))
    return projection.student_id[order], projection.teacher_id[order], projection.weight[order]


def named(rows: list[Row], projection: Projection, vocab: pa.Table) -> list[Row]:
    """The rows for people: tokens as literals; teacher tokens by the student token of equal bytes, else by id alone."""
    text: list[bytes] = vocab["bytes"].to_pylist()
    twin = projection.kind == EXACT
    known = dict(zip(projection.teacher_id[twin].tolist(), projection.student_id[twin].tolist(), strict=True))
    return [
        {
            "student": literal(text[row["student_id"]]),
            "student_id": row["student_id"],
            "distance": row["distance"],
            "before_and_after": {
                f"{t} {literal(text[known[t]])}" if t in known else str(t): [old, new]
                for t, old, new in zip(row["teacher_id"], row["before"], row["after"], strict=True)
            },
        }
        for row in rows
    ]
