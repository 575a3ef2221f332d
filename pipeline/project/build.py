"""Building W: exact twins, then pieces, then roles; and where unreached teacher tokens go.

Shapes: N entries of W, V student vocabulary, U teacher vocabulary.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.project.pieces import Segmenter, longest_prefix
from pipeline.project.projection import EXACT, PIECES, ROLE, TO_REST, Projection

if TYPE_CHECKING:
    from pipeline.tokens import TokenTable

SHARED_ROLES = ("bos", "eos", "eot", "pad")
PIECES_KEPT = 4
_RAW = [0.9 * 0.1**i for i in range(PIECES_KEPT)]
_SHARES = [[weight / sum(_RAW[:n]) for weight in _RAW[:n]] for n in range(PIECES_KEPT + 1)]
COMMON_WEIGHT = 0.6  # least weight of a pair in H-KL's common set


def build_w(student: "TokenTable", teacher: "TokenTable") -> Projection:
    """Build W and its unreached map for a pair of tokenizers.

    A row whose bytes the teacher cannot spell, and a special token whose role the teacher lacks, stay empty.
    """
    twin = teacher.by_bytes()
    rows = _text_rows(student, teacher, twin) + _role_rows(student, teacher)
    rows.sort(key=lambda row: row[0])
    lengths = [len(entries) for _, _, entries in rows]
    student_id = np.repeat(np.array([s for s, _, _ in rows], np.int32), lengths)
    kind = np.repeat(np.array([kind for _, kind, _ in rows], np.int8), lengths)
    teacher_id = np.array([t for _, _, entries in rows for t, _ in entries], np.int32)
    weight = np.array([weight for _, _, entries in rows for _, weight in entries], np.float32)
    unreached, moved_to = _unreached(student, teacher, twin, teacher_id)
    common = _common(student_id, teacher_id, weight, student.byte_fallback)
    return Projection(
        student_id, teacher_id, weight, kind, common, unreached, moved_to, student=student.info, teacher=teacher.info
    )


_Row = tuple[int, int, list[tuple[int, float]]]


def _text_rows(student: "TokenTable", teacher: "TokenTable", twin: dict[bytes, int]) -> list[_Row]:
    segmenter = Segmenter(teacher)
    spell = teacher.pieces()
    rows: list[_Row] = []
    for s, text in _text_tokens(student):
        if text in twin:
            rows.append((s, EXACT, [(twin[text], 1.0)]))
            continue
        pieces = segmenter.split(text)
        if pieces is not None and b"".join([spell[t] for t in pieces]) == text:
            rows.append((s, PIECES, piece_weights(pieces)))
    return rows


def _text_tokens(table: "TokenTable") -> list[tuple[int, bytes]]:
    return [(i, text) for i, text in enumerate(table.pieces()) if text and table.role[i] is None]


def piece_weights(pieces: list[int]) -> list[tuple[int, float]]:
    """Weights 0.9 * 0.1^i of the first four pieces, normalised; a repeated piece adds up. Largest first."""
    share = _SHARES[min(len(pieces), PIECES_KEPT)]
    weights: dict[int, float] = {}
    for token, weight in zip(pieces, share, strict=False):
        weights[token] = weights.get(token, 0.0) + weight
    return list(weights.items())


def _role_rows(student: "TokenTable", teacher: "TokenTable") -> list[_Row]:
    pairs = [(student.id_of(role), teacher.id_of(role)) for role in SHARED_ROLES]
    return [(s, ROLE, [(t, 1.0)]) for s, t in pairs if s is not None and t is not None]


def _common(
    student_id: NDArray[np.int32],
    teacher_id: NDArray[np.int32],
    weight: NDArray[np.float32],
    byte_fallback: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """H-KL's C: each row's largest entry, if heavy enough, once per teacher token.

    Among students of one teacher token the larger weight wins, then the ordinary token over <0xHH> (which the
    student's tokenizer never produces for that text), then the lower id.
    """
    common = np.zeros(len(student_id), np.bool_)
    first = np.flatnonzero(np.diff(student_id, prepend=-1))
    heads = first[weight[first] >= COMMON_WEIGHT]
    keys = (student_id[heads], byte_fallback[student_id[heads]], -weight[heads], teacher_id[heads])
    ordered = heads[np.lexsort(keys)]
    winners = np.diff(teacher_id[ordered], prepend=-1) != 0
    common[ordered[winners]] = True
    return common


def _unreached(
    student: "TokenTable", teacher: "TokenTable", twin: dict[bytes, int], reached: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Teacher ids outside ``reached`` and, by longest exact student prefix, where their mass moves."""
    missing = np.setdiff1d(np.arange(teacher.size, dtype=np.int32), reached).astype(np.int32)
    exact = {text: twin[text] for _, text in _text_tokens(student) if text in twin}
    lengths = sorted({len(text) for text in exact}, reverse=True)
    moved_to = np.full(len(missing), TO_REST, np.int32)
    pieces = teacher.pieces()
    for at, t in enumerate(missing.tolist()):
        if teacher.role[t] is None:
            found, _ = longest_prefix(exact, lengths, pieces[t])
            moved_to[at] = TO_REST if found is None else found
    return missing, moved_to
