"""ULD: the teacher's probabilities as a sorted list, whatever the tokens."""

from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.kernels_targets import split_targets
from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder


class Builder(TargetBuilder):
    """Columns ``uld_*`` and ``factor_logprob``."""

    not_linear: ClassVar[str] = "compares sorted lists"

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        # probabilities by size alone: whose they are does not matter, so no distribution is shifted
        rows, row_C = source.plain
        factor_C = source.label_factor()
        row_C = np.where(np.isnan(factor_C), -1, row_C)
        none_U = np.full(source.maps.teacher_size, -1, np.int32)
        _, _, _, count_C, logprob_K = split_targets(row_C, rows.offsets, rows.ids, rows.logprob, none_U)
        return {"uld_count": count_C, "uld_logprob": logprob_K, "factor_logprob": factor_C}, {}
