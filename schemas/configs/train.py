"""Configuration of training. The fields are the flags; the descriptions are the help."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from xtoken.schemas.configs.base import (
    ARGUMENT,
    AS_HASH,
    COMMON,
    DETAILS,
    MAY_CHANGE,
    OUT_FOLDER,
    PLACE,
    Config,
    seconds_of,
    steps_or_time,
)
from xtoken.schemas.losses import LOSSES


class LossOptions(Config):
    """What the losses leave open. One value serves every teacher of a run."""

    kl: Literal["forward", "reverse"] = Field(
        "forward",
        description="p-kl, h-kl, sparse-kl, strict: KL(teacher||student) or KL(student||teacher).",
        json_schema_extra=DETAILS,
    )
    rest: Literal["bucket", "drop"] = Field(
        "bucket",
        description="p-kl, sparse-kl: mass not kept is one category, or both sides are renormalised without it.",
        json_schema_extra=DETAILS,
    )
    common_weight: float = Field(
        1.0, ge=0.0, description="h-kl: weight of the KL on the common set.", json_schema_extra=DETAILS
    )
    uld_weight: float = Field(1.0, ge=0.0, description="h-kl: weight of the sorted L1 part.", json_schema_extra=DETAILS)
    uncommon_topk: int = Field(
        8192, ge=1, description="h-kl: longest sorted list outside the common set.", json_schema_extra=DETAILS
    )
    beta: float = Field(
        0.5, ge=0.0, le=1.0, description="gold: 0 is KL(teacher||student), 1 the reverse.", json_schema_extra=DETAILS
    )
    alm: Literal["binary-kl", "limit", "abs", "reverse", "tv"] = Field(
        "binary-kl",
        description="alm: divergence of chunk likelihoods; limit is binary-kl as alm-tau grows, tv total variation.",
        json_schema_extra=DETAILS,
    )
    alm_tau: float = Field(
        100.0,
        gt=0.0,
        allow_inf_nan=False,
        description="alm: tau_b of binary-kl, reverse and tv; the paper takes 100 and 5.",
        json_schema_extra=DETAILS,
    )
    debias: list[str] = Field(
        default=[],
        description="alm: outcome (next token starts with a space, both sides) and merge (join chunks).",
        json_schema_extra=DETAILS,
    )
    alm_threshold: float = Field(
        0.1,
        gt=0.0,
        lt=1.0,
        description="alm: --debias merge ends a chunk above this P(next starts with a space).",
        json_schema_extra=DETAILS,
    )
    prefix: list[str] = Field(
        default=["root", "interior", "child"],
        description="byte-prefix: its terms, any of root, interior, child.",
        json_schema_extra=DETAILS,
    )
    weigh: list[str] = Field(
        default=[],
        description="Weights of chunks by kind, such as one-to-one=1,other=0.25 (one-to-one: one token on either side; "
        "a kind that is not named weighs 1). For losses per chunk.",
        json_schema_extra=DETAILS,
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

    @field_validator("weigh")
    @classmethod
    def _known_kinds(cls, value: list[str]) -> list[str]:
        if not value:
            return value
        weights = _weights_of_kinds(value)
        if not any(weights.values()):
            raise ValueError("all kinds of chunks weigh 0, so nothing would be distilled; make one of them positive")
        return [f"{kind}={weight:g}" for kind, weight in weights.items()]

    @model_validator(mode="after")
    def _kinds_are_known(self) -> "LossOptions":
        if self.weigh and "merge" in self.debias:
            raise ValueError(
                "--debias merge joins chunks of both kinds, which --weigh tells apart; leave one of them out"
            )
        return self

    @property
    def kinds(self) -> tuple[float, float] | None:
        """Weights of one-to-one and of other chunks; None: all weigh the same."""
        if not self.weigh:
            return None
        weights = _weights_of_kinds(self.weigh)
        return weights["one-to-one"], weights["other"]


def _weights_of_kinds(value: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for word in value:
        kind, _, number = word.partition("=")
        if kind not in ("one-to-one", "other") or kind in weights:
            raise ValueError(f"{word!r}: expected one-to-one=NUMBER and other=NUMBER, each at most once")
        try:
            weights[kind] = float(number)
        except ValueError as error:
            raise ValueError(f"{word!r}: expected a number behind '=', as in {kind}=0.25") from error
        if not 0 <= weights[kind] < float("inf"):
            raise ValueError(f"{word!r}: the weight must be a finite number of at least 0")
    return {"one-to-one": weights.get("one-to-one", 1.0), "other": weights.get("other", 1.0)}


class StudentGroup(Config):
    """Which model is trained, and how it runs."""

    student: str | None = Field(
        None, description="Hugging Face id or folder of the student.", json_schema_extra=PLACE | COMMON
    )
    from_scratch: str | None = Field(
        None,
        description="A config.json: train this architecture from random weights instead (goes with --tokenizer).",
        json_schema_extra=PLACE,
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer of a student whose folder holds none, such as 'bytes'.", json_schema_extra=PLACE
    )
    template: str | None = Field(
        None,
        description="Jinja file with the chat template that conversations were aligned with; left out: the student's "
        "own.",
        json_schema_extra=PLACE | AS_HASH,
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    lora: int | None = Field(None, ge=1, description="Train LoRA adapters of this rank (peft) instead of all weights.")
    lora_alpha: float | None = Field(None, gt=0.0, description="LoRA's alpha; twice the rank when left out.")
    lora_embeddings: bool = Field(
        False, description="Under --lora, train the embedding and the head in full: rows of new tokens need it."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...", json_schema_extra=MAY_CHANGE)
    autocast: Literal["auto", "none", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPU, none on CPU.")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Under torchrun: ddp keeps the model on every rank, fsdp (FSDP2) shards it.",
        json_schema_extra=MAY_CHANGE,
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory.", json_schema_extra=MAY_CHANGE
    )
    compile: bool = Field(
        False, description="Compile the student's layers with torch.compile.", json_schema_extra=MAY_CHANGE
    )
    kernel: Literal["auto", "eager", "liger"] = Field(
        "auto",
        description="Kernel of --loss ce on CUDA; auto: Liger where it is installed, else eager blocks.",
        json_schema_extra=MAY_CHANGE,
    )

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of the trained model's weights; auto: what the student's config.json says, else float32. "
        "Training and checkpoints are float32.",
    )

    @model_validator(mode="after")
    def _one_student(self) -> "StudentGroup":
        if (self.student is None) == (self.from_scratch is None):
            raise ValueError("give --student ID or FOLDER, or --from-scratch config.json, not both and not neither")
        if self.from_scratch is not None and self.tokenizer is None:
            raise ValueError("--from-scratch has no tokenizer of its own; give --tokenizer ID, FOLDER or 'bytes'")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("--lora adapts trained weights, and --from-scratch has none; leave one of them out")
        if self.lora_alpha is not None and self.lora is None:
            raise ValueError("--lora-alpha goes with --lora RANK; give it, or leave --lora-alpha out")
        if self.lora_embeddings and self.lora is None:
            raise ValueError("--lora-embeddings goes with --lora RANK; without it all weights are trained in full")
        return self

    @property
    def source(self) -> str:
        """Where the student comes from."""
        return self.student or self.from_scratch or ""

    @property
    def tokenizer_source(self) -> str:
        """Where its tokenizer comes from."""
        return self.tokenizer or self.student or ""


# Tokens of steps and passes where they are left out. A GPU waits for Python in smaller passes; what is paid per pass
# (zeroing the head's gradient, casting weights) is paid the less often the larger they are.
_CPU_SIZES = {"step_tokens": 4096, "micro_tokens": 1024}
_GPU_SIZES = {"step_tokens": 262_144, "micro_tokens": 16_384}


class DataGroup(Config):
    """Which targets are read, and how samples become steps."""

    targets: list[str] = Field(
        description="Folders or URLs written by 'xtoken align', one per teacher, separated by commas.",
        json_schema_extra=ARGUMENT | PLACE | MAY_CHANGE,
    )
    weights: list[float] = Field(
        default=[], description="One weight per target folder, at least 0; scaled to sum to 1. Equal when left out."
    )
    weighting: Literal["static", "ce", "entropy", "confidence"] = Field(
        "static",
        description="static: --weights; else per sample, a softmax over the teachers that hold it of -CE, -entropy or "
        "the largest probability, times --weights.",
    )
    max_tokens: int = Field(1024, ge=8, description="Student tokens per sample; the rest of a sample is cut off.")
    step_tokens: int | None = Field(
        None,
        ge=1,
        description="Student tokens per optimizer step, to the nearest sample; left out: 4,096 on a CPU, 262,144 on "
        "CUDA, or what the run began with.",
        json_schema_extra=COMMON,
    )
    micro_tokens: int | None = Field(
        None,
        ge=1,
        description="Padded student tokens per forward pass; the rest accumulates. Left out: 1,024 on a CPU, 16,384 on "
        "CUDA, or what the run began with.",
        json_schema_extra=MAY_CHANGE,
    )
    batching: Literal["auto", "pack", "pad"] = Field(
        "auto",
        description="pack: several samples in a row that cannot see each other; pad: one sample per row, rows of like "
        "length together; auto: pack where a probe of the model shows that it changes nothing.",
    )
    decoders: int = Field(
        2, ge=1, description="Threads that read and decode targets ahead of the model.", json_schema_extra=MAY_CHANGE
    )
    streams: int | None = Field(
        None,
        ge=1,
        description="Shares of the data that each step takes an equal part of, dealt to ranks; as many as ranks when "
        "left out. The same number gives the same steps on any number of ranks that divides it.",
    )
    seed: int = Field(0, ge=0, description="Seed of the sample order, of dropout and of random weights.")

    @model_validator(mode="after")
    def _weights_fit(self) -> "DataGroup":
        if not self.targets:
            raise ValueError("no target folder named; 'xtoken align' writes one")
        if self.weights and len(self.weights) != len(self.targets):
            raise ValueError(f"--weights has {len(self.weights)} numbers for {len(self.targets)} target folders")
        for weight in self.weights:
            if not 0 <= weight < float("inf"):
                raise ValueError(f"teacher weight {weight:g} must be a number of at least 0")
        if self.weights and sum(self.weights) == 0:
            raise ValueError("the teacher weights sum to 0, so nothing would be distilled; make one of them positive")
        return self


class LossGroup(LossOptions):
    """Which losses train the student, and their options."""

    loss: list[str] = Field(
        default=["p-kl"],
        description="Distillation loss ('xtoken losses' lists them), or one per target folder; ce: the text alone.",
        json_schema_extra=COMMON,
    )
    mix: Literal["fixed", "dynamic", "gradmag"] = Field(
        "fixed",
        description="fixed: kd_weight KD + ce_weight CE; dynamic: KD scaled to the value of CE in each step, + CE; "
        "gradmag: as fixed, with KD scaled until its gradient is as large as that of CE.",
    )
    kd_weight: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="Weight of KD under --mix fixed and gradmag."
    )
    ce_weight: float = Field(
        None,
        ge=0.0,
        allow_inf_nan=False,
        validate_default=True,
        description="Weight of CE, 0: distillation alone. Left out: 0.1 under --mix fixed, 1 under gradmag.",
    )
    gradmag_every: int = Field(
        10,
        ge=1,
        description="Steps between two measurements of gradients for --mix gradmag.",
        json_schema_extra=DETAILS,
    )
    learn_w: bool = Field(False, description="Experimental. p-kl: train W's weights too; its zeros stay.")

    @field_validator("ce_weight", mode="before")
    @classmethod
    def _default_of_the_mix(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        return 1.0 if info.data.get("mix") == "gradmag" else 0.1

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossGroup":
        for name in self.loss:
            if name not in LOSSES:
                raise ValueError(f"loss {name!r} is unknown; choose from {', '.join(LOSSES)}")
        if "ce" in self.loss and len(set(self.loss)) > 1:
            raise ValueError("loss 'ce' has no teacher; leave it out, CE is mixed in by --ce-weight")
        if self.mix != "dynamic" and self.loss != ["ce"] and self.kd_weight == 0:
            raise ValueError("kd_weight=0 trains on nothing but CE; say --loss ce for that")
        if self.mix == "dynamic" and self.ce_weight == 0:
            raise ValueError("--mix dynamic scales KD to CE, so CE cannot weigh 0; use --mix fixed or gradmag")
        for name in self.loss if self.weigh else []:
            if "chunk" not in {column.axis for column in LOSSES[name].columns}:
                kind = "has no chunks" if name == "ce" else "is one per token"
                raise ValueError(f"--weigh weighs chunks, and the loss {name} {kind}; leave --weigh out")
        if "strict" in self.loss and self.kinds is not None and self.kinds[0] == 0:
            raise ValueError(
                "the loss strict learns from one-to-one chunks alone, and --weigh gives them 0; leave one of them out"
            )
        if self.mix != "gradmag" and self.gradmag_every != type(self).model_fields["gradmag_every"].default:
            raise ValueError(f"--gradmag-every goes with --mix gradmag, not {self.mix}; leave it out")
        if self.learn_w and "p-kl" not in self.loss:
            raise ValueError("--learn-w trains the W of p-kl, and no target folder is trained with p-kl")
        return self


class OptimGroup(Config):
    """AdamW and its schedule."""

    steps: int = Field(100, ge=1, description="Optimizer steps.", json_schema_extra=COMMON)
    lr: float = Field(5e-5, gt=0.0, description="Peak learning rate of AdamW.", json_schema_extra=COMMON)
    warmup: int = Field(10, ge=0, description="Steps of linear warm-up; then cosine to a tenth.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW weight decay on matrices.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    clip: float = Field(1.0, gt=0.0, description="Largest gradient norm.")
    freeze_steps: int = Field(
        0,
        ge=0,
        description="Steps at the beginning in which the embedding and the head train alone, so that new rows settle.",
    )
    w_lr: float = Field(1e-2, gt=0.0, description="Peak learning rate of W under --learn-w.")


class CheckpointGroup(Config):
    """What is saved, and when a run goes back or stops."""

    save_every: int | str = Field(
        50,
        description="Steps between checkpoints, or the time between them, such as 10m.",
        json_schema_extra=MAY_CHANGE,
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.", json_schema_extra=MAY_CHANGE)
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Checkpoints at multiples of this many steps stay for good.",
        json_schema_extra=MAY_CHANGE,
    )
    spike: float = Field(
        20.0,
        ge=0.0,
        description="Stop when KD or CE lies this many deviations above its median of the last 50 steps; 0: only when "
        "it is NaN or inf.",
        json_schema_extra=MAY_CHANGE,
    )
    rollback: int = Field(
        0,
        ge=0,
        description="Go back to the last checkpoint and leave out the step at fault, this many times, before stopping.",
        json_schema_extra=MAY_CHANGE,
    )

    _steps_or_time = field_validator("save_every", mode="before")(steps_or_time)

    def due(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is due after ``step``, the last one having begun so many seconds ago."""
        wait = self.save_seconds
        if wait is None:
            return step % int(self.save_every) == 0
        return seconds >= wait or (self.keep_every is not None and step % self.keep_every == 0)

    @property
    def save_seconds(self) -> int | None:
        """The time between checkpoints; None where they are so many steps apart."""
        return seconds_of(self.save_every)


