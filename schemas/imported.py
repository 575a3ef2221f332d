"""What the manifest says of a capture that was made of a logit dataset of others, and of its targets."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from xtoken.schemas.record import Record

RestClass = Literal["exact", "rounded", "unknown"]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Word = Annotated[str, Field(max_length=4096)]
MOST_FILES = 1 << 16


class ImportedFile(Record):
    """A file of the source."""

    name: _Word = Field(description="its last part")
    bytes: _Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class RankShare(Record):
    """How often the token in the text is among some ranks, and the mean mass that the source gives these."""

    ranks: _Word = Field(description="1, 2-8, 9-32")
    share: _Share = Field(description="of rows")
    mass: float = Field(ge=0.0, description="mean over rows of what the source's entries of these ranks add up to")


class ImportedInfo(Record):
    """Where imported rows come from, and what is known of them."""

    format: _Word
    rest: RestClass = Field(
        description="tail mass: exact; rounded (16-bit log-probabilities); unknown (logits, or renormalised rows)"
    )
    config: dict[Annotated[str, Field(max_length=100)], JsonValue] = Field(
        default_factory=dict, max_length=256, description="what decoded the rows"
    )
    files: list[ImportedFile] = Field(max_length=MOST_FILES)
    source: _Word | None = Field(None, description="the dataset's name, as the importing user gave it")
    revision: _Word | None = Field(None, description="the dataset's revision, as the importing user gave it")
    looked_at: _Count = Field(description="rows that the shares below are of")
    shift: dict[Annotated[str, Field(max_length=8)], _Share] = Field(
        max_length=16,
        description="by places: mean stored probability of the token that stands so far behind the one a row predicts",
    )
    moved: int = Field(0, ge=-64, le=64, description="places that rows were moved by, against what the format says")
    calibration: list[RankShare] = Field(default_factory=list, max_length=8)
    same_ids: _Share | None = Field(
        None, description="share of documents whose text has the same ids when it is tokenized again; null: none whole"
    )
    labels_unknown: _Share = Field(0.0, description="share of rows whose label has no log-probability")
    counts: dict[Annotated[str, Field(max_length=100)], _Count] = Field(
        default_factory=dict, max_length=256, description="what was dropped or mended, of the whole import"
    )
    notes: list[_Word] = Field(default_factory=list, max_length=64)

    @property
    def whole_rest(self) -> bool:
        """Whether the tail mass is known."""
        return self.rest != "unknown"


def refuse_section(manifest: Any, since: int) -> None:
    """Raise ValueError unless a manifest has the section ``imported`` exactly from a version on."""
    if (manifest.imported is not None) != (manifest.schema_version >= since):
        raise ValueError(f"version {since} on, and no version before, says where rows were imported from in 'imported'")


def joined_imports(infos: Sequence[ImportedInfo]) -> ImportedInfo | None:
    """What is known of captures that were joined; None of none. Shares that are no means are the worst of all."""
    if not infos:
        return None
    looked = max(1, sum(one.looked_at for one in infos))
    weights = [one.looked_at / looked for one in infos]
    same = [one.same_ids for one in infos if one.same_ids is not None]
    counts: Counter[str] = Counter()
    for one in infos:
        counts.update(one.counts)
    files = {one.sha256: one for info in infos for one in info.files}
    return infos[0].model_copy(
        update={
            "files": list(files.values()),
            "source": _all_said([one.source for one in infos]),
            "revision": _all_said([one.revision for one in infos]),
            "looked_at": sum(one.looked_at for one in infos),
            "shift": {name: _mean([one.shift.get(name, 0.0) for one in infos], weights) for name in infos[0].shift},
            "calibration": [
                RankShare(
                    ranks=rows[0].ranks,
                    share=_mean([one.share for one in rows], weights),
                    mass=_mean([one.mass for one in rows], weights),
                )
                for rows in zip(*(one.calibration for one in infos), strict=True)
            ],
            "same_ids": min(same) if same else None,
            "labels_unknown": max(one.labels_unknown for one in infos),
            "counts": dict(counts),
            "notes": list(dict.fromkeys(note for one in infos for note in one.notes)),
        }
    )


def _mean(shares: Sequence[float], weights: Sequence[float]) -> float:
    return min(1.0, sum(weight * share for weight, share in zip(weights, shares, strict=True)))


def _all_said(names: Sequence[str | None]) -> str | None:
    """Each once; None where one did not say."""
    said = dict.fromkeys(names)
    return None if None in said else ", ".join(name for name in said if name is not None)


# Labels that no entry says may be so many of all before ALM, which needs each, is refused: dropping the surprising ones
# is a bias, not noise.
MOST_UNKNOWN = 0.005
_ANY_REST = ("ce", "p-kl", "sparse-kl", "strict")


def why_not(loss: str, rest: RestClass, labels_unknown: float) -> str | None:
    """Why a loss has no meaning over imported rows; None where it has one.

    Args:
        loss: a name of ``xtoken.schemas.losses.LOSSES``.
        rest: class of the tail mass.
        labels_unknown: share of rows whose label has no log-probability.
    """
    if loss == "alm" and (rest == "unknown" or labels_unknown > MOST_UNKNOWN):
        share = "no label has" if rest == "unknown" else f"{labels_unknown:.1%} of the labels do not have"
        return f"{share} a log-probability (at most {MOST_UNKNOWN:.1%} may lack one), and leaving those out is a bias"
    if rest == "unknown" and loss not in _ANY_REST:
        return "the tail mass is unknown, so that all probabilities are too large by a factor that nobody knows"
    return None
