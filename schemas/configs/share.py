"""Configuration of the share verbs; see ``xtoken.schemas.configs.artifacts`` for how fields become flags."""

import re

from pydantic import Field, field_validator, model_validator

from xtoken.schemas.configs.base import ARGUMENT, OUT_FOLDER, PLACE, Config, argument
from xtoken.schemas.tables import OPTIONAL

LICENSED = ("corpus", "outputs")
PART_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")


class PullConfig(Config):
    """Fetch a capture or targets: every file checked by sha256, resumable, complete or not there at all."""

    source: str = argument("Capture or targets: folder or URL (s3://, hf://datasets/OWNER/NAME, gs://, ...).")
    destination: str = argument("New folder or URL; the same command on it resumes.", OUT_FOLDER)
    parts: str | None = Field(None, description="Only these parts, such as 0-9,12.")
    where: str | None = Field(
        None, description='Only samples for which this SQL holds, such as "complete AND len(teacher_ids) > 100".'
    )
    columns: list[str] = Field(
        default=[], description="Only these optional columns of a capture, of text, rows, space_logprob; or 'none'."
    )
    workers: int = Field(4, ge=1, le=64, description="Files copied at once.")

    @field_validator("parts")
    @classmethod
    def _ranges(cls, value: str | None) -> str | None:
        if value is not None and PART_RANGES.fullmatch(value.replace(" ", "")) is None:
            raise ValueError(f"{value!r} is not a list of parts; write it like 0-9,12")
        return None if value is None else value.replace(" ", "")

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in (*OPTIONAL, "none"):
                raise ValueError(f"{name!r} is not an optional column; choose from {', '.join(OPTIONAL)}, or 'none'")
        if "none" in value and len(value) > 1:
            raise ValueError("'none' stands alone")
        return value


def _licenses(value: list[str]) -> list[str]:
    """Check ``corpus=ID,outputs=ID``."""
    for item in value:
        name, _, identifier = item.partition("=")
        if name not in LICENSED or not identifier.strip():
            raise ValueError(
                f"{item!r} is not a licence; write corpus=ID,outputs=ID with identifiers such as cc-by-4.0"
            )
    if value and sorted(item.partition("=")[0] for item in value) != sorted(LICENSED):
        raise ValueError(f"--license {','.join(value)}: both are needed once, as in corpus=cc-by-4.0,outputs=gemma")
    return value


class PushConfig(PullConfig):
    """Publish a capture or targets for others: as pull, with a dataset card."""

    source: str = argument("Capture or targets: folder or URL.")
    destination: str = argument("Folder or URL: s3://BUCKET/NAME, hf://datasets/OWNER/NAME, gs://, ...", OUT_FOLDER)
    license: list[str] = Field(
        default=[],
        description="Licences of the text and of the teacher's outputs: corpus=ID,outputs=ID. Needed unless the "
        "capture has a card.",
    )
    _check_license = field_validator("license")(_licenses)


class CardConfig(Config):
    """Write a capture's dataset card: README.md with hub metadata, and plots."""

    capture: str = argument("Capture folder.")
    license: list[str] = Field(
        default=[], description="Licences of the text and of the teacher's outputs: corpus=ID,outputs=ID."
    )
    title: str | None = Field(None, description="Title of the card.")
    students: list[str] = Field(
        default=[],
        description="Tokenizers of students, whose alignment with the teacher the card shows.",
        json_schema_extra=PLACE,
    )
    _check_license = field_validator("license")(_licenses)


class MergeConfig(Config):
    """Join captures of one plan, or of different documents with the same teacher and settings."""

    sources: list[str] = Field(
        description="Captures to join: folders or URLs, separated by commas.", json_schema_extra=ARGUMENT | PLACE
    )
    destination: str = argument("New folder or URL; the same command on it resumes.", OUT_FOLDER)
    workers: int = Field(4, ge=1, le=64, description="Files copied at once.")

    @model_validator(mode="after")
    def _several(self) -> "MergeConfig":
        if len(self.sources) < 2:
            raise ValueError("one capture needs no merge; name two or more, separated by commas")
        return self