class ReportGroup(Config):
    """Held-out figures and where they go."""

    eval_text: str | None = Field(
        None,
        description="Held-out text or conversations, a corpus: bits per byte before and after.",
        json_schema_extra=PLACE | COMMON,
    )
    eval_id_field: str | None = Field(
        None,
        description="Field of --eval-text that holds the document's id, whose part before the last '/' is its source.",
    )
    eval_targets: str | None = Field(
        None,
        description="Held-out targets: KL to the teacher and agreement before and after.",
        json_schema_extra=PLACE | COMMON,
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations on held-out data.", json_schema_extra=MAY_CHANGE
    )
    completions: int = Field(
        4,
        ge=0,
        description="Held-out samples whose beginning the student completes before and after, or whose question it "
        "answers.",
        json_schema_extra=MAY_CHANGE,
    )
    tensorboard: bool = Field(
        False, description="Also write events for TensorBoard into OUT/tensorboard.", json_schema_extra=MAY_CHANGE
    )
    wandb: str | None = Field(
        None, description="Also log to this project of Weights & Biases.", json_schema_extra=MAY_CHANGE
    )


class TrainConfig(Config):
    """Train a student from stored targets; no teacher is needed."""

    out: str = Field(
        description="Folder for checkpoints, metrics.jsonl and the trained model; reruns resume.",
        json_schema_extra=OUT_FOLDER | COMMON | MAY_CHANGE,
    )
    student: StudentGroup
    data: DataGroup
    loss: LossGroup
    optim: OptimGroup = Field(title="Optimisation")
    checkpoint: CheckpointGroup = Field(title="Checkpoints")
    report: ReportGroup

    @model_validator(mode="after")
    def _groups_fit(self) -> "TrainConfig":
        named, folders = len(self.loss.loss), len(self.data.targets)
        if named not in (1, folders):
            raise ValueError(f"--loss names {named} losses for {folders} target folders; give one, or one each")
        if self.optim.freeze_steps and self.student.lora is not None and not self.student.lora_embeddings:
            raise ValueError(
                "--freeze-steps trains the embedding and the head first, which --lora leaves as they are; give "
                "--lora-embeddings too"
            )
        if self.loss.learn_w and self.student.parallel == "fsdp":
            raise ValueError("--learn-w goes with --parallel ddp; W is not a part of the model that fsdp shards")
        return self

    def sized(self, device: str, begun: Mapping[str, Any] | None = None) -> "TrainConfig":
        """With what was left out of --step-tokens and --micro-tokens.

        Args:
            device: ``cpu``, ``cuda`` or another type of torch's.
            begun: the settings that the run began with, if it has begun; they are its own wherever it goes on.
        """
        usual = _GPU_SIZES if device == "cuda" else _CPU_SIZES
        took = {name: (begun or {}).get(name) or usual[name] for name in usual if getattr(self.data, name) is None}
        return self.changed(**took) if took else self

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of a step and of a pass, of a configuration that is ``sized``."""
        step, micro = self.data.step_tokens, self.data.micro_tokens
        assert step is not None, "a run knows its device"
        assert micro is not None, "a run knows its device"
        return step, micro

    @classmethod
    def settings_of(cls, record: dict[str, Any]) -> dict[str, Any] | None:
        """See ``Config``: run.json of a training run."""
        config = record.get("config")
        return config if "identity" in record and isinstance(config, dict) else None

    @property
    def losses(self) -> list[str]:
        """One loss per target folder."""
        named = self.loss.loss
        return named * len(self.data.targets) if len(named) == 1 else list(named)
