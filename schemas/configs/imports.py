"""Configuration of 'xtoken import'. The fields are the flags; the descriptions are the help."""

from typing import Literal

from pydantic import Field, field_validator

from xtoken.schemas.codecs import TopK
from xtoken.schemas.configs.base import (
    ARGUMENTS,
    AS_HASH,
    COMMON,
    MAY_CHANGE,
    OUT_FOLDER,
    PLACE,
    Config,
    a_day,
    argument,
)

Format = Literal["distillkit", "axolotl", "api-trace"]
LICENSED = ("corpus", "outputs")


class ImportConfig(Config):
    """Turn a logit dataset that others published into a capture, which align and train read like any other.

    The files hold no more than they hold. What they cannot know is marked unknown: the tail mass of rows that
    were renormalised, the probability of a token outside the top k. Align refuses by name what would need it.
    Before anything is written, rows are tested: does each predict the token that stands behind it, and do tokens occur
    as often as the rows say? '--dry-run' stops there, and lists the losses that the set can train.
    """

    format: Format = argument("distillkit (also open-instruct's copy and raw top k), axolotl, or api-trace.", {})
    paths: list[str] = Field(
        description="Files or folders, in any number: .parquet; of api-trace .jsonl.",
        json_schema_extra=ARGUMENTS | PLACE | AS_HASH,
    )
    tokenizer: str = Field(
        description="Hugging Face id or folder of the tokenizer that the ids are of, the teacher's; no such file names "
        "it.",
        json_schema_extra=PLACE | COMMON | AS_HASH,
    )
    out: str = Field(description="Folder or URL of the capture.", json_schema_extra=OUT_FOLDER | COMMON | MAY_CHANGE)
    compression: str | None = Field(
        None,
        description="distillkit: the file that says how rows were compressed, which the rows do not; left out: "
        "compression_config.yaml beside the data.",
        json_schema_extra=PLACE | COMMON | AS_HASH,
    )
    entries: Literal["head", "all"] = Field(
        "head",
        description="distillkit: entries that are kept. head: those stored as numbers; the tail mass is what they "
        "leave. all: also those that a polynomial approximates, refused where these are noise.",
        json_schema_extra=COMMON,
    )
    documents: Literal["auto", "mask", "bos", "eos"] = Field(
        "auto",
        description="distillkit: what separates the documents of a packed row: its mask, BOS or EOS; auto: the mask "
        "where it numbers them.",
    )
    form: Literal["auto", "text", "ids", "messages"] = Field(
        "auto",
        description="What the rows are: text; ids: text among control tokens, which are not taught; messages: a "
        "conversation whose answers are taught; auto: messages where a column has them, ids where control tokens stand "
        "inside, else text.",
    )
    field: str | None = Field(
        None, description="axolotl: column of generated answers' log-probabilities; left out: the one so named."
    )
    date: str = Field(
        "2025-01-01", description="messages: the day that a chat template takes for today, if it writes dates."
    )
    k: int = Field(64, ge=1, le=255, description="Keep at most this many entries of a row.")
    min_p: float = Field(
        0.003, ge=0.0, lt=1.0, description="Drop entries below this probability; their mass is tail mass."
    )
    max_tokens: int = Field(1 << 15, ge=2, le=1 << 20, description="Cut documents that have more tokens.")
    on_bad: Literal["stop", "skip"] = Field(
        "stop",
        description="A row that cannot be what the format says stops the run, or is counted and skipped.",
    )
    source: str | None = Field(None, description="Name of the dataset, such as OWNER/NAME; kept in the manifest.")
    revision: str | None = Field(None, description="Its revision, such as a commit; kept in the manifest.")
    teacher: str | None = Field(None, description="Name of the model that gave the rows; kept in the manifest.")
    license: list[str] = Field(
        default=[],
        description="Licences by commas, such as corpus=odc-by,outputs=apache-2.0: of the texts, and of what the "
        "teacher wrote or scored; kept in the manifest.",
    )
    part_bytes: int = Field(
        1 << 26, ge=1 << 12, description="Bytes of the source that become one part, about (decoded, of Parquet)."
    )
    dry_run: bool = Field(
        False,
        description="Test rows, print what was found and which losses they can train, and write nothing.",
        json_schema_extra=COMMON | MAY_CHANGE,
    )

    @property
    def codec(self) -> TopK:
        """How rows are kept."""
        return TopK(k=self.k, min_p=self.min_p)

    @property
    def licenses(self) -> dict[str, str]:
        """As manifests have them."""
        return {name: value for name, _, value in (word.partition("=") for word in self.license)}

    _dates = field_validator("date")(a_day)

    @field_validator("license")
    @classmethod
    def _known_licences(cls, value: list[str]) -> list[str]:
        for word in value:
            name, _, licence = word.partition("=")
            if name not in LICENSED or not licence.strip():
                raise ValueError(f"{word!r} is neither corpus=LICENCE nor outputs=LICENCE")
        return value
