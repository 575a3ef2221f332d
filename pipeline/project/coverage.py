"""What W covers, by kind of token, and which loss that speaks for.

H-KL compares tokens outside its common set by rank alone, so a category whose meaning lies in the single token
(numerals above all) must not fall out of the exact set; P-KL keeps every token in its place (arXiv 2605.21699).

Shapes: N entries of W, V student vocabulary, U teacher vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.project.categories import HOLE, categories
from xtoken.pipeline.project.mass import Mass
from xtoken.pipeline.project.projection import EXACT, KINDS, PIECES, TO_REST, Projection
from xtoken.schemas.categories import CATEGORIES, NUMERALS, label

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

CRITICAL = (*NUMERALS, "operators")
CRITICAL_SHARE = 0.5  # a critical category with fewer exact tokens than this has fallen out of the exact set
RECEIVERS = 5  # categories listed that take the mass of unreached tokens
EMPTY = -1
MOVED, LOST = -1, -2


@dataclass(frozen=True)
class Audit:
    """W beside the categories of both vocabularies.

    Attributes:
        student_V, teacher_U: int8, index into ``CATEGORIES``, or ``HOLE``.
        row_V: int8, kind of each row's largest entry, or ``EMPTY``.
        column_U: int8, how rows reach a teacher token (``EXACT``, ``PIECES``), or ``MOVED`` or ``LOST``.
        receiver_U: int8, category of the token that takes an unreached token's mass, or ``HOLE``.
        mass: the teacher's probability by token, where a capture was given.
    """

    projection: Projection
    student: "TokenTable"
    teacher: "TokenTable"
    student_V: NDArray[np.int8]
    teacher_U: NDArray[np.int8]
    row_V: NDArray[np.int8]
    column_U: NDArray[np.int8]
    receiver_U: NDArray[np.int8]
    mass: Mass | None

    @classmethod
    def of(
        cls, projection: Projection, student: "TokenTable", teacher: "TokenTable", mass: Mass | None = None
    ) -> "Audit":
        """Look every token up once."""
        teacher_U = categories(teacher)
        row_V = np.full(student.size, EMPTY, np.int8)
        first = np.diff(projection.student_id, prepend=-1) != 0
        row_V[projection.student_id[first]] = projection.kind[first]
        column_U, receiver_U = projection.columns_by_kind(), np.full(teacher.size, HOLE, np.int8)
        to, moved = projection.moved_to, projection.moved_to != TO_REST
        column_U[projection.unreached] = np.where(moved, MOVED, LOST)
        receiver_U[projection.unreached[moved]] = teacher_U[to[moved]]
        return cls(projection, student, teacher, categories(student), teacher_U, row_V, column_U, receiver_U, mass=mass)

    def teacher_share(self, chosen_U: NDArray[np.bool_]) -> dict[str, float]:
        """``{"mass": share}`` of the teacher's probability on these tokens; empty without a capture."""
        return {} if self.mass is None else {"mass": round(float(self.mass.share_U[chosen_U].sum()), 6)}


def coverage(audit: Audit) -> dict[str, Any]:
    """Counts and shares of rows (student tokens) and columns (teacher tokens), by category, with advice.

    Keys: ``advice``; ``rows`` by kind (empty: no weight at all); ``empty_text_rows``, text tokens among the empty
    ones; ``mean_nonzeros`` per row with weight; ``columns``: teacher tokens that are exact, reached by pieces only,
    moved to their longest prefix, or lost to REST; ``moved_into``: the categories of the tokens they move to;
    ``overlap`` of the vocabularies as sets of byte strings; ``categories``: per category the student's tokens (exact
    includes roles, ``pieces`` all other rows) and the teacher's. ``columns``, ``moved_into`` and ``mass_by_category``
    state the share of the teacher's probability where a capture was given; ``mass_rows`` is how many rows it is of.
    """
    table = _by_category(audit)
    text_V = np.array([role is None for role in audit.student.role]) & (audit.student.lengths > 0)
    filled = int((audit.row_V != EMPTY).sum())
    summary: dict[str, Any] = {
        "advice": advice(audit, table),
        "empty_text_rows": int((text_V & (audit.row_V == EMPTY)).sum()),
        "mean_nonzeros": _share(len(audit.projection.student_id), filled),
        "overlap": _overlap(audit),
        "rows": _rows(audit),
        "columns": _columns(audit),
        "moved_into": _moved_into(audit),
        "categories": table,
    }
    if audit.mass is not None:
        summary |= {"mass_rows": audit.mass.rows, "mass_by_category": _mass_by_category(audit)}
    return summary


