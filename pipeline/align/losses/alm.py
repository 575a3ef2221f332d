"""ALM: the likelihood of each chunk, which all tables have, and whether a space comes after it."""

from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.pipeline.store.columns import flat


class Builder(TargetBuilder):
    """Column ``alm_space_logprob``, which a capture without full distributions leaves at NaN."""

    needs_rows: ClassVar[bool] = False
    needs_tail: ClassVar[bool] = False

    def columns(self, source: Source) -> Built:
        """Log P(starts with a space) of the distribution after each chunk, where the sample has one."""
        batch, offset_N = source.batch, source.rows.offset_N
        has_N = batch["space_logprob"].is_valid().to_numpy(zero_copy_only=False)
        space_R = np.full(int(offset_N[-1]), np.nan, np.float32)
        space_R[np.repeat(has_N, np.diff(offset_N))] = flat(batch, "space_logprob")
        after_C = source.rows.after(source.samples)
        space_C = np.full(len(after_C), np.nan, np.float32)
        space_C[after_C >= 0] = space_R[after_C[after_C >= 0]]
        return {"alm_space_logprob": space_C}, {"space_chunks": int((~np.isnan(space_C)).sum())}
