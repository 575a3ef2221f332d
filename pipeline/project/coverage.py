"""What W covers, by kind of token, and which loss that speaks for.

H-KL compares tokens outside its common set by rank alone, so a category whose meaning lies in the single token
(numerals above all) must not fall out of the exact set; P-KL keeps every token in its place (arXiv 2605.21699).
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.project.projection import EXACT, KINDS, PIECES, Projection

if TYPE_CHECKING:
    from pipeline.tokens import TokenTable

CATEGORIES = (
    "numerals_1",
    "numerals_2",
    "numerals_3",
    "whitespace",
    "operators",
    "latin",
    "other_scripts",
    "other_text",
    "partial_utf8",
    "specials",
)
NUMERALS = CATEGORIES[:3]
CRITICAL_SHARE = 0.5  # a critical category with fewer exact tokens than this has fallen out of the exact set
_OPERATORS = re.compile(r" ?[!-/:-@\[-`{-~]+")
_LAST_LATIN = 0x24F


def category(text: bytes, role: str | None) -> str | None:
    """One of ``CATEGORIES`` for a token; None for a hole of the id range."""
    if role is not None:
        return None if role == "hole" else "specials"
    try:
        word = text.decode()
    except UnicodeDecodeError:
        return "partial_utf8"
    if word.isascii() and word.isdigit() and len(word) <= len(NUMERALS):
        return NUMERALS[len(word) - 1]
    if word.isspace():
        return "whitespace"
    if _OPERATORS.fullmatch(word):
        return "operators"
    letters = [character for character in word if character.isalpha()]
    if not letters:
        return "other_text"
    return "latin" if all(ord(character) <= _LAST_LATIN for character in letters) else "other_scripts"


def coverage(projection: Projection, student: "TokenTable", teacher: "TokenTable") -> dict[str, Any]:
    """Counts and shares of rows (student side) and columns (teacher side), by category, with advice.

    ``rows.empty_text`` counts student text tokens without a row; ``columns`` are teacher tokens reached by a row,
    moved to their longest prefix, or lost to REST (each as if every token weighed the same).
    """
    row_kind = _row_kinds(projection, student.size)
    student_side = _categories(student)
    teacher_side = _categories(teacher)
    categories = _by_category(row_kind, student_side, projection.columns_by_kind(), teacher_side)
    is_text = np.array([role is None for role in student.role])
    real = sum(name is not None for name in student_side)
    counts = {name: int((row_kind == code).sum()) for code, name in enumerate(KINDS)}
    counts["empty"] = real - sum(counts.values())
    rows = {name: {"count": count, "share": _share(count, real)} for name, count in counts.items()}
    filled = int((row_kind >= 0).sum())
    return {
        "rows": rows,
        "empty_text_rows": int((is_text & (row_kind < 0) & (student.lengths > 0)).sum()),
        "mean_nonzeros": _share(len(projection.student_id), filled),
        "columns": _columns(projection, sum(name is not None for name in teacher_side), teacher),
        "shared_bytes": len(student.by_bytes().keys() & teacher.by_bytes().keys()),
        "categories": categories,
        "advice": advice(categories),
    }


def advice(categories: dict[str, dict[str, Any]]) -> dict[str, str]:
    """``{"loss": "p-kl" | "h-kl", "reason": ...}`` from the category table of ``coverage``."""
    sides = [("student", name) for name in (*NUMERALS, "operators")] + [("teacher", name) for name in NUMERALS]
    for side, name in sides:
        total, exact = categories[name][side], categories[name][f"{side}_exact"]
        if total and exact < CRITICAL_SHARE * total:
            reason = (
                f"{exact} of {total} {name} tokens of the {side} have an exact counterpart: "
                "outside the common set H-KL would match them by rank, P-KL keeps them apart"
            )
            return {"loss": "p-kl", "reason": reason}
    mine = [(name, categories[name]) for side, name in sides if side == "student" and categories[name]["student"]]
    listed = ", ".join(f"{one['student_exact'] / one['student']:.0%} of {name}" for name, one in mine)
    reason = f"the student's critical tokens are exact ({listed or 'it has none'}): H-KL compares them one to one"
    return {"loss": "h-kl", "reason": reason}


def _row_kinds(projection: Projection, size: int) -> NDArray[np.int8]:
    kinds = np.full(size, -1, np.int8)
    kinds[projection.student_id] = projection.kind
    return kinds


def _categories(table: "TokenTable") -> list[str | None]:
    return [category(text, role) for text, role in zip(table.pieces(), table.role, strict=True)]


def _by_category(
    row_kind: NDArray[np.int8],
    student_side: list[str | None],
    column_kind: NDArray[np.int8],
    teacher_side: list[str | None],
) -> dict[str, dict[str, Any]]:
    rows = Counter(zip(student_side, row_kind.tolist(), strict=True))
    columns = Counter(zip(teacher_side, (column_kind == EXACT).tolist(), strict=True))
    table: dict[str, dict[str, Any]] = {}
    for name in CATEGORIES:
        total = sum(rows[name, code] for code in (-1, *range(len(KINDS))))
        counterpart = sum(rows[name, code] for code in range(len(KINDS)) if code != PIECES)
        table[name] = {
            "student": total,
            "student_exact": counterpart,
            "student_pieces": rows[name, PIECES],
            "student_empty": rows[name, -1],
            "student_exact_share": _share(counterpart, total),
            "teacher": columns[name, True] + columns[name, False],
            "teacher_exact": columns[name, True],
        }
    return table


def _columns(projection: Projection, real: int, teacher: "TokenTable") -> dict[str, dict[str, Any]]:
    holes = sum(role == "hole" for role in teacher.role)
    moved = int((projection.moved_to >= 0).sum())
    lost = len(projection.unreached) - moved - holes
    counts = {"reached": real - moved - lost, "moved": moved, "lost": lost}
    return {name: {"count": count, "share": _share(count, real)} for name, count in counts.items()}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
