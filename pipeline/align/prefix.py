"""Both vocabularies as byte-prefix needs them (``losses/byte_prefix.py`` builds its columns).

phi_c(t) is the longest student token that a teacher token t, without the bytes c already emitted, starts with.

Shapes: U teacher vocabulary, V student vocabulary, M student text tokens, B bytes of all teacher tokens together.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.align.kernels_prefix import longest_prefixes
from xtoken.pipeline.project.projection import ROLE, Projection
from xtoken.pipeline.tokens import TokenTable


@dataclass(frozen=True)
class PrefixMaps:
    """Both vocabularies as the kernels need them.

    Attributes:
        teacher, student: token tables.
        phi_B: int32, phi at every byte of the teacher's tokens, -1 = none.
        role_U: int32, the student's special token of the same role, or -1.
        rank_U: int32, place of each teacher token in the order of bytes.
        alone_U: bool, a teacher text token without a student token of equal bytes.
        sorted_student: uint8, bytes of the student's text tokens in order of (bytes, id).
        sorted_M: int64 [M + 1], where each of them starts.
    """

    teacher: TokenTable
    student: TokenTable
    phi_B: NDArray[np.int32]
    role_U: NDArray[np.int32]
    rank_U: NDArray[np.int32]
    alone_U: NDArray[np.bool_]
    sorted_student: NDArray[np.uint8]
    sorted_M: NDArray[np.int64]

    @classmethod
    def of(cls, student: TokenTable, teacher: TokenTable, projection: Projection) -> "PrefixMaps":
        """Maps of a pair; W says which special tokens correspond."""
        data, offsets_M, id_M = _sorted_text(student)
        phi_B = longest_prefixes(teacher.data, teacher.offsets, data, offsets_M, id_M)
        role_U = np.full(teacher.size, -1, np.int32)
        role_U[projection.teacher_id[projection.kind == ROLE]] = projection.student_id[projection.kind == ROLE]
        pieces = teacher.pieces()
        rank_U = np.empty(teacher.size, np.int32)
        rank_U[sorted(range(teacher.size), key=pieces.__getitem__)] = np.arange(teacher.size, dtype=np.int32)
        filled = np.flatnonzero(teacher.lengths > 0)
        first = phi_B[teacher.offsets[filled]]
        alone_U = np.zeros(teacher.size, np.bool_)
        alone_U[filled] = (first < 0) | (student.lengths[first] < teacher.lengths[filled])
        return cls(teacher, student, phi_B, role_U, rank_U, alone_U, data, offsets_M)


def _sorted_text(table: TokenTable) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
    """Text tokens in order of (bytes, id): bytes, offsets [M + 1], and the id that stands for the bytes of each [M]."""
    pieces, stands_for = table.pieces(), table.by_bytes()
    text = [i for i, data in enumerate(pieces) if data and table.role[i] is None]
    in_order = sorted(pieces[i] for i in text)
    offsets_M = np.array([0, *accumulate(map(len, in_order))], np.int64)
    id_M = np.array([stands_for[data] for data in in_order], np.int32)
    return np.frombuffer(b"".join(in_order), np.uint8), offsets_M, id_M
