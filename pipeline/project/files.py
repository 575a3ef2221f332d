"""The projection folder: w.parquet, unreached.parquet, manifest.json."""

import hashlib
import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.project.build import build_w
from pipeline.project.coverage import coverage
from pipeline.project.projection import TO_REST, Projection
from pipeline.store.files import Folder
from schemas.config import ProjectConfig
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import MANIFEST, ProjectionManifest, TokenizerInfo, provenance, read_manifest
from schemas.progress import Progress
from schemas.tables import UNREACHED, W

if TYPE_CHECKING:
    from pipeline.tokens import TokenTable

W_FILE = "w.parquet"
UNREACHED_FILE = "unreached.parquet"
_OPTIONS = {"rules": "exact, pieces 0.9 * 0.1^i of 4, roles"}


def project(config: ProjectConfig, progress: Progress) -> ProjectionManifest:
    """Build W for the pair and write its folder; the same command again gives the same files.

    Raises:
        XtokenError: a tokenizer cannot be loaded, or the folder holds something else.
    """
    progress.start("project", 3, "steps")
    student, teacher = _tables(config)
    refuse_other_projection(config.out, student.info, teacher.info)
    progress.advance(1)
    projection = build_w(student, teacher)
    progress.advance(1)
    manifest = ProjectionManifest(
        **provenance(),
        student=student.info,
        teacher=teacher.info,
        options=_OPTIONS,
        coverage=coverage(projection, student, teacher),
        files=write_tables(config.out, projection),
    )
    Folder(config.out).replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    progress.advance(1)
    progress.finish()
    return manifest


def _tables(config: ProjectConfig) -> "tuple[TokenTable, TokenTable]":
    from pipeline.store import load_vocab
    from pipeline.tokens import load_tokenizer

    student = load_tokenizer(config.student).table
    folder = Folder(config.teacher)
    if folder.exists("vocab.parquet"):
        return student, load_vocab(config.teacher)
    return student, load_tokenizer(config.teacher).table


def refuse_other_projection(root: str, student: TokenizerInfo, teacher: TokenizerInfo) -> None:
    """Raise XtokenError when ``root`` holds another artifact or the W of another pair."""
    if not Folder(root).exists(MANIFEST):
        return
    found = read_manifest(root, ProjectionManifest)
    for side, old, new in (("student", found.student, student), ("teacher", found.teacher, teacher)):
        if old.hash != new.hash:
            raise XtokenError(
                f"{root} holds W for another {side} tokenizer: {old.name} ({old.hash[:12]}), "
                f"not {new.name} ({new.hash[:12]}); give another --out"
            )


def write_tables(root: str, projection: Projection) -> dict[str, str]:
    """Write w.parquet and unreached.parquet under ``root``; returns their sha256 by name."""
    w, unreached = projection.tables()
    return {W_FILE: write_table(root, W_FILE, w), UNREACHED_FILE: write_table(root, UNREACHED_FILE, unreached)}


def write_table(root: str, name: str, table: pa.Table) -> str:
    """Write a small table whole under ``root/name``; returns its sha256."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    folder = Folder(root)
    folder.make("")
    folder.replace(name, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def read_projection(root: str) -> Projection:
    """Read a folder written by ``project``.

    Raises:
        VerificationError: a table is missing, is not what the manifest's sha256 says, or has other columns or ids.
        XtokenError: the folder holds no projection.
    """
    manifest = read_manifest(root, ProjectionManifest)
    folder = Folder(root)
    w = _verified(folder, W_FILE, manifest.files, W)
    unreached = _verified(folder, UNREACHED_FILE, manifest.files, UNREACHED)
    found = Projection.from_tables(w, unreached, manifest.student, manifest.teacher)
    _check_ids(root, found)
    return found


def _check_ids(root: str, found: Projection) -> None:
    for name, ids, low, size in (
        ("student_id", found.student_id, 0, found.student.size),
        ("teacher_id", found.teacher_id, 0, found.teacher.size),
        ("unreached", found.unreached, 0, found.teacher.size),
        ("moved_to", found.moved_to, TO_REST, found.teacher.size),
    ):
        if len(ids) and (ids.min() < low or ids.max() >= size):
            raise VerificationError(f"W in {root} has a {name} outside its vocabulary; build it again")


def _verified(folder: Folder, name: str, sha256: dict[str, str], schema: pa.Schema) -> pa.Table:
    way_out = "build it again with 'xtoken project'"
    try:
        data: Any = folder.read(name)
    except FileNotFoundError as error:
        raise VerificationError(f"{folder.url(name)} is missing; {way_out}") from error
    if hashlib.sha256(data).hexdigest() != sha256.get(name):
        raise VerificationError(f"{folder.url(name)} does not have the sha256 its manifest states; {way_out}")
    table = pq.read_table(io.BytesIO(data))
    if not table.schema.equals(schema):
        raise VerificationError(f"{folder.url(name)} has columns {table.schema.names}, not those of W; {way_out}")
    return table
