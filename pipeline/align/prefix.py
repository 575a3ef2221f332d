"""Both vocabularies as byte-prefix needs them (``losses/byte_prefix.py`` builds its columns).

phi_c(t) is the student token that its own encoding of a teacher token t, without the bytes c already emitted, begins
with. The longest student token that fits there would be simpler, and is wrong where BPE's merges forbid it (12, 2 where
the student writes 1, 22): benchmarks/results/prefix_exact.md has the mass that this concerns.

Shapes: U teacher vocabulary, V student vocabulary, M student text tokens, B bytes of all teacher tokens together.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.align.kernels_prefix import longest_prefixes
from xtoken.pipeline.project.projection import ROLE, Projection
from xtoken.pipeline.tokens import TextTokenizer, TokenTable
from xtoken.pipeline.tokens.canonical import Canonical

_AT_ONCE = 1 << 15  # texts given to the tokenizer together: their encodings take memory


@dataclass(frozen=True)
class PrefixMaps:
    """Both vocabularies as the kernels need them.

    Attributes:
        teacher, student: token tables.
        phi_B: int32, phi at every byte of the teacher's tokens, -1 = no student token fits.
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
    def of(
        cls, student: TokenTable, teacher: TokenTable, projection: Projection, phi_B: NDArray[np.int32]
    ) -> "PrefixMaps":
        """Maps of a pair.

        Args:
            student, teacher: token tables.
            projection: W says which special tokens correspond.
            phi_B: ``first_tokens`` of the pair.
        """
        data, offsets_M, _ = _sorted_text(student)
        role_U = np.full(teacher.size, -1, np.int32)
        role_U[projection.teacher_id[projection.kind == ROLE]] = projection.student_id[projection.kind == ROLE]
        pieces, twins = teacher.pieces(), student.by_bytes()
        rank_U = np.empty(teacher.size, np.int32)
        rank_U[sorted(range(teacher.size), key=pieces.__getitem__)] = np.arange(teacher.size, dtype=np.int32)
        alone_U = np.array([bool(piece) and piece not in twins for piece in pieces], np.bool_)
        return cls(teacher, student, phi_B, role_U, rank_U, alone_U, data, offsets_M)


def longest_tokens(teacher: TokenTable, student: TokenTable) -> NDArray[np.int32]:
    """At every byte of the teacher's tokens the longest student token that fits there, int32 [B]; -1 = none."""
    return longest_prefixes(teacher.data, teacher.offsets, *_sorted_text(student))


def first_tokens(teacher: TokenTable, student: TextTokenizer) -> NDArray[np.int32]:
    """phi at every byte of the teacher's tokens, int32 [B]; the longest token that fits where the rest is no text.

    Every ending of a token is encoded once: some ten seconds of one core for a vocabulary of 262,000.
    """
    phi_B = longest_tokens(teacher, student.table)
    if int(student.table.lengths.max()) < 2:
        return phi_B  # bytes have one encoding
    canonical, data = Canonical(student), teacher.data.tobytes()
    place: dict[bytes, int] = {}
    end_B = np.repeat(teacher.offsets[1:], teacher.lengths).tolist()
    place_B = [place.setdefault(data[start:end], len(place)) for start, end in enumerate(end_B)]
    rests, found = list(place), []
    for begin in range(0, len(rests), _AT_ONCE):
        found += canonical.first_tokens(rests[begin : begin + _AT_ONCE])
    own_B = np.array(found, np.int32)[place_B]
    return np.where(own_B < 0, phi_B, own_B)


def _sorted_text(table: TokenTable) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
    """Text tokens in order of (bytes, id): bytes, offsets [M + 1], and the id that stands for the bytes of each [M]."""
    pieces, stands_for = table.pieces(), table.by_bytes()
    text = [i for i, data in enumerate(pieces) if data and table.role[i] is None]
    in_order = sorted(pieces[i] for i in text)
    offsets_M = np.array([0, *accumulate(map(len, in_order))], np.int64)
    id_M = np.array([stands_for[data] for data in in_order], np.int32)
    return np.frombuffer(b"".join(in_order), np.uint8), offsets_M, id_M
