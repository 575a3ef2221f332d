"""The smallest backend that docs/extend.md promises: every distribution is the same, the lower an id the likelier.

Shapes: R distributions, K entries asked for, U vocabulary.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import Batch, TeacherRows, check_prompt, entries_asked, stream_batches
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.manifest import TeacherInfo


class ToyTeacher:
    """p(v) is proportional to 1 / (v + 1), whatever came before."""

    settings: dict[str, str | int | float | bool]

    def __init__(self, info: TeacherInfo, k: int) -> None:
        weight_U = 1 / (1 + np.arange(info.vocab_rows, dtype=np.float64))
        self.info, self.settings, self._k = info, {}, k
        self._logprob_U = np.log(weight_U / weight_U.sum()).astype(np.float32)

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        return [self._of(ids) for ids in batch]

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        return stream_batches(self, batches)

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:  # noqa: ARG002
        return None

    def _of(self, ids: NDArray[np.int32]) -> TeacherRows:
        check_prompt(ids, self.info)
        label_R = ids[1:]
        ids_RK = np.tile(np.arange(self._k, dtype=np.int32), (len(label_R), 1))
        return TeacherRows(ids_RK, self._logprob_U[ids_RK], self._logprob_U[label_R], label_R + 1)


def open_teacher(config: TeacherGroup, codec: CodecGroup, table: TokenTable) -> ToyTeacher:
    """Called by ``xtoken.pipeline.teachers.open_teacher``."""
    info = TeacherInfo(
        model=config.teacher,
        backend="toy",
        vocab_rows=table.size,
        context=1 << 20,
        dtype="float64",
        head_dtype="float64",
        device="cpu",
        capture_path="toy",
        engine_version="1",
    )
    return ToyTeacher(info, entries_asked(codec, table.size))
