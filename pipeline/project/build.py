"""Building W: exact twins, then pieces, then roles; and where unreached teacher tokens go.

Shapes: N entries of W, V student vocabulary, U teacher vocabulary.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.project.pieces import PIECES_KEPT, RAW_WEIGHTS, Segmenter, longest_prefix
from xtoken.pipeline.project.projection import EXACT, MINED, PIECES, ROLE, TO_REST, Projection
from xtoken.pipeline.project.rules import Entries, apply_rule

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

SHARED_ROLES = ("bos", "eos", "eot", "pad")
_SHARES = [[weight / sum(RAW_WEIGHTS[:n]) for weight in RAW_WEIGHTS[:n]] for n in range(PIECES_KEPT + 1)]
COMMON_WEIGHT = 0.6  # least weight of a pair in H-KL's common set


def build_w(student: "TokenTable", teacher: "TokenTable", rule: str = "pieces", seed: int = 0) -> Projection:
    """Build W and its unreached map for a pair of tokenizers.

    A row whose bytes the teacher cannot spell, and a special token whose role the teacher lacks, stay empty.

    Args:
        student: tokens of the rows.
        teacher: tokens of the columns.
        rule: see ``xtoken.schemas.configs.artifacts.ProjectConfig.rule`` and ``xtoken.pipeline.project.rules``.
        seed: of rule ``random``.

    Raises:
        XtokenError: the rule is unknown.
    """
    twin = teacher.by_bytes()
    default = Entries.joined(_text_rows(student, teacher, twin), _role_rows(student, teacher))
    entries = apply_rule(rule, seed, default, student, teacher)
    unreached, moved_to = _unreached(student, teacher, twin, entries)
    weight = entries.weight.astype(np.float32)
    common = common_set(entries.student_id, entries.teacher_id, weight, entries.kind, student.byte_fallback)
    return Projection(
        entries.student_id,
        entries.teacher_id,
        weight,
        entries.kind,
        common,
        unreached,
        moved_to,
        student=student.info,
        teacher=teacher.info,
    )


def _text_rows(student: "TokenTable", teacher: "TokenTable", twin: dict[bytes, int]) -> Entries:
    """Exact twins and pieces, an entry for each of the first four pieces even if one repeats."""
    segmenter = Segmenter(teacher)
    owner: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    kind: list[int] = []
    for s, text in _text_tokens(student):
        exact = twin.get(text)
        pieces = segmenter.split(text) if exact is None else [exact]
        if pieces:
            share = _SHARES[min(len(pieces), PIECES_KEPT)]
            owner += [s] * len(share)
            target += pieces[:PIECES_KEPT]
            weight += share
            kind += [PIECES if exact is None else EXACT] * len(share)
    return _entries(owner, target, weight, kind)


def _text_tokens(table: "TokenTable") -> list[tuple[int, bytes]]:
    return [(i, text) for i, text in enumerate(table.pieces()) if text and table.role[i] is None]


def _role_rows(student: "TokenTable", teacher: "TokenTable") -> Entries:
    both = [(student.id_of(role), teacher.id_of(role)) for role in SHARED_ROLES]
    pairs = [(s, t) for s, t in both if s is not None and t is not None]
    return _entries([s for s, _ in pairs], [t for _, t in pairs], [1.0] * len(pairs), [ROLE] * len(pairs))


def _entries(owner: list[int], target: list[int], weight: list[float], kind: list[int]) -> Entries:
    return Entries(
        np.array(owner, np.int32), np.array(target, np.int32), np.array(weight, np.float64), np.array(kind, np.int8)
    )


def common_set(
    student_id: NDArray[np.int32],
    teacher_id: NDArray[np.int32],
    weight: NDArray[np.float32],
    kind: NDArray[np.int8],
    byte_fallback: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """H-KL's C, bool [N]: each row's largest entry (its first), if heavy enough, once per teacher token.

    Among students of one teacher token the larger weight wins, then whatever was not mined (its bytes may differ), then
    the ordinary token over <0xHH> (which the student's tokenizer never produces for that text), then the lower id.
    """
    common = np.zeros(len(student_id), np.bool_)
    first = np.flatnonzero(np.diff(student_id, prepend=-1))
    heads = first[weight[first] >= COMMON_WEIGHT]
    rank = (byte_fallback[student_id[heads]], kind[heads] == MINED, -weight[heads])
    keys = (student_id[heads], *rank, teacher_id[heads])
    ordered = heads[np.lexsort(keys)]
    winners = np.diff(teacher_id[ordered], prepend=-1) != 0
    common[ordered[winners]] = True
    return common


def _unreached(
    student: "TokenTable", teacher: "TokenTable", twin: dict[bytes, int], entries: Entries
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Teacher ids outside W and where their mass moves: by longest prefix among the student's tokens that have a row
    and a reached teacher token of equal bytes."""
    has_row, reached = np.zeros(student.size, np.bool_), np.zeros(teacher.size, np.bool_)
    has_row[entries.student_id] = True
    reached[entries.teacher_id] = True
    pairs = [(text, twin[text]) for s, text in _text_tokens(student) if text in twin and has_row[s]]
    exact = {text: t for text, t in pairs if reached[t]}
    longest = max(map(len, exact), default=0)
    missing = np.flatnonzero(~reached).astype(np.int32)
    moved_to = np.full(len(missing), TO_REST, np.int32)
    pieces = teacher.pieces()
    for at, t in enumerate(missing.tolist()):
        if teacher.role[t] is None:
            prefix, _ = longest_prefix(exact, longest, pieces[t])
            moved_to[at] = TO_REST if prefix is None else prefix
    return missing, moved_to
