"""W: how each student token spreads over teacher tokens, decided by bytes and roles alone.

Row s, a student token of bytes b: the teacher token of the same bytes with weight 1; else the teacher's own
segmentation of b, piece i weighing 0.9 * 0.1^i (first four, normalised); else, for special tokens, the teacher's
token of the same role. X-Token (arXiv 2605.21699) builds its matrix by string rules; bytes reach more exact pairs
and never join tokens that stand for different text.

Shapes: N entries of W, R unreached teacher tokens, V student vocabulary, U teacher vocabulary.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.tables import UNREACHED, W

KINDS = ("exact", "pieces", "role", "reverse", "random", "mined")
EXACT, PIECES, ROLE, REVERSE, RANDOM, MINED = range(len(KINDS))
TO_REST, DROPPED = -1, -2
Unreached = Literal["prefix", "rest", "none"]


@dataclass(frozen=True)
class Projection:
    """W and the map of what its rows do not reach.

    Attributes:
        student_id: int32 [N], ascending; within a row the largest weight first.
        teacher_id: int32 [N].
        weight: float32 [N]; the weights of a row sum to 1.
        kind: int8 [N], index into ``KINDS``.
        common: bool [N], the pair is in H-KL's common set C.
        unreached: int32 [R], ascending; every teacher id that is not a column of W.
        moved_to: int32 [R], the reached teacher id that takes its mass, or ``TO_REST``.
    """

    student_id: NDArray[np.int32]
    teacher_id: NDArray[np.int32]
    weight: NDArray[np.float32]
    kind: NDArray[np.int8]
    common: NDArray[np.bool_]
    unreached: NDArray[np.int32]
    moved_to: NDArray[np.int32]
    student: TokenizerInfo
    teacher: TokenizerInfo

    @cached_property
    def hash(self) -> str:
        """sha256 over all arrays: the identity of W, whatever wrote its files."""
        state = hashlib.sha256()
        arrays = (self.student_id, self.teacher_id, self.weight, self.kind, self.common, self.unreached, self.moved_to)
        for array in arrays:
            state.update(np.int64(len(array)).tobytes())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The arrays as tables of ``xtoken.schemas.tables.W`` and ``xtoken.schemas.tables.UNREACHED``."""
        kinds = pa.array(KINDS).take(pa.array(self.kind))
        moved = pa.array(self.moved_to, mask=self.moved_to < 0)
        w = pa.Table.from_arrays([self.student_id, self.teacher_id, self.weight, kinds, self.common], schema=W)
        return w, pa.Table.from_arrays([self.unreached, moved], schema=UNREACHED)

    @classmethod
    def from_tables(
        cls, w: pa.Table, unreached: pa.Table, student: TokenizerInfo, teacher: TokenizerInfo
    ) -> "Projection":
        """The inverse of ``tables``."""
        codes = {name: code for code, name in enumerate(KINDS)}
        return cls(
            student_id=_column(w, "student_id").astype(np.int32),
            teacher_id=_column(w, "teacher_id").astype(np.int32),
            weight=_column(w, "weight").astype(np.float32),
            kind=np.array([codes[name] for name in w.column("kind").to_pylist()], np.int8),
            common=np.array(w.column("common").to_pylist(), np.bool_),
            unreached=_column(unreached, "teacher_id").astype(np.int32),
            moved_to=_filled(unreached, "moved_to"),
            student=student,
            teacher=teacher,
        )

    def routes(self, unreached: Unreached) -> NDArray[np.int32]:
        """Where a teacher token's mass goes, int32 [U]: its own id when reached, else by ``unreached``.

        ``prefix``: the teacher token that equals the longest student prefix, or ``TO_REST`` without one;
        ``rest``: ``TO_REST``; ``none``: ``DROPPED``, left out and the row renormalised, as published code without a
        reverse pass does.
        """
        to = np.arange(self.teacher.size, dtype=np.int32)
        fixed = {"rest": TO_REST, "none": DROPPED}
        to[self.unreached] = self.moved_to if unreached == "prefix" else fixed[unreached]
        return to

    def columns_by_kind(self) -> NDArray[np.int8]:
        """How rows reach each teacher token, int8 [U]: ``EXACT`` (or role), ``PIECES`` (other entries only), or -1."""
        best = np.full(self.teacher.size, -1, np.int8)
        best[self.teacher_id] = PIECES
        best[self.teacher_id[(self.kind == EXACT) | (self.kind == ROLE)]] = EXACT
        return best

    def common_student(self) -> NDArray[np.int32]:
        """int32 [U]: the student id paired with the teacher id in C, or -1."""
        pair = np.full(self.teacher.size, -1, np.int32)
        pair[self.teacher_id[self.common]] = self.student_id[self.common]
        return pair

    def matched_student(self) -> NDArray[np.int32]:
        """int32 [U]: the student id of equal bytes paired with the teacher id (strict GOLD's set), or -1."""
        pair = np.full(self.teacher.size, -1, np.int32)
        strict = self.common & (self.kind == EXACT)
        pair[self.teacher_id[strict]] = self.student_id[strict]
        return pair


def _column(table: pa.Table, name: str) -> NDArray[np.generic]:
    array: NDArray[np.generic] = table.column(name).combine_chunks().to_numpy(zero_copy_only=False)
    return array


def _filled(table: pa.Table, name: str) -> NDArray[np.int32]:
    array: NDArray[np.int32] = table.column(name).combine_chunks().fill_null(TO_REST).to_numpy(zero_copy_only=False)
    return array.astype(np.int32)
