"""Configuration of the verbs that make a capture; see ``xtoken.schemas.configs.artifacts``."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from xtoken.schemas.chat import Learned
from xtoken.schemas.codecs import CODECS, CodecSettings, foreign_fields, known_codec, settings_of
from xtoken.schemas.configs.base import (
    AS_HASH,
    COMMON,
    IN_PLAN,
    MAY_CHANGE,
    OUT_FOLDER,
    OUT_LOG,
    PLACE,
    ROWS,
    Config,
    a_day,
    argument,
    arguments_of,
    named_values,
    ray_address,
)
from xtoken.schemas.word_starts import SpaceSet

CorpusForm = Literal["auto", "text", "messages", "sharegpt", "prompt", "alpaca", "ids"]
TRAIN, ALL, ONLY = "train", "all", "only"
PILOT_TOKENS = 2000
# Kinds of spans that are always taught, and those that are on demand.
_LEARNED: tuple[Learned, ...] = ("assistant", "call", "stop")
_MORE_LEARNED: tuple[Learned, ...] = ("thinking",)
# Words for splits, as Hugging Face's datasets finds them in names of files.
_SPLITS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_named(word: str) -> str | None:
    """The split that a word means; None if it means none."""
    return next((split for split, words in _SPLITS.items() if word in words), None)


class CorpusConfig(Config):
    """Which documents are read, and what happens to bad ones."""

    corpus: str = argument(
        "File, folder or fsspec URL: .jsonl[.zst|.gz], .parquet, .arrow, .txt, .md, or a saved Hugging Face dataset.",
        PLACE | IN_PLAN,
    )
    text_field: str = Field("text", description="Field or column that holds the text.", json_schema_extra=IN_PLAN)
    form: CorpusForm = Field("text", description="What the corpus holds.", json_schema_extra=IN_PLAN)
    id_field: str | None = Field(
        None,
        description="Field with a unique document id; else file name and record number.",
        json_schema_extra=COMMON | IN_PLAN,
    )
    split: list[str] = Field(
        default=[TRAIN],
        description="Files of a folder that are read: train (and those that name no split), validation, test, all; "
        "only: whichever split there is, if it is one.",
        json_schema_extra=IN_PLAN,
    )
    limit: int | None = Field(None, ge=1, description="Read only the first N documents.", json_schema_extra=IN_PLAN)
    on_bad: Literal["stop", "skip"] = Field(
        "stop",
        description="A bad document stops the run, or is counted and skipped.",
        json_schema_extra=IN_PLAN,
    )

    @field_validator("split")
    @classmethod
    def _known_splits(cls, value: list[str]) -> list[str]:
        known = [*_SPLITS, ALL, ONLY]
        found = [split_named(word) or word for word in value]
        for word in found or [""]:
            if word not in known:
                raise ValueError(
                    f"{word!r} is none of {', '.join(known)}; any other file or folder is read by its name"
                )
        return sorted(set(found), key=known.index)


class CorpusGroup(CorpusConfig):
    """The corpus of a capture."""

    form: CorpusForm = Field(
        "auto",
        description="What the corpus holds: text, conversations as messages, sharegpt, prompt or alpaca, or token ids; "
        "auto: as its columns say, and text where there is a --text-field.",
        json_schema_extra=IN_PLAN,
    )
    on_rendered: Literal["stop", "text"] = Field(
        "stop",
        description="Text that looks rendered by a chat template, by the teacher's control tokens in it, stops the run "
        "or is taken as text.",
        json_schema_extra=MAY_CHANGE,
    )


class TeacherGroup(Config):
    """Which model is the teacher, and how its engine runs."""

    teacher: str = Field(description="Hugging Face id or folder of the teacher.", json_schema_extra=PLACE | COMMON)
    backend: Literal["hf", "vllm", "server", "fake"] = Field(
        "hf", description="Engine that runs the teacher; server: 'vllm serve', see --server.", json_schema_extra=COMMON
    )
    server: list[str] = Field(
        default=[],
        description="server: addresses of 'vllm serve' that serve the teacher, such as https://HOST:8000, by commas; a "
        "key goes into XTOKEN_SERVER_KEY.",
        json_schema_extra=MAY_CHANGE,
    )
    served_as: str | None = Field(
        None, description="server: the teacher's name there, where it is not --teacher.", json_schema_extra=MAY_CHANGE
    )
    server_requests: int = Field(
        16, ge=1, le=256, description="server: requests of one worker at a time.", json_schema_extra=MAY_CHANGE
    )
    insecure: bool = Field(
        False,
        description="server: allow http:// to another machine, where texts and key are in the clear.",
        json_schema_extra=MAY_CHANGE,
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="Show the teacher BOS first; auto: as its tokenizer does."
    )
    tensor_parallel: int = Field(
        1, ge=1, description="vllm: GPUs of one machine that share one teacher.", json_schema_extra=MAY_CHANGE
    )
    gpu_memory: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="vllm: share of a GPU's memory that one engine may take; left out: all but what logits need.",
        json_schema_extra=MAY_CHANGE,
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Teacher tokens per forward call; left out: 2,048 on a CPU, 16,384 on CUDA, or what the run began "
        "with.",
        json_schema_extra=MAY_CHANGE,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on GPU."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...", json_schema_extra=MAY_CHANGE)
    revision: str | None = Field(None, description="Revision of a hub model.")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model.", json_schema_extra=MAY_CHANGE
    )

    def of_slot(self, slot: int) -> "TeacherGroup":
        """With the one of several servers that the worker of a slot asks."""
        if len(self.server) < 2:
            return self
        return self.model_copy(update={"server": [self.server[slot % len(self.server)]]})

    @property
    def takes_gpus(self) -> bool:
        """Whether workers run the model themselves, and so may take GPUs for it."""
        return self.backend in ("hf", "vllm")

    def batch_on(self, device: str) -> int:
        """``batch_tokens``, or what a device takes: ``cpu``, or a GPU, which waits for Python in smaller calls."""
        return self.batch_tokens or (2048 if device == "cpu" else 16_384)

    @model_validator(mode="after")
    def _parallel_where_it_exists(self) -> "TeacherGroup":
        if self.tensor_parallel > 1 and self.backend != "vllm":
            raise ValueError(f"tensor_parallel={self.tensor_parallel} needs --backend vllm; {self.backend} has none")
        return self

    @model_validator(mode="after")
    def _server_where_it_is_asked(self) -> "TeacherGroup":
        if self.backend == "server" and not self.server:
            raise ValueError("--backend server needs --server https://HOST:PORT, where 'vllm serve' runs")
        given = {"--server": self.server, "--served-as": self.served_as, "--insecure": self.insecure}
        for flag in [name for name, value in given.items() if value and self.backend != "server"]:
            raise ValueError(
                f"{flag} is for --backend server, not {self.backend}; leave it out, or say --backend server"
            )
        return self

    @model_validator(mode="after")
    def _memory_where_it_is_taken(self) -> "TeacherGroup":
        if self.gpu_memory is not None and self.backend != "vllm":
            raise ValueError(f"gpu_memory={self.gpu_memory:g} is for --backend vllm, not {self.backend}; leave it out")
        return self


class CodecGroup(Config):
    """What is kept of each teacher distribution, and of which texts."""

    codec: str = Field(
        "topk",
        description="topk serves every loss; sampled (of full distributions) is unbiased for p-kl, sparse-kl and the "
        "root of byte-prefix.",
        json_schema_extra={"choices": list(CODECS)},
    )
    k: int = Field(64, ge=1, le=255, description="topk: keep at most K entries per position.", json_schema_extra=COMMON)
    min_p: float = Field(
        0.003,
        ge=0.0,
        lt=1.0,
        description="topk: keep entries of at least this probability (and always one).",
    )
    draws: int = Field(50, ge=1, le=1000, description="sampled: samples per position.")
    seed: int = Field(
        0, ge=0, description="sampled and --generate: what is drawn follows from it and the tokens before."
    )
    max_tokens: int = Field(
        512,
        ge=8,
        description="Most teacher tokens per sample; longer documents are cut into windows.",
        json_schema_extra=COMMON,
    )
    space: SpaceSet = Field(
        "space",
        description="What P(a word begins) sums, for ALM's --debias: tokens that start with a space, or paper: with a "
        "space, tab or newline, and control tokens.",
    )
    text: bool = Field(
        True,
        description="Store the text in the capture; without it, align needs --corpus. Conversations are always stored.",
    )
    temperatures: list[float] = Field(
        default=[],
        description="Also store the exact normaliser of full distributions at these temperatures, such as 2,4.",
    )

    @model_validator(mode="after")
    def _min_p_must_leave_room(self) -> "CodecGroup":
        if self.min_p * self.k > 1 and self.min_p > 0.5:
            raise ValueError(
                f"min_p={self.min_p} keeps at most one entry whatever k is; use --k 1 or a smaller --min-p"
            )
        return self

    _known_codec = field_validator("codec")(known_codec)

    @property
    def settings(self) -> CodecSettings:
        """``TopK(k, min_p, temperatures)``, ``Sampled(draws, seed)``, or what ``codec`` has, from the fields here."""
        return settings_of(self.codec, {name: getattr(self, name) for name in CodecGroup.model_fields})

    @model_validator(mode="after")
    def _flags_of_one_codec(self) -> "CodecGroup":
        others = foreign_fields(self.codec)
        if self.temperatures and "temperatures" in others:
            named = ",".join(f"{tau:g}" for tau in self.temperatures)
            raise ValueError(
                f"--codec {self.codec} stores rows at temperature 1 only, so --temperatures {named} needs --codec topk"
            )
        for name in others:
            if name != "seed" and getattr(self, name) != type(self).model_fields[name].default:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{flag} means nothing to --codec {self.codec}; leave one of them out")
        return self

    @field_validator("temperatures")
    @classmethod
    def _positive_temperatures(cls, value: list[float]) -> list[float]:
        for tau in value:
            if not 0 < tau < float("inf"):
                raise ValueError(f"a temperature of {tau:g} divides by nothing; give numbers above 0, such as 2,4")
        return sorted(set(value) - {1.0})


class ChatGroup(Config):
    """How conversations become samples."""

    turns: Literal["all", "last", "each"] = Field(
        "all",
        description="Answers of a conversation that are taught: all in one sample, the last, or each in a sample of "
        "its own (right for templates that drop earlier reasoning).",
    )
    long: Literal["cut", "skip"] = Field(
        "cut",
        description="A conversation of more than --max-tokens loses its last messages, back to an answer that fits, or "
        "is skipped; --turns last and each: it is skipped.",
    )
    learn: list[str] = Field(
        default=[], description="What is taught beside answers, tool calls and their ends: thinking (reasoning)."
    )
    template: str | None = Field(
        None,
        description="Jinja file with the chat template; left out: the teacher's own.",
        json_schema_extra=PLACE | AS_HASH,
    )
    template_arg: list[str] = Field(
        default=[], description="Variables of the chat template, such as enable_thinking=false."
    )
    date: str | None = Field(
        None,
        description="What a chat template takes for today, such as 2026-07-04; left out: the day of the plan.",
        json_schema_extra=IN_PLAN,
    )

    tokenizer: str | None = Field(
        None,
        description="Whose the ids of --form ids are: a model or tokenizer, which must be the teacher's.",
        json_schema_extra=PLACE | MAY_CHANGE,
    )
    generate: int | None = Field(
        None,
        ge=1,
        description="The teacher answers conversations that end with a user's message itself, with at most so many "
        "tokens; rows are of its answers.",
    )
    temperature: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="Of --generate; 0: the most probable token each time."
    )
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Of --generate: draw from the most probable tokens of so much mass."
    )
    samples: int = Field(1, ge=1, le=1000, description="Of --generate: answers to each prompt.")

    @model_validator(mode="after")
    def _of_answers(self) -> "ChatGroup":
        for name in ("temperature", "top_p", "samples"):
            if self.generate is None and getattr(self, name) != type(self).model_fields[name].default:
                shown = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise ValueError(f"{shown} is for answers that the teacher writes; say --generate too, or leave it out")
        if self.generate is not None and self.turns != "all":
            raise ValueError(f"--turns {self.turns} means nothing to --generate, which teaches the new answer alone")
        return self

    @field_validator("learn")
    @classmethod
    def _known_kinds(cls, value: list[str]) -> list[str]:
        for word in value:
            if word not in _MORE_LEARNED:
                raise ValueError(f"{word!r} is not taught on demand; known is {', '.join(_MORE_LEARNED)}")
        return sorted(set(value))

    _named_values = field_validator("template_arg")(named_values)

    _a_day = field_validator("date")(a_day)

    @property
    def learned(self) -> list[Learned]:
        """Kinds of spans that are taught."""
        return [*_LEARNED, *(kind for kind in _MORE_LEARNED if kind in self.learn)]

    @property
    def arguments(self) -> dict[str, Any]:
        """Variables of the template."""
        return arguments_of(self.template_arg)


class WorkGroup(Config):
    """How a corpus is divided among workers."""

    workers: int | None = Field(
        None,
        ge=1,
        description="Workers, one engine each; left out: 1, or as many as a Ray cluster has GPUs for.",
        json_schema_extra=MAY_CHANGE,
    )
    shard_bytes: int = Field(
        1 << 20, ge=1, description="Text per shard in bytes: what one crash can cost.", json_schema_extra=IN_PLAN
    )


class RunGroup(WorkGroup):
    """Where workers run, what they check of themselves, and what a run says."""

    ray: str | None = Field(
        None,
        description="Run workers on Ray: local (started here), auto (the cluster this runs on), or HOST:PORT.",
        json_schema_extra=COMMON | MAY_CHANGE,
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0.0,
        description="GPUs that Ray gives a worker, such as 0.5; left out: --tensor-parallel, or 0 on CPU.",
        json_schema_extra=MAY_CHANGE,
    )
    lease_seconds: float = Field(
        900.0,
        gt=0.0,
        allow_inf_nan=False,
        description="A worker without progress for so long loses its shards.",
        json_schema_extra=MAY_CHANGE,
    )
    cell: str | None = Field(
        None,
        description="I/N: run only every Nth shard, from the Ith; N independent runs may fill one --out.",
        json_schema_extra=MAY_CHANGE,
    )
    audit: Literal["path", "hf", "none"] = Field(
        "path",
        description="A sample of stored rows is rescored: path (by each worker, a second code path of its engine), hf "
        "(by one worker, transformers).",
        json_schema_extra=MAY_CHANGE,
    )
    audit_rows: int = Field(
        200, ge=1, description="Rows that each worker's audit looks at, at least.", json_schema_extra=MAY_CHANGE
    )
    dry_run: bool = Field(
        False,
        description="Print the plan with tokens, bytes, hours and cost; write nothing.",
        json_schema_extra=COMMON | MAY_CHANGE,
    )
    gpu_price: float | None = Field(
        None,
        ge=0.0,
        description="Price of one GPU hour, for the cost under --dry-run.",
        json_schema_extra=MAY_CHANGE,
    )
    pilot: bool = Field(
        False,
        description="With --dry-run: also show what its pilot found: bytes of each column, 95 % intervals, what the "
        "codec keeps.",
        json_schema_extra=MAY_CHANGE,
    )
    pilot_tokens: int = Field(
        PILOT_TOKENS,
        ge=1,
        description="With --dry-run: teacher tokens that are really scored, taken evenly from the corpus.",
        json_schema_extra=MAY_CHANGE,
    )
    like: str | None = Field(
        None,
        description="With --dry-run: take bytes from this capture and run no teacher; speed is then unknown.",
        json_schema_extra=PLACE | MAY_CHANGE,
    )
    log: str | None = Field(
        None,
        description="File for one JSON line per event; left out: log.jsonl in a local --out, none elsewhere.",
        json_schema_extra=OUT_LOG | MAY_CHANGE,
    )

    @property
    def cells(self) -> tuple[int, int]:
        """(which, of how many), counted from 0; (0, 1) is the whole."""
        if self.cell is None:
            return 0, 1
        which, _, count = self.cell.partition("/")
        return int(which) - 1, int(count)

    @field_validator("cell")
    @classmethod
    def _one_of_many(cls, value: str | None) -> str | None:
        if value is None:
            return None
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"{value!r} is not a cell; write 1/8, 2/8, ... 8/8")
        return value

    @field_validator("log")
    @classmethod
    def _can_be_appended_to(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(f"{value!r} is not a local file, and nothing can be appended to others; name a local one")
        return value

    _an_address = field_validator("ray")(ray_address)

    @model_validator(mode="after")
    def _a_price_is_for_a_plan(self) -> "RunGroup":
        if self.gpu_price is not None and not self.dry_run:
            raise ValueError(
                f"--gpu-price {self.gpu_price:g} is for the cost under --dry-run; say that too, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_pilot_is_for_a_plan(self) -> "RunGroup":
        for name in ("pilot", "pilot_tokens", "like"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not self.dry_run:
                shown = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                raise ValueError(f"{shown} is for --dry-run; say that too, or leave it out")
        return self

    @model_validator(mode="after")
    def _gpus_are_rays(self) -> "RunGroup":
        if self.gpus_per_worker is not None and self.ray is None:
            raise ValueError("gpus_per_worker is for Ray; say --ray too, or CUDA_VISIBLE_DEVICES without it")
        if self.gpus_per_worker is not None and self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker:g}: only less than one GPU can be a fraction")
        return self


class RowsConfig(Config):
    """What decides the distributions of a capture."""

    corpus: CorpusGroup
    teacher: TeacherGroup
    codec: CodecGroup = Field(title="Rows")
    chat: ChatGroup = Field(title="Conversations")

    @model_validator(mode="after")
    def _seed_of_something(self) -> "RowsConfig":
        if self.codec.seed and "seed" in foreign_fields(self.codec.codec) and self.chat.generate is None:
            raise ValueError(
                f"--seed {self.codec.seed} means nothing to --codec {self.codec.codec}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> "RowsConfig":
        if self.chat.generate is not None and self.chat.generate >= self.codec.max_tokens:
            raise ValueError(
                f"--generate {self.chat.generate} leaves no room for a prompt within --max-tokens "
                f"{self.codec.max_tokens}; raise --max-tokens"
            )
        return self

    @classmethod
    def settings_of(cls, record: dict[str, Any]) -> dict[str, Any] | None:
        """See ``Config``: run.json of a capture, which knows neither its corpus nor where a student's tokenizer is."""
        if not {"tokenizer_hash", "teacher", "backend"} <= record.keys():
            return None
        derived = ("schema_version", "tokenizer_hash", "step", "student_hash", "template_hash", "student_template_hash")
        settings = {name: value for name, value in record.items() if name not in derived and value is not None}
        if "answer_seed" in settings:
            settings["seed"] = settings.pop("answer_seed")
        bos = settings.get("bos")
        return settings | ({"bos": "always" if bos else "never"} if isinstance(bos, bool) else {})


