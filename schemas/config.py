"""Configuration of the verbs after capture. The fields are the flags; the descriptions are the help.

A field marked ``ARGUMENT`` is positional on the command line. Values that a user can get
wrong are checked here, before anything expensive starts.
"""

from typing import Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from schemas.fields import ARGUMENT, Config, argument, memory_size, ray_address
from schemas.tables import LOSSES

RULES = ("pieces", "first-piece", "reverse", "random")
CATEGORIES = (
    "numerals_1",
    "numerals_2",
    "numerals_3",
    "whitespace",
    "operators",
    "latin",
    "other_scripts",
    "other_text",
    "partial_utf8",
    "specials",
)


class ProjectConfig(Config):
    """Build W between a student's and a teacher's tokenizer and audit it."""

    student: str = Field(description="Student model or tokenizer: Hugging Face id, folder, tokenizer.json, or 'bytes'.")
    teacher: str = Field(description="Teacher tokenizer likewise, or a capture, whose own vocabulary is used.")
    out: str = Field(description="Folder for w.parquet, unreached.parquet, manifest.json and coverage.html.")
    rule: str = Field(
        "pieces",
        description="How W is built: pieces; first-piece (all weight on it); reverse (also teacher to student pieces); "
        "random (same counts, random targets: the control); masked:CATEGORY (that category's rows left out).",
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
    """Align a capture with a student's tokenizer and build targets through W."""

    captures: list[str] = Field(
        description="Capture folder or URL; several of one corpus, separated by commas, for several teachers.",
        json_schema_extra=ARGUMENT,
    )
    student: str = Field(description="Student model or tokenizer: Hugging Face id, folder, tokenizer.json, or 'bytes'.")
    out: str = Field(
        description="Folder for the targets, of several captures one below it for each; the same command resumes."
    )
    w: str | None = Field(None, description="Folder written by 'xtoken project'; built when left out.")
    corpus: str | None = Field(None, description="Corpus of a capture made with --no-text; its hash must be the same.")
    losses: list[str] = Field(
        default=["p-kl"], description=f"Losses the targets serve: {', '.join(LOSSES)}.", alias="for"
    )
    merge: Literal["first", "last", "mean"] = Field(
        "first",
        description="How a chunk's rows become one: the first; the last (gold, uld: TRL's 'bayesian'); the mean of "
        "log-probabilities (p-kl, h-kl: NeMo-RL's way).",
    )
    tau: float = Field(1.0, gt=0.0, allow_inf_nan=False, description="Distillation temperature of teacher and student.")
    entries: int | None = Field(
        None, ge=1, description="p-kl: most entries of a chunk's target, the others go to REST; all when left out."
    )
    unreached: Literal["prefix", "rest", "none"] = Field(
        "prefix", description="Mass of teacher tokens W does not reach: to the longest prefix, to REST, or dropped."
    )
    on_bad: Literal["refuse", "set-aside"] = Field(
        "refuse",
        description="A part that cannot be read, or a sample that the student's tokenizer cannot represent: refuse "
        "(do the others, then end with an error) or set-aside (finish the targets without it, and name it).",
    )
    workers: int = Field(1, ge=1, description="Worker processes, or Ray's workers of one CPU each.")
    ray: str | None = Field(
        None, description="Run on Ray: 'local', 'auto' (the cluster this machine is of), or HOST:PORT of its head."
    )
    lease_seconds: float = Field(
        1800.0, gt=0.0, allow_inf_nan=False, description="Time a worker may take for one part under --ray."
    )
    memory_limit: str = Field("1GB", description="Memory a worker may use for what it reads, such as 512MB or 2GB.")
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    _an_address = field_validator("ray")(ray_address)

    _a_limit = field_validator("memory_limit")(memory_size)

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
        known = {"last": ("ce", "gold", "uld", "alm"), "mean": ("ce", "p-kl", "h-kl", "alm")}
        for loss in self.losses:
            if self.merge != "first" and loss not in known[self.merge]:
                raise ValueError(
                    f"loss {loss!r} is not defined with --merge {self.merge}, which serves "
                    f"{', '.join(known[self.merge])}; leave --merge out, or leave {loss} out of --for"
                )
        return self


class LossOptions(Config):
    """What the losses leave open. One value serves every teacher of a run."""

    kl: Literal["forward", "reverse"] = Field(
        "forward", description="p-kl, h-kl, sparse-kl: KL(teacher||student) or KL(student||teacher)."
    )
    rest: Literal["bucket", "drop"] = Field(
        "bucket",
        description="p-kl, sparse-kl: mass not kept is one cell, or both sides are renormalised without it.",
    )
    common_weight: float = Field(1.0, ge=0.0, description="h-kl: weight of the KL on the common set.")
    uld_weight: float = Field(1.0, ge=0.0, description="h-kl: weight of the sorted L1 part.")
    uncommon_topk: int = Field(8192, ge=1, description="h-kl: longest sorted list outside the common set.")
    beta: float = Field(0.5, ge=0.0, le=1.0, description="gold: 0 is KL(teacher||student), 1 the reverse.")
    alm: Literal["binary-kl", "limit", "abs", "reverse"] = Field(
        "binary-kl", description="alm: divergence of chunk likelihoods; limit is binary-kl at alm-tau to infinity."
    )
    alm_tau: float = Field(100.0, gt=0.0, allow_inf_nan=False, description="alm: tau_b of binary-kl and reverse.")
    debias: list[str] = Field(
        default=[], description="alm: outcome (next token starts with a space, both sides) and merge (join chunks)."
    )
    alm_threshold: float = Field(
        0.1, gt=0.0, lt=1.0, description="alm: --debias merge ends a chunk above this P(next starts with a space)."
    )
    prefix: list[str] = Field(
        default=["root", "interior", "child"], description="byte-prefix: its terms, any of root, interior, child."
    )

    @field_validator("debias", "prefix")
    @classmethod
    def _known_terms(cls, value: list[str], info: ValidationInfo) -> list[str]:
        known = {"debias": ("outcome", "merge"), "prefix": ("root", "interior", "child")}[str(info.field_name)]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is unknown; choose from {', '.join(known)}")
        if not value and info.field_name == "prefix":
            raise ValueError(f"byte-prefix needs a term; choose from {', '.join(known)}")
        return [name for name in known if name in value]


class TrainConfig(LossOptions):
    """Train a student from stored targets; no teacher is needed."""

    targets: list[str] = Field(
        description="Folders or URLs written by 'xtoken align', one per teacher, separated by commas.",
        json_schema_extra=ARGUMENT,
    )
    student: str = Field(description="Hugging Face id or folder of the student.")
    tokenizer: str | None = Field(None, description="Tokenizer of a student whose folder holds none, such as 'bytes'.")
    out: str = Field(description="Folder for checkpoints, metrics.jsonl and the trained model; reruns resume.")
    loss: list[str] = Field(
        default=["p-kl"],
        description="Distillation loss ('xtoken losses' lists them), or one per target folder; ce: the text alone.",
    )
    weights: list[float] = Field(
        default=[], description="One weight per target folder, at least 0; scaled to sum to 1. Equal when left out."
    )
    weighting: Literal["static", "ce", "entropy", "confidence"] = Field(
        "static",
        description="static: --weights; else per sample, a softmax over the teachers that hold it of -CE, -entropy or "
        "the largest probability, times --weights.",
    )
    learn_w: bool = Field(False, description="p-kl: train W's weights too; its zeros stay.")
    w_lr: float = Field(1e-2, gt=0.0, description="Peak learning rate of W under --learn-w.")
    mix: Literal["fixed", "dynamic"] = Field(
        "fixed", description="fixed: kd_weight KD + ce_weight CE; dynamic: sg(CE/KD) KD + CE."
    )
    kd_weight: float = Field(1.0, ge=0.0, description="Weight of KD under --mix fixed.")
    ce_weight: float = Field(0.1, ge=0.0, description="Weight of CE under --mix fixed.")
    steps: int = Field(100, ge=1, description="Optimizer steps.")
    step_tokens: int = Field(4096, ge=1, description="Student tokens per optimizer step (at least one sample).")
    micro_tokens: int = Field(1024, ge=1, description="Padded student tokens per forward pass; the rest accumulates.")
    max_tokens: int = Field(1024, ge=8, description="Student tokens per sample; the rest of a sample is cut off.")
    lr: float = Field(5e-5, gt=0.0, description="Peak learning rate of AdamW.")
    warmup: int = Field(10, ge=0, description="Steps of linear warm-up; then cosine to a tenth.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW weight decay on matrices.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    clip: float = Field(1.0, gt=0.0, description="Largest gradient norm.")
    seed: int = Field(0, description="Seed of the sample order.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    autocast: Literal["auto", "none", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPU, none on CPU.")
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept.")
    eval_text: str | None = Field(None, description="Held-out text or corpus file: bits per byte before and after.")
    eval_targets: str | None = Field(
        None, description="Held-out targets: KL to the teacher and agreement before and after."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _something_to_learn(self) -> "TrainConfig":
        if not self.targets:
            raise ValueError("no target folder named; 'xtoken align' writes one")
        for name in self.loss:
            if name not in LOSSES:
                raise ValueError(f"loss {name!r} is unknown; choose from {', '.join(LOSSES)}")
        if len(self.loss) not in (1, len(self.targets)):
            raise ValueError(
                f"--loss names {len(self.loss)} losses for {len(self.targets)} target folders; give one, or one each"
            )
        if "ce" in self.loss and len(set(self.loss)) > 1:
            raise ValueError("loss 'ce' has no teacher; leave it out, CE is mixed in by --ce-weight")
        if self.mix == "fixed" and self.loss != ["ce"] and self.kd_weight == 0:
            raise ValueError("kd_weight=0 trains on nothing but CE; say --loss ce for that")
        if self.learn_w and "p-kl" not in self.loss:
            raise ValueError("--learn-w trains the W of p-kl, and no target folder is trained with p-kl")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> "TrainConfig":
        if self.weights and len(self.weights) != len(self.targets):
            raise ValueError(f"--weights has {len(self.weights)} numbers for {len(self.targets)} target folders")
        for weight in self.weights:
            if not 0 <= weight < float("inf"):
                raise ValueError(f"teacher weight {weight:g} must be a number of at least 0")
        if self.weights and sum(self.weights) == 0:
            raise ValueError("the teacher weights sum to 0, so nothing would be distilled; make one of them positive")
        return self

    @property
    def losses(self) -> list[str]:
        """One loss per target folder."""
        return self.loss * len(self.targets) if len(self.loss) == 1 else list(self.loss)


class EvalConfig(Config):
    """Measure a model on held-out text and, when given, against stored teacher rows."""

    model: str = argument("Hugging Face id or folder of the model.")
    tokenizer: str | None = Field(None, description="Tokenizer of a model whose folder holds none, such as 'bytes'.")
    text: str | None = Field(None, description="Held-out corpus: bits per byte.")
    targets: str | None = Field(None, description="Held-out targets: KL to the teacher and top-1 agreement.")
    text_field: str = Field("text", description="Field or column that holds the text.")
    limit: int | None = Field(None, ge=1, description="Read only the first N documents.")
    max_tokens: int = Field(1024, ge=8, description="Longest window in tokens.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _something_to_measure(self) -> "EvalConfig":
        if self.text is None and self.targets is None:
            raise ValueError("nothing to measure on; give --text FILE, --targets DIR, or both")
        return self


class InspectConfig(Config):
    """Say what a folder is: counts, bytes per token, three samples; or draw one sample as a page."""

    path: str = argument("Folder or URL of a capture, projection, targets or run.")
    html: str | None = Field(
        None,
        description="Id of a sample: write one self-contained page with its text, teacher and student tokens, chunks, "
        "surprise, and the teacher's rows beside the targets. 'worst' is the sample that surprised the teacher most.",
    )
    capture: str | None = Field(None, description="With --html of targets: the capture they were aligned from.")
    out: str | None = Field(None, description="With --html: the page; named after the sample when left out.")

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
        None, description="With targets: the capture they were aligned from, for its views too."
    )
    out: str | None = Field(
        None, description="Write the rows here: .parquet, .csv, .json or .jsonl; shown when left out."
    )
    memory_limit: str = Field("1GB", description="Memory DuckDB may use, such as 512MB or 2GB.")

    _a_limit = field_validator("memory_limit")(memory_size)


class VerifyConfig(Config):
    """Check every file's sha256, schema, counts and row invariants; exit code 3 when something is wrong."""

    path: str = argument("Folder or URL of a capture, projection or targets.")
    audit: bool = Field(False, description="Also show how rows compared with the same tokens scored another way.")


class DemoConfig(Config):
    """Walk the whole way on real models: capture, W, align, train with P-KL and with CE alone, compare."""

    out: str = Field("demo-run", description="Folder for everything the demo writes; a rerun resumes.")
    teacher: str | None = Field(None, description="Teacher; by default the Gemma-3-270m that 'make demo' prepares.")
    student: str | None = Field(None, description="Student; by default the SmolLM2-135M that 'make demo' prepares.")
    steps: int = Field(30, ge=1, description="Optimizer steps of each run.")
