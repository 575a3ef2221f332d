"""H-KL: pairs of the common set token by token, all other entries as a sorted list."""

from typing import ClassVar

from xtoken.pipeline.align.losses.base import Built, Source, TargetBuilder

_NAMES = ("hkl_common_count", "hkl_common_ids", "hkl_common_logprob", "hkl_other_count", "hkl_other_logprob")


class Builder(TargetBuilder):
    """Columns ``hkl_*``."""

    not_linear: ClassVar[str] = "compares sorted lists"
    w_rule: ClassVar[str] = "pieces"

    def columns(self, source: Source) -> Built:
        """See ``TargetBuilder``."""
        return dict(zip(_NAMES, source.split(source.maps.pair_U), strict=True)), {}
