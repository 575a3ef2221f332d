"""Forward passes of several ranks in step: a sharded model runs on all of them or on none."""

from collections.abc import Iterable, Iterator

import numpy as np

from xtoken.trainer.data.micro_batch import Micro, make_micro
from xtoken.trainer.data.samples import Sample
from xtoken.trainer.objective import Student
from xtoken.trainer.ranks import Ranks

# One token that predicts another, for ranks that have nothing left to do.
_IDLE = make_micro([[Sample("idle", np.zeros(2, np.int32), (), ())]], 1, ())


def together(student: Student, micros: Iterable[Micro], ranks: Ranks) -> Iterator[Micro]:
    """``micros`` of this rank, each for one forward pass; then the passes that other ranks still need this one for.

    All ranks must run it to its end.
    """
    for micro in micros:
        ranks.max(1.0)
        yield micro
    while ranks.max(0.0):
        student.states(_IDLE)
