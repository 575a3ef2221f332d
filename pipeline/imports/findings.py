"""What an import finds of its source before it writes: the reader that fits, the tests' figures, what they allow."""

import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict

from xtoken.pipeline.imports import FORMATS
from xtoken.pipeline.imports.claims import (
    Look,
    look,
    refuse_other_tokenizer,
    refuse_shift,
    refuse_sums,
    refuse_uncalibrated,
)
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.samples import Reader, Slice
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.imported import ImportedFile, ImportedInfo, RestClass, why_not
from xtoken.schemas.losses import LOSSES


class Begun(BaseModel):
    """What the first start of a run found, for all later ones.

    Attributes:
        info: of the manifest; its counts are those of the end.
        form: what the rows are.
        bos: all samples have a row for their first token.
        chat: of conversations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    info: ImportedInfo
    form: str
    bos: bool
    chat: CaptureChat | None


def open_source(config: ImportConfig, spelling: Spelling, form: str | None = None) -> tuple[Reader, str]:
    """The reader, for rows of the form that was asked for, or that its first samples have."""
    module = import_module(FORMATS[config.format])
    asked = form or (config.form if config.form != "auto" else None)
    if asked is not None:
        return module.open_reader(config, spelling, asked), asked
    if (said := module.guess_form(config)) is not None:
        return module.open_reader(config, spelling, said), said
    reader: Reader = module.open_reader(config, spelling, "text")
    found = look(reader, spelling, reader.slices())
    if not found.control:
        return reader, "text"
    return module.open_reader(config, spelling, "ids"), "ids"


def tested(config: ImportConfig, spelling: Spelling, reader: Reader, slices: Sequence[Slice]) -> tuple[Reader, Look]:
    """The reader with its rows where they belong and the class that they have, and what a look at them found.

    Raises:
        XtokenError: they predict nothing, or their probabilities are none.
    """
    found = look(reader, spelling, slices)
    if found.best_shift and (moved := reader.moved(found.best_shift)) is not None:
        reader, found = moved, look(moved, spelling, slices)
    unsound = getattr(reader, "refuse_unsound", None)
    if unsound is not None:
        unsound(found.far_above / found.rows, found.above_zero)
    source = reader.source
    refuse_sums(found, source.hint)
    if source.calibrated:
        refuse_uncalibrated(found, source.hint)
    refuse_other_tokenizer(found, config.tokenizer, source.blameless)
    refuse_shift(found, source.format)
    return reader, found


def _rest(reader: Reader, found: Look) -> RestClass:
    return "unknown" if found.renormalised else reader.source.rest


def info_of(reader: Reader, found: Look, files: list[ImportedFile]) -> ImportedInfo:
    """What the manifest says of an import; counts and unknown labels are set anew at its end, from all parts.

    Args:
        reader: as ``tested`` gives it.
        found: by the look that goes with it.
        files: of the source; none in a dry run.
    """
    source, rest = reader.source, _rest(reader, found)
    config = {name: json.loads(json.dumps(value)) for name, value in source.config.items()}
    return ImportedInfo(
        format=source.format,
        rest=rest,
        config=config,
        files=files,
        looked_at=found.rows,
        shift={f"{shift:+d}": min(1.0, share) for shift, share in found.shares.items()},
        moved=reader.shift,
        calibration=found.calibration,
        same_ids=found.same_ids,
        labels_unknown=1.0 if rest == "unknown" else found.unknown / found.rows,
        notes=[*source.notes, *getattr(reader, "findings", ())],
    )


def figures(config: ImportConfig, info: ImportedInfo, form: str) -> dict[str, Any]:
    """What a verb prints of an import."""
    reasons = {loss: why_not(loss, info.rest, info.labels_unknown) for loss in LOSSES}
    drop = " (with --rest drop)" if info.rest == "unknown" else ""
    trained = [loss + (drop if loss in ("p-kl", "sparse-kl") else "") for loss, why in reasons.items() if why is None]
    return {
        "format": info.format,
        "form": form,
        "tail_mass": info.rest,
        "rows_looked_at": info.looked_at,
        "stored_probability_by_shift": {shift: round(share, 4) for shift, share in info.shift.items()},
        "calibration": [one.model_dump() for one in info.calibration],
        "texts_with_the_same_ids": info.same_ids,
        "labels_unknown": round(info.labels_unknown, 4),
        "losses": trained,
        "losses_refused": {loss: why for loss, why in reasons.items() if why is not None},
        **({"dropped": dict(info.counts)} if info.counts else {}),
        **({"notes": list(info.notes)} if info.notes else {}),
        **({} if config.licenses else {"licences": "not said; give --license corpus=...,outputs=..."}),
    }
