"""P-KL: the teacher's distribution over the teacher tokens that W reaches, and the tail mass as one cell."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.kernels_project import MASS_CLASSES, project_rows
from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.schemas.configs.artifacts import AlignConfig

_PPM = 1_000_000
_BIASED = {"none": "divides by what was drawn", "rest": "lets the student's tail mass depend on what was drawn"}


class Builder(TargetBuilder):
    """Columns ``pkl_*``; options: ``--entries`` and ``--unreached``."""

    needs_tail: ClassVar[bool] = False
    w_rule: ClassVar[str] = "pieces"

    def columns(self, source: Source) -> Built:
        """Of samples, mass that no teacher token of W's takes has no cell: the student's tail mass would depend on
        which tokens were drawn, and renormalising without it divides by a sample."""
        rows, row_C = source.merged(prefix=source.maps.moves)
        closed = source.recipe.merge == "mean"
        kept = (rows.offsets, rows.ids, rows.logprob, rows.p, rows.rest)
        most = source.recipe.entries or len(rows.ids)
        count_C, ids_K, logprob_K, tail_C, mass_C5 = project_rows(row_C, *kept, *source.maps.routes, closed, most)
        if source.recipe.drawn:
            tail_C[count_C > 0] = -np.inf
        columns = {"pkl_count": count_C, "pkl_ids": ids_K, "pkl_logprob": logprob_K, "pkl_rest_logprob": tail_C}
        shares = zip(MASS_CLASSES, mass_C5.sum(axis=0).tolist(), strict=True)
        return columns, {f"mass_{name}_ppm": round(share * _PPM) for name, share in shares}

    def without_tail(self, config: AlignConfig) -> str:
        """Only a mean spreads the tail mass over what was not kept."""
        return f"{self.name} with --merge mean" if config.merge == "mean" else ""

    def biased(self, config: AlignConfig) -> Sequence[str]:
        """Moving unreached mass to a prefix is linear, the other policies are not."""
        if config.unreached == "prefix":
            return []
        return [f"--unreached {config.unreached} {_BIASED[config.unreached]} (prefix does not)"]
