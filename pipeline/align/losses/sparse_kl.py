"""Sparse KL: the teacher's distribution as it is, for a student of the same tokenizer."""

from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TokenizerInfo


class Builder(TargetBuilder):
    """Columns ``skl_*``."""

    needs_tail: ClassVar[bool] = False

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        count_C, ids_K, logprob_K, _, _ = source.split(np.arange(source.maps.teacher_size, dtype=np.int32))
        rows, row_C = source.merged()
        tail_C = np.zeros(len(row_C), np.float32)
        tail_C[row_C >= 0] = rows.rest[row_C[row_C >= 0]]
        return {"skl_count": count_C, "skl_ids": ids_K, "skl_logprob": logprob_K, "skl_rest_logprob": tail_C}, {}

    def refuse(self, config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:  # noqa: ARG002
        """Raise XtokenError for two tokenizers."""
        teacher = capture.tokenizer
        if student.hash != teacher.hash:
            raise XtokenError(
                f"{self.name} compares distributions over one vocabulary, but the student's tokenizer {student.name} "
                f"({student.hash[:12]}) is not the teacher's, {teacher.name} ({teacher.hash[:12]}); take --for p-kl"
            )
