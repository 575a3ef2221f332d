"""GOLD: entries with a student token of equal bytes token by token, all others as a sorted list."""

from typing import ClassVar

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder

_NAMES = ("gold_count", "gold_ids", "gold_logprob", "gold_other_count", "gold_other_logprob")


class Builder(TargetBuilder):
    """Columns ``gold_*`` and ``factor_logprob``."""

    not_linear: ClassVar[str] = "compares sorted lists"
    w_rule: ClassVar[str] = "pieces"

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        row_C, factor_C = source.factored()
        columns = dict(zip(_NAMES, source.split(source.maps.matched_U, row_C), strict=True))
        return {**columns, "factor_logprob": factor_C}, {}
