"""The projection folder: w.parquet, unreached.parquet, manifest.json and coverage.html."""

import hashlib
import io
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.project.coverage import Audit, coverage
from xtoken.pipeline.project.mass import teacher_mass
from xtoken.pipeline.project.page import coverage_page
from xtoken.pipeline.project.projection import TO_REST, Projection
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.artifacts import ProjectConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_limits import read_whole, reading
from xtoken.schemas.manifest import MANIFEST, ProjectionManifest, TokenizerInfo, provenance, read_manifest
from xtoken.schemas.tables import UNREACHED, W
from xtoken.schemas.ui.progress import Progress

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

W_FILE = "w.parquet"
UNREACHED_FILE = "unreached.parquet"
PAGE_FILE = "coverage.html"


def project(config: ProjectConfig, progress: Progress) -> ProjectionManifest:
    """Build W for the pair and write its folder; the same command again gives the same files.

    Raises:
        XtokenError: a tokenizer cannot be loaded, or the folder holds something else.
    """
    progress.start("project", 4, "steps")
    student, teacher, capture = _tables(config)
    options = {"rule": config.rule, **({"seed": config.seed} if config.rule == "random" else {})}
    refuse_other_projection(config.out, student.info, teacher.info, options)
    progress.advance(1)
    projection = build_w(student, teacher, config.rule, config.seed)
    progress.advance(1)
    mass = teacher_mass(config.teacher, config.mass_rows) if capture else None
    progress.advance(1)
    audit = Audit.of(projection, student, teacher, mass)
    manifest = write_projection(config.out, projection, options, coverage(audit))
    page = coverage_page(audit, manifest.coverage, config.rule)
    Folder(config.out).replace(PAGE_FILE, page.encode())
    progress.advance(1)
    progress.finish()
    return manifest


def _tables(config: ProjectConfig) -> "tuple[TokenTable, TokenTable, bool]":
    """Both vocabularies, and whether the teacher's is that of a capture."""
    from xtoken.pipeline.store.reader import load_vocab
    from xtoken.pipeline.tokens import load_tokenizer

    student = load_tokenizer(config.student).table
    if Folder(config.teacher).exists("vocab.parquet"):
        return student, load_vocab(config.teacher), True
    return student, load_tokenizer(config.teacher).table, False


def refuse_other_projection(root: str, student: TokenizerInfo, teacher: TokenizerInfo, options: dict[str, Any]) -> None:
    """Raise XtokenError when ``root`` holds anything else, or the W of another pair or rule."""
    if not Folder(root).exists(MANIFEST):
        _refuse_foreign(root)
        return
    manifest = read_manifest(root, ProjectionManifest)
    for side, old, new in (("student", manifest.student, student), ("teacher", manifest.teacher, teacher)):
        if old.hash != new.hash:
            raise XtokenError(
                f"{root} holds W for another {side} tokenizer: {old.name} ({old.hash[:12]}), "
                f"not {new.name} ({new.hash[:12]}); give another --out"
            )
    for name, default in (("rule", "pieces"), ("seed", 0)):
        there, now = manifest.options.get(name, default), options.get(name, default)
        if there != now:
            raise XtokenError(f"{root} holds W built with {name} {there}, not {now}; give another --out")


def _refuse_foreign(root: str) -> None:
    """Raise XtokenError when there is more than a killed run may have left before its manifest."""
    own = (W_FILE, UNREACHED_FILE)
    foreign = [name for name in Folder(root).names() if name not in own and not name.endswith(".tmp")]
    if foreign:
        raise XtokenError(f"{root} holds {foreign[0]} and no {MANIFEST}: no project run wrote it; give another --out")


def write_projection(
    root: str, projection: Projection, options: dict[str, Any], figures: dict[str, Any]
) -> ProjectionManifest:
    """Write the tables of W, then the manifest that vouches for them."""
    manifest = ProjectionManifest(
        **provenance(),
        student=projection.student,
        teacher=projection.teacher,
        options=options,
        coverage=figures,
        files=write_tables(root, projection),
    )
    Folder(root).replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


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
    return read_tables(root, manifest.files, manifest.student, manifest.teacher)


def read_tables(root: str, sha256: dict[str, str], student: TokenizerInfo, teacher: TokenizerInfo) -> Projection:
    """W from the folder of a projection or of targets; its files must have these sha256.

    Raises:
        VerificationError: a table is missing, is another file, or has other columns or ids.
    """
    folder = Folder(root)
    w = _verified(folder, W_FILE, sha256, W)
    unreached = _verified(folder, UNREACHED_FILE, sha256, UNREACHED)
    projection = Projection.from_tables(w, unreached, student, teacher)
    _check_ids(root, projection)
    return projection


def _check_ids(root: str, projection: Projection) -> None:
    for name, ids, low, size in (
        ("student_id", projection.student_id, 0, projection.student.size),
        ("teacher_id", projection.teacher_id, 0, projection.teacher.size),
        ("unreached", projection.unreached, 0, projection.teacher.size),
        ("moved_to", projection.moved_to, TO_REST, projection.teacher.size),
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
    with reading(folder.url(name), way_out):
        table = read_whole(io.BytesIO(data), folder.url(name))
    if not table.schema.equals(schema):
        raise VerificationError(f"{folder.url(name)} has columns {table.schema.names}, not those of W; {way_out}")
    return table
