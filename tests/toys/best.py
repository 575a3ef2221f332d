"""A toy loss, one file as in ``pipeline/align/losses``: the best pair of each chunk, and the mass of all."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder
from xtoken.schemas.losses import FLOATS, INTS, About, LossColumn, LossSchema

# What stands in ``xtoken.schemas.losses.LOSSES``.
SCHEMA = LossSchema(
    "best",
    (
        LossColumn("best_count", INTS, "chunk", "[C] 1 where the chunk has a pair", "count"),
        LossColumn("best_ids", INTS, "best_count", "[K] its student id", "student ids"),
        LossColumn("best_logprob", FLOATS, "best_count", "[K] nats", "logprob"),
        LossColumn("best_pairs_logprob", FLOATS, "chunk", "[C] nats: log of all pairs' mass", "value", "all pairs"),
    ),
    about=About("the best pair of each chunk", "one pair per chunk", "never"),
)


class Builder(TargetBuilder):
    """Columns ``best_*``."""

    not_linear: ClassVar[str] = "takes the best"
    rules: ClassVar[Mapping[str, str]] = {"best_count is above 1": "best_count_high > 1"}

    def columns(self, source: Source) -> Built:
        """The first of each chunk's pairs, and their mass."""
        count_C, ids_K, logprob_K, _, _ = source.split(source.maps.matched_U)
        first_C = (np.cumsum(count_C) - count_C)[count_C > 0]
        chunk_K = np.repeat(np.arange(len(count_C)), count_C)
        with np.errstate(divide="ignore"):
            mass_C = np.log(np.bincount(chunk_K, np.exp(logprob_K), minlength=len(count_C)))
        columns = {
            "best_count": (count_C > 0).astype(np.int32),
            "best_ids": ids_K[first_C],
            "best_logprob": logprob_K[first_C],
            "best_pairs_logprob": mass_C.astype(np.float32),
        }
        return columns, {"best_chunks": int((count_C > 0).sum())}
