"""W and both vocabularies as the kernels need them.

Shapes: M targets of moved mass, U teacher vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.align.blanks import Blanks
from xtoken.pipeline.align.kernels_project import FATES, MASS_CLASSES
from xtoken.pipeline.align.prefix import PrefixMaps
from xtoken.pipeline.project.projection import EXACT, ROLE, TO_REST, Projection, Unreached
from xtoken.pipeline.project.stops import StopPair
from xtoken.pipeline.tokens import TokenTable


class Routes(NamedTuple):
    """The sparse map that teacher rows go through, as ``project_rows`` takes it."""

    fate_U: NDArray[np.int8]
    mass_class_U: NDArray[np.int8]
    offset_U: NDArray[np.int64]
    to_M: NDArray[np.int32]
    share_M: NDArray[np.float64]

    @classmethod
    def of(cls, route_U: NDArray[np.int32], column_U: NDArray[np.int8]) -> "Routes":
        """Routes of W: a token stays, or all its mass goes to one other token, to the tail mass, or nowhere.

        Args:
            route_U: ``Projection.routes``.
            column_U: ``Projection.columns_by_kind``.
        """
        stays_U, spread_U = route_U == np.arange(len(route_U)), route_U >= 0
        fate_U = np.select([stays_U, spread_U, route_U == TO_REST], [0, 1, 2], 3).astype(np.int8)
        class_U = np.select([stays_U, spread_U], [column_U, MASS_CLASSES.index("moved")], MASS_CLASSES.index("lost"))
        moved_U = fate_U == FATES.index("spread")
        offset_U = np.concatenate([np.zeros(1, np.int64), np.cumsum(moved_U)])
        to_M = route_U[moved_U]
        return cls(fate_U, class_U.astype(np.int8), offset_U, to_M, np.ones(len(to_M)))


STOPS = ("eos", "eot")  # roles of the tokens that end a text or a turn


@dataclass(frozen=True)
class Maps:
    """W and the vocabularies as the kernels need them; arrays [U] over the teacher's (see ``Projection``).

    Attributes:
        student_size, teacher_size: tokens of each vocabulary.
        student_text: the student's tokens with bytes.
        routes: where each teacher token's mass goes.
        pair_U: the student token paired with it in H-KL's common set, or -1.
        matched_U: likewise in strict GOLD's.
        twin_U: the student token of equal bytes, or that ends a text or a turn as the teacher's does, or -1.
        prefix: for byte-prefix, else None.
        blanks: both vocabularies where the teacher's is known, else None.
        moves: mass of teacher tokens that the student cannot reach moves to a prefix of theirs.
        stops: of conversations, the tokens that end an answer, which all of these take for tokens of equal bytes.
    """

    student_size: int
    teacher_size: int
    student_text: int
    routes: Routes
    pair_U: NDArray[np.int32]
    matched_U: NDArray[np.int32]
    twin_U: NDArray[np.int32]
    prefix: PrefixMaps | None
    blanks: Blanks | None = None
    moves: bool = True
    stops: StopPair | None = None

    @classmethod
    def of(
        cls,
        projection: Projection,
        unreached: Unreached,
        student: TokenTable,
        teacher: TokenTable | None = None,
        *,
        phi_B: NDArray[np.int32] | None = None,
        stops: StopPair | None = None,
    ) -> "Maps":
        """Maps of one projection under one policy for unreached teacher tokens.

        Args:
            projection: W.
            unreached: what becomes of teacher tokens that no row of W reaches.
            student: its tokens.
            teacher: its tokens; without them no row is shifted and there are no maps for byte-prefix.
            phi_B: of the pair, for byte-prefix; without them or the teacher's tokens there are no maps for it.
            stops: what ``projection`` was changed by (``with_stops``), if it was.
        """
        matched_U, twin_U = projection.matched_student(), twins(projection, student)
        prefix = None if teacher is None or phi_B is None else PrefixMaps.of(student, teacher, projection, phi_B)
        if stops is not None:
            for pair_U in (matched_U, twin_U, *([] if prefix is None else [prefix.role_U])):
                pair_U[stops.teacher] = stops.student
        return cls(
            projection.student.size,
            projection.teacher.size,
            sum(bool(size) and role is None for size, role in zip(student.lengths.tolist(), student.role, strict=True)),
            Routes.of(projection.routes(unreached), projection.columns_by_kind()),
            projection.common_student(),
            matched_U,
            twin_U,
            prefix,
            None if teacher is None else Blanks(student, teacher),
            unreached == "prefix",
            stops,
        )


def twins(projection: Projection, student: TokenTable) -> NDArray[np.int32]:
    """``Maps.twin_U``: exact rows of W, and its rows by role of tokens that end a text or a turn.

    Unlike ``Projection.matched_student`` it does not ask for H-KL's common set, in which another student token may have
    taken the place of the one of equal bytes. Of several such students the ordinary one counts, then the lower id.
    """
    ends_V = np.array([role in STOPS for role in student.role], np.bool_)
    chosen = (projection.kind == EXACT) | ((projection.kind == ROLE) & ends_V[projection.student_id])
    student_id, teacher_id = projection.student_id[chosen], projection.teacher_id[chosen]
    best_last = np.lexsort((student_id, student.byte_fallback[student_id]))[::-1]
    twin_U = np.full(projection.teacher.size, -1, np.int32)
    twin_U[teacher_id[best_last]] = student_id[best_last]
    return twin_U
