"""MinED: the teacher's distribution through a W of least edit distance, where one teacher token is one student token.

Every other chunk has no entries, which the loss takes for one-hot targets: the student's own labels.
"""

from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.kernels_project import project_rows
from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, ProjectionManifest, TokenizerInfo, read_manifest


class Builder(TargetBuilder):
    """Columns ``mined_*``, as those of p-kl; option: ``--unreached``."""

    not_linear: ClassVar[str] = "takes the label where W reaches nothing of what was sampled"
    w_rule: ClassVar[str] = "mined"

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        rows, row_C = source.merged(prefix=source.maps.moves)
        row_C = np.where(source.one_to_one, row_C, -1)
        kept = (rows.offsets, rows.ids, rows.logprob, rows.p, rows.rest)
        whole = (False, len(rows.ids))  # with the tail mass, all entries
        count_C, ids_K, logprob_K, tail_C, _ = project_rows(row_C, *kept, *source.maps.routes, *whole)
        columns = {"mined_count": count_C, "mined_ids": ids_K, "mined_logprob": logprob_K, "mined_rest_logprob": tail_C}
        return columns, {"mined_chunks": int((count_C > 0).sum())}

    def refuse(self, config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:  # noqa: ARG002
        """Raise XtokenError for a W of another rule: the baseline would not be the one that the name promises."""
        rule = None if config.w is None else read_manifest(config.w, ProjectionManifest).options.get("rule", "pieces")
        if rule not in (None, self.w_rule):
            raise XtokenError(
                f"--for {self.name} goes through a W of least edit distance, and {config.w} is of rule {rule!r}; "
                "leave --w out (align builds the right one), or build it with 'xtoken project --rule mined'"
            )