def advice(audit: Audit, table: dict[str, dict[str, int]]) -> dict[str, str]:
    """``{"loss": "p-kl" | "h-kl", "reason": ...}`` from the category table of ``coverage``."""
    mine = [("student", name, table[name]["student"], table[name]["exact"]) for name in CRITICAL]
    theirs = [("teacher", name, table[name]["teacher"], table[name]["matched"]) for name in NUMERALS]
    for side, name, total, exact in mine + theirs:
        if total and exact < CRITICAL_SHARE * total:
            reason = (
                f"{exact:,} of {total:,} {label(name)} of the {side} have an exact counterpart: "
                "outside the common set H-KL would match them by rank, P-KL keeps them apart"
            )
            return {"loss": "p-kl", "reason": reason + _critical_mass(audit)}
    listed = ", ".join(f"{exact / total:.0%} of {label(name)}" for _, name, total, exact in mine if total)
    reason = f"the student's critical tokens are exact ({listed or 'it has none'}): H-KL compares them one to one"
    return {"loss": "h-kl", "reason": reason + _critical_mass(audit)}


def _critical_mass(audit: Audit) -> str:
    if audit.mass is None:
        return ""
    critical_U = np.isin(audit.teacher_U, [CATEGORIES.index(name) for name in CRITICAL])
    fallen = audit.teacher_share(critical_U & (audit.column_U != EXACT))["mass"]
    whole = audit.teacher_share(critical_U)["mass"]
    return (
        f"; over {audit.mass.rows:,} rows the teacher gives {whole:.2%} of its mass to numerals and operators, "
        f"{fallen:.2%} to those of them that are not exact"
    )


def _rows(audit: Audit) -> dict[str, dict[str, Any]]:
    real = int((audit.student_V != HOLE).sum())
    counts = {name: int((audit.row_V == code).sum()) for code, name in enumerate(KINDS)}
    counts["empty"] = real - sum(counts.values())
    shown = ("exact", "pieces", "role", "empty")
    return {name: {"count": n, "share": _share(n, real)} for name, n in counts.items() if n or name in shown}


def _columns(audit: Audit) -> dict[str, dict[str, Any]]:
    real_U = audit.teacher_U != HOLE
    table = {}
    for name, code in (("exact", EXACT), ("pieces", PIECES), ("moved", MOVED), ("lost", LOST)):
        chosen_U = real_U & (audit.column_U == code)
        count = int(chosen_U.sum())
        table[name] = {"count": count, "share": _share(count, int(real_U.sum())), **audit.teacher_share(chosen_U)}
    if audit.mass is not None:
        table["not_kept"] = {"mass": round(audit.mass.not_kept, 6)}
    return table


def _moved_into(audit: Audit) -> dict[str, dict[str, Any]]:
    """The categories that take most unreached tokens."""
    count = np.bincount(audit.receiver_U[audit.receiver_U != HOLE], minlength=len(CATEGORIES))
    order = np.argsort(-count, kind="stable")[:RECEIVERS]
    return {
        CATEGORIES[code]: {"tokens": int(count[code]), **audit.teacher_share(audit.receiver_U == code)}
        for code in order.tolist()
        if count[code]
    }


def _overlap(audit: Audit) -> dict[str, Any]:
    mine, theirs = audit.student.by_bytes().keys(), audit.teacher.by_bytes().keys()
    both = len(mine & theirs)
    return {
        "byte_strings": both,
        "of_student": _share(both, len(mine)),
        "of_teacher": _share(both, len(theirs)),
    }


def _by_category(audit: Audit) -> dict[str, dict[str, int]]:
    table = {}
    exact = [code for code, name in enumerate(KINDS) if name in ("exact", "role")]
    for code, name in enumerate(CATEGORIES):
        row, column = audit.row_V[audit.student_V == code], audit.column_U[audit.teacher_U == code]
        twin, empty = int(np.isin(row, exact).sum()), int((row == EMPTY).sum())
        table[name] = {
            "student": len(row),
            "exact": twin,
            "pieces": len(row) - twin - empty,
            "empty": empty,
            "teacher": len(column),
            "matched": int((column == EXACT).sum()),
            "in_pieces": int((column == PIECES).sum()),
            "moved": int((column == MOVED).sum()),
            "lost": int((column == LOST).sum()),
        }
    return table


def _mass_by_category(audit: Audit) -> dict[str, dict[str, float]]:
    classes = {"matched": EXACT, "in_pieces": PIECES, "moved": MOVED, "lost": LOST}
    table = {}
    for code, name in enumerate(CATEGORIES):
        mine_U = audit.teacher_U == code
        split = {kind: audit.teacher_share(mine_U & (audit.column_U == at))["mass"] for kind, at in classes.items()}
        table[name] = {**audit.teacher_share(mine_U), **split}
    return table


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
