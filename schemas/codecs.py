"""Which codecs there are: the settings of each, and what it asks of a teacher.

A codec's own code (columns, encode, decode, check, words) is one file of ``xtoken.pipeline.store.codecs``, found by
the name registered here and imported on use.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class CodecSettings(BaseModel):
    """Settings that decide a codec's rows; this one has none. Names are those of flags and of the manifest's fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def entries(self) -> int | None:
        """Entries that the teacher gives of each distribution, most probable first; None = all of its output head."""
        return None

    @property
    def sampling(self) -> tuple[int, int] | None:
        """Tokens that the teacher samples from each distribution, and the seed; None = none."""
        return None


class TopK(CodecSettings):
    """The most probable entries and the tail mass."""

    k: int = Field(64, ge=1, le=255, description="most entries of a row")
    min_p: float = Field(0.003, ge=0.0, lt=1.0, description="smallest probability kept beside the first entry")
    temperatures: list[float] = Field(default=[], description="other than 1, at which the tail mass is stored too")

    @property
    def entries(self) -> int:
        """As many as may be kept."""
        return self.k


class Sampled(CodecSettings):
    """Tokens sampled from whole teacher distributions."""

    draws: int = Field(50, ge=1, le=65535, description="sampled tokens of a row")
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 64, description="what the sampled tokens follow from")

    @property
    def entries(self) -> int:
        """One, for the rank of the most probable token."""
        return 1

    @property
    def sampling(self) -> tuple[int, int]:
        """``--draws`` and ``--seed``."""
        return self.draws, self.seed


class Registered(NamedTuple):
    """What is known of a codec before its code is imported.

    Attributes:
        module: defines ``CODEC``, a class of ``xtoken.pipeline.store.codecs.base.Codec``.
        settings: its settings; their values come from flat fields of the same names.
        whole_rows: the teacher's backend must see whole distributions.
        linear: what is decoded is right in the mean only, so that targets must be linear in it.
    """

    module: str
    settings: type[CodecSettings] = CodecSettings
    whole_rows: bool = False
    linear: bool = False


CODECS: dict[str, Registered] = {
    "topk": Registered("xtoken.pipeline.store.codecs.topk", TopK),
    "sampled": Registered("xtoken.pipeline.store.codecs.sampled", Sampled, whole_rows=True, linear=True),
}


def registered(name: str) -> Registered:
    """The codec of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CODECS:
        raise ValueError(f"{name!r} is not a codec; expected one of {', '.join(CODECS)}")
    return CODECS[name]


def known_codec(name: str) -> str:
    """Check a codec's name; for ``field_validator``."""
    registered(name)
    return name


def settings_of(name: str, values: Mapping[str, Any]) -> CodecSettings:
    """The settings of a codec, out of flat fields, whose holder checks them (see ``CodecInfo``).

    Raises:
        ValueError: there is no such codec.
    """
    kind = registered(name).settings
    return kind.model_construct(**{field: values[field] for field in kind.model_fields})


def foreign_fields(name: str) -> list[str]:
    """Fields that other codecs' settings have and this one's do not."""
    own = registered(name).settings.model_fields
    others = [field for one in CODECS.values() for field in one.settings.model_fields]
    return [field for field in dict.fromkeys(others) if field not in own]
