"""Strict: the teacher's distribution over tokens of equal bytes, where one teacher token is one student token.

The support is what the teacher kept of these tokens. The token that ends a text or a turn has no bytes and stays in, by
its role: as the label of a chunk of its own and as an entry of any other. All other special tokens are out.
"""

from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder


class Builder(TargetBuilder):
    """Columns ``strict_*``: log-probabilities as the teacher gave them, which the loss renormalises.

    A chunk with fewer than two such entries has no target: renormalised, one entry is 1 on both sides, whatever the
    student says. It would add nothing to the loss but to its denominator.
    """

    needs_tail: ClassVar[bool] = False
    not_linear: ClassVar[str] = "renormalises over what was sampled"

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        count_C, ids_K, logprob_K, _, _ = source.split(source.maps.twin_U)
        wanted_C = source.one_to_one & (count_C > 1)
        wanted_K = np.repeat(wanted_C, count_C)
        count_C = np.where(wanted_C, count_C, 0).astype(np.int32)
        columns = {"strict_count": count_C, "strict_ids": ids_K[wanted_K], "strict_logprob": logprob_K[wanted_K]}
        return columns, {"strict_chunks": int(wanted_C.sum())}