class PrecomputeConfig(RowsConfig):
    """Run a teacher over a corpus and store its distributions: the most probable entries, or samples."""

    student: str | None = Field(
        None,
        description="Tokenizer of an intended student: checked on every sample while the teacher runs.",
        json_schema_extra=PLACE | ROWS | AS_HASH,
    )
    out: str = Field(
        "",
        description="Folder or URL of the capture; the same command resumes. Several teachers: a folder each below. "
        "Needed but for --dry-run, which without it counts all of the corpus as left.",
        json_schema_extra=OUT_FOLDER | MAY_CHANGE,
    )
    run: RunGroup

    @model_validator(mode="after")
    def _somewhere_to_write(self) -> "PrecomputeConfig":
        if not self.out and not self.run.dry_run:
            raise ValueError("--out is missing; name a folder or URL for the capture, or say --dry-run")
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> "PrecomputeConfig":
        given, parallel = self.run.gpus_per_worker, self.teacher.tensor_parallel
        if given is not None and 0 < given < parallel > 1:
            raise ValueError(f"gpus_per_worker={given:g} is less than tensor_parallel={parallel}; leave it out")
        return self


class EstimateConfig(RowsConfig):
    """The same as 'xtoken precompute --dry-run --pilot', which replaces it."""

    run: WorkGroup
    pilot_tokens: int = Field(PILOT_TOKENS, ge=1, description="Teacher tokens that are really scored.")
    like: str | None = Field(None, description="Take bytes from this capture; run no teacher.", json_schema_extra=PLACE)


class StatusConfig(Config):
    """Say how a capture gets on, from any shell or machine that can read it."""

    path: str = argument("Folder or URL of a capture that is being made, or was.")
    watch: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="Look again every so many seconds, until the run ends."
    )
