"""Configuration of the verbs after capture. The fields are the flags; the descriptions are the help.

A field marked ``ARGUMENT`` is positional on the command line. Values that a user can get
wrong are checked here, before anything expensive starts.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from xtoken.schemas.categories import CATEGORIES
from xtoken.schemas.configs.base import (
    ARGUMENT,
    AS_FOR,
    AS_HASH,
    COMMON,
    MAY_CHANGE,
    OUT_FILE,
    OUT_FOLDER,
    OUT_PAGE,
    PLACE,
    RUN,
    TARGETS,
    Config,
    argument,
    arguments_of,
    named_values,
    ray_address,
)
from xtoken.schemas.io.sizes import memory_size
from xtoken.schemas.losses import LOSSES

# What align.json holds beside settings, or in another form.
_DERIVED = ("capture", "student", "w", "revisions", "template", "stops")
RULES = ("pieces", "first-piece", "reverse", "random", "mined")


class ProjectConfig(Config):
    """Build W, the sparse map from a student's tokens to a teacher's, and audit it."""

    student: str = Field(
        description="Student model or tokenizer: Hugging Face id, folder, tokenizer.json, or 'bytes'.",
        json_schema_extra=PLACE,
    )
    teacher: str = Field(
        description="Teacher tokenizer likewise, or a capture, whose own vocabulary is used.", json_schema_extra=PLACE
    )
    out: str = Field(
        description="Folder for w.parquet, unreached.parquet, manifest.json and coverage.html.",
        json_schema_extra=OUT_FOLDER,
    )
    rule: str = Field(
        "pieces",
        description="How W is built: pieces; first-piece (all weight on it); reverse (also teacher to student pieces); "
        "random (same counts, random targets: the control); mined (least edit distance: for the loss mined); "
        "masked:CATEGORY (that category's rows left out).",
    )
    seed: int = Field(0, description="Seed of --rule random.")
    mass_rows: int = Field(
        1_000_000, ge=1, description="With a capture as teacher: rows whose mass the audit is weighted by."
    )

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        name, colon, category = value.partition(":")
        if name == "masked":
            if category not in (*CATEGORIES, "numerals"):
                listed = ", ".join(("numerals", *CATEGORIES))
                raise ValueError(f"masked needs a category, as in masked:numerals; choose from {listed}")
        elif name not in RULES or colon:
            raise ValueError(f"rule {value!r} is unknown; choose from {', '.join(RULES)}, masked:CATEGORY")
        return value


class AlignConfig(Config):
    """Align a capture with a student's tokenizer and build what its losses train on, through W ('xtoken project')."""

    captures: list[str] = Field(
        description="Capture folder or URL; several of one corpus, separated by commas, for several teachers.",
        json_schema_extra=ARGUMENT | PLACE | AS_HASH,
    )
    student: str = Field(
        description="Student model or tokenizer: Hugging Face id, folder, tokenizer.json, or 'bytes'.",
        json_schema_extra=PLACE | AS_HASH,
    )
    out: str = Field(
        description="Folder for the targets, of several captures one below it for each; the same command resumes.",
        json_schema_extra=OUT_FOLDER | MAY_CHANGE,
    )
    w: str | None = Field(
        None, description="Folder written by 'xtoken project'; built when left out.", json_schema_extra=PLACE | AS_HASH
    )
    corpus: str | None = Field(
        None,
        description="Corpus of a capture made with --no-text; its hash must be the same.",
        json_schema_extra=PLACE | MAY_CHANGE,
    )
    template: str | None = Field(
        None,
        description="Of conversations: Jinja file with the student's chat template; left out: its own.",
        json_schema_extra=PLACE | AS_HASH,
    )
    template_arg: list[str] = Field(
        default=[], description="Of conversations: variables of that template, such as enable_thinking=false."
    )
    losses: list[str] = Field(
        default=["p-kl"],
        description=f"Losses the targets serve: {', '.join(LOSSES)}.",
        alias="for",
        json_schema_extra=TARGETS | COMMON | AS_FOR,
    )
    merge: Literal["first", "last", "mean"] = Field(
        "first",
        description="How a chunk's rows become one: the first; the last (gold, uld: TRL's 'bayesian'); the mean of "
        "log-probabilities (p-kl, h-kl: NeMo-RL's way).",
        json_schema_extra=TARGETS,
    )
    tau: float = Field(
        1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Distillation temperature of teacher and student.",
        json_schema_extra=TARGETS,
    )
    entries: int | None = Field(
        None,
        ge=1,
        description="p-kl: most entries of a chunk's target, the others are tail mass; all when left out.",
        json_schema_extra=TARGETS,
    )
    unreached: Literal["prefix", "rest", "none"] = Field(
        "prefix",
        description="Mass of teacher tokens W does not reach: to the longest prefix, tail mass, or dropped.",
        json_schema_extra=TARGETS,
    )
    on_bad: Literal["refuse", "set-aside"] = Field(
        "refuse",
        description="A part that cannot be read, or a sample that the student's tokenizer cannot represent: refuse "
        "(do the others, then end with an error) or set-aside (finish the targets without it, and name it).",
        json_schema_extra=TARGETS | MAY_CHANGE,
    )
    workers: int = Field(
        1, ge=1, description="Worker processes, or Ray's workers of one CPU each.", json_schema_extra=RUN | MAY_CHANGE
    )
    ray: str | None = Field(
        None,
        description="Run on Ray: 'local', 'auto' (the cluster this machine is of), or HOST:PORT of its head.",
        json_schema_extra=RUN | MAY_CHANGE,
    )
    lease_seconds: float = Field(
        1800.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Time a worker may take for one part under --ray.",
        json_schema_extra=RUN | MAY_CHANGE,
    )
    memory_limit: str = Field(
        "1GB",
        description="Memory a worker may use for what it reads, such as 512MB or 2GB.",
        json_schema_extra=RUN | MAY_CHANGE,
    )
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    _an_address = field_validator("ray")(ray_address)

    _a_limit = field_validator("memory_limit")(memory_size)

    _named_values = field_validator("template_arg")(named_values)

    @property
    def arguments(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return arguments_of(self.template_arg)

    @classmethod
    def settings_of(cls, record: dict[str, Any]) -> dict[str, Any] | None:
        """See ``Config``: align.json, which holds hashes of the capture, the student and W, not their places."""
        if not {"capture", "student", "w", "for"} <= record.keys() or len(str(record["w"])) != 64:
            return None
        return {name: value for name, value in record.items() if name not in _DERIVED}

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in LOSSES:
                raise ValueError(f"loss {name!r} is unknown; choose from {', '.join(LOSSES)}")
        if not value:
            raise ValueError(f"no loss named; choose from {', '.join(LOSSES)}")
        return [name for name in LOSSES if name in value]

    @model_validator(mode="after")
    def _losses_know_the_merge(self) -> "AlignConfig":
        known = [name for name, loss in LOSSES.items() if self.merge in loss.merges]
        for name in self.losses:
            if name not in known:
                raise ValueError(
                    f"loss {name!r} is not defined with --merge {self.merge}, which serves {', '.join(known)}; "
                    f"leave --merge out, or leave {name} out of --for"
                )
        return self


class InspectConfig(Config):
    """Say what a folder is: counts, bytes per token, three samples; or draw one sample as a page."""

    path: str = argument("Folder or URL of a capture, projection, targets or run.")
    html: str | None = Field(
        None,
        description="Id of a sample: write one self-contained page with its text, teacher and student tokens, chunks, "
        "surprise, and the teacher's rows beside the targets. 'worst' is the sample that surprised the teacher most.",
    )
    capture: str | None = Field(
        None, description="With --html of targets: the capture they were aligned from.", json_schema_extra=PLACE
    )
    out: str | None = Field(
        None, description="With --html: the page; named after the sample when left out.", json_schema_extra=OUT_PAGE
    )

    @model_validator(mode="after")
    def _a_page_is_asked_for(self) -> "InspectConfig":
        for name, value in (("capture", self.capture), ("out", self.out)):
            if value is not None and self.html is None:
                raise ValueError(f"{name} goes with html; say --html SAMPLE too, or leave --{name} out")
        return self


class QueryConfig(Config):
    """Ask a capture or targets with SQL, over views that name things as the documentation does.

    Without SQL, list the views and their columns. See docs/query.md.
    """

    path: str = argument("Folder or URL of a capture or of targets.")
    sql: str | None = Field(
        None, description="A query in DuckDB's SQL; - reads it from standard input.", json_schema_extra=ARGUMENT
    )
    capture: str | None = Field(
        None,
        description="With targets: the capture they were aligned from, for its views too.",
        json_schema_extra=PLACE,
    )
    out: str | None = Field(
        None,
        description="Write the rows here: .parquet, .csv, .json or .jsonl; shown when left out.",
        json_schema_extra=OUT_FILE,
    )
    memory_limit: str = Field("1GB", description="Memory DuckDB may use, such as 512MB or 2GB.")

    _a_limit = field_validator("memory_limit")(memory_size)


class VerifyConfig(Config):
    """Check every file's sha256, schema, counts and row invariants; exit code 3 when something is wrong."""

    path: str = argument("Folder or URL of a capture, projection or targets.")
    audit: bool = Field(False, description="Also show each worker's audit: its stored rows against a second scoring.")


class DoctorConfig(Config):
    """Report versions, GPUs, caches and the folders that can be written, and the extras that are missing.

    Exit code 1 when something that every verb needs is missing or broken. No network is used unless asked for.
    """

    online: bool = Field(False, description="Also ask the hub whether it answers; nothing else uses the network.")
    imports: bool = Field(
        False, description="Also import every package, each in a process of its own: a minute that finds broken ones."
    )


class DemoConfig(Config):
    """The same as examples/demo.py in a clone of the repository, which replaces it; 'make demo' prepares its models."""

    out: str = Field("demo-run", description="As of examples/demo.py.", json_schema_extra=OUT_FOLDER)
    model: str | None = Field(None, description="As of examples/demo.py.", json_schema_extra=PLACE)
    steps: int = Field(60, ge=1, description="As of examples/demo.py.")
