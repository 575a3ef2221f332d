"""Configuration of 'xtoken import'. The fields are the flags; the descriptions are the help."""

from typing import Literal

from pydantic import Field, field_validator

from xtoken.schemas.configs.base import (
    ARGUMENTS,
    COMMON,
    OUT_FOLDER,
    PLACE,
    Config,
    argument,
)

Format = Literal["distillkit", "axolotl", "api-trace"]


class ImportConfig(Config):
    """Turn a logit dataset that others published into a capture.

    The files hold no more than they hold: what they cannot know (the tail mass of renormalised rows, the probability of
    a label outside the top k) is marked unknown, and align refuses what would need it.
    """

    format: Format = argument("distillkit (also open-instruct's, and raw top k), axolotl, or api-trace.", {})
    paths: list[str] = Field(
        description="Files or folders, in any number: .parquet; of api-trace .jsonl.",
        json_schema_extra=ARGUMENTS | PLACE,
    )
    tokenizer: str = Field(
        description="Hugging Face id or folder of the tokenizer that the token ids are of; no such file names it.",
        json_schema_extra=PLACE | COMMON,
    )
    out: str = Field(description="Folder or URL of the capture.", json_schema_extra=OUT_FOLDER | COMMON)
    compression: str | None = Field(
        None,
        description="distillkit: the file that says how rows were compressed; left out: compression_config.yaml beside "
        "the data.",
        json_schema_extra=PLACE | COMMON,
    )
    k: int = Field(64, ge=1, le=255, description="Keep at most this many entries of a row.")
    min_p: float = Field(0.003, ge=0.0, lt=1.0, description="Drop entries below this probability; their mass is REST.")
    license: list[str] = Field(
        default=[],
        description="Licences by commas, such as corpus=ODC-BY,outputs=Apache-2.0: of the texts, and of what the "
        "teacher wrote or scored.",
    )
    part_bytes: int = Field(
        1 << 26, ge=1 << 16, description="Bytes of the source that become one part, about (decoded, of Parquet)."
    )

    @field_validator("license")
    @classmethod
    def _known_licences(cls, value: list[str]) -> list[str]:
        for word in value:
            name, _, licence = word.partition("=")
            if name not in ("corpus", "outputs") or not licence.strip():
                raise ValueError(f"{word!r} is neither corpus=LICENCE nor outputs=LICENCE")
        return value
