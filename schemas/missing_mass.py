"""What losses without REST never see: the teacher's probability that stored rows lack at another temperature.

A temperature above 1 moves probability from the entries that a capture keeps to those that it does not. Sorted lists
and sums over kept pairs take what is missing for 0.

Shapes: C chunks, K kept entries summed over chunks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.losses import LOSSES

_LITTLE = 0.01  # of a row: not worth a word


def lacking_columns(loss: str, tau: float, merge: str) -> Sequence[str]:
    """Target columns to look into; none of a loss that has the tail mass or needs none, and none at temperature 1.

    Merged rows (``mean``) are not distributions: what they lack does not show.
    """
    schema = LOSSES[loss]
    tail = schema.renormalised or any(column.holds == "tail" for column in schema.columns)
    if tau == 1 or merge == "mean" or tail:
        return []
    counts = [count for table in schema.entry_tables for count in table.counts]
    return [name for count in counts for name in (count, *(column.name for column in schema.along(count, "logprob")))]


def lacking_note(root: str, losses: Sequence[str], tau: float, values: Mapping[str, NDArray[Any]]) -> str | None:
    """A sentence on what targets lack, None where that is little.

    Args:
        root: the targets.
        losses: without REST; all share out the same entries.
        values: of ``lacking_columns`` of one of them, int32 [C] and float [K] nats at ``tau``.
    """
    rows = np.sum([count for name, count in values.items() if name.endswith("_count")], axis=0) > 0
    kept = sum(float(np.exp(logprob.astype(np.float64)).sum()) for name, logprob in values.items() if "_log" in name)
    share = 1 - kept / max(1, int(rows.sum()))
    if share < _LITTLE or not rows.any():
        return None
    takes, its = ("takes", "its") if len(losses) == 1 else ("take", "their")
    return (
        f"{root}: at --tau {tau:g} the stored rows lack {share:.0%} of the teacher's probability, which "
        f"{', '.join(losses)} {takes} for 0: {its} gradient is not that of whole rows. Capture with a larger --k and a "
        "smaller --min-p, align without --tau, or take p-kl, which has REST"
    )
