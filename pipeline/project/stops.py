"""What ends an answer, in W of conversations: the student's token for the teacher's, whatever their roles are called.

One family ends a turn with its eos, another has a token of its own for it, so roles do not pair them. The pair comes
from the two chat templates.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.project.projection import ROLE, TO_REST, Projection
from xtoken.schemas.manifest import TokenizerInfo

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable


@dataclass(frozen=True)
class StopPair:
    """Tokens that end an answer.

    Attributes:
        student, teacher: one for the other.
        teacher_eos: the teacher's eos, if that is another token: its mass is added to the stop's, since a student that
            may end with either has both in one.
    """

    student: int
    teacher: int
    teacher_eos: int | None

    @classmethod
    def of(
        cls, student: "TokenTable", student_stop: int | None, teacher: TokenizerInfo, teacher_stop: int | None
    ) -> "StopPair | None":
        """The pair of two chat templates; None where one has no control token for it, or the tokenizers are the same.

        Args:
            student: its tokens.
            student_stop: what ends an answer in its chat template.
            teacher, teacher_stop: likewise.
        """
        if student_stop is None or teacher_stop is None or student.info.hash == teacher.hash:
            return None
        if student.role[student_stop] is None:
            return None
        return cls(student_stop, teacher_stop, None if teacher.eos_id == teacher_stop else teacher.eos_id)


def with_stops(projection: Projection, stops: StopPair) -> Projection:
    """W whose rows of the student's stop and of its eos point at the teacher's stop, weight 1.

    The stop's is the pair of H-KL's common set. Teacher tokens that no row reaches any more are unreached: its eos,
    whose mass moves to the stop; that of others joins the tail mass.
    """
    eos = projection.student.eos_id
    mine = np.unique(np.array([stops.student, *([] if eos is None else [eos])], np.int32))
    kept = ~np.isin(projection.student_id, mine)
    order = np.argsort(np.concatenate([projection.student_id[kept], mine]), kind="stable")
    teacher_id = _put(projection.teacher_id[kept], [stops.teacher] * len(mine), order)
    student_id = _put(projection.student_id[kept], mine.tolist(), order)
    common = _put(projection.common[kept], [False] * len(mine), order)
    common = np.where(teacher_id == stops.teacher, student_id == stops.student, common)
    moved = dict(zip(projection.unreached.tolist(), projection.moved_to.tolist(), strict=True))
    unreached = np.setdiff1d(np.arange(projection.teacher.size, dtype=np.int32), teacher_id)
    new = {stops.teacher_eos: stops.teacher}
    return replace(
        projection,
        student_id=student_id,
        teacher_id=teacher_id,
        weight=_put(projection.weight[kept], [1.0] * len(mine), order),
        kind=_put(projection.kind[kept], [ROLE] * len(mine), order),
        common=common,
        unreached=unreached,
        moved_to=np.array([new.get(t, moved.get(t, TO_REST)) for t in unreached.tolist()], np.int32),
    )


def _put(kept: NDArray[Any], added: list[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    both: NDArray[Any] = np.concatenate([kept, np.array(added, kept.dtype)])[order]
    return both
