"""One sample of a capture, with its targets where there are any: read, checked, and nothing else of either."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from xtoken.pipeline.html.visible import Piece, visible
from xtoken.pipeline.page.find import WORST, find, find_worst, read_sample
from xtoken.pipeline.page.turns import spans_of
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.rows import Unpacked
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import LeftOut, without_rows
from xtoken.pipeline.store.reader import ids_of_codes, load_vocab, read_side_table, target_form
from xtoken.schemas.configs.artifacts import InspectConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.losses import LOSSES, LossColumn, loss_columns
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, content_hash, read_any_manifest, read_manifest
from xtoken.schemas.spans import row_of_token
from xtoken.schemas.tables import VOCAB, target_columns

if TYPE_CHECKING:
    from xtoken.pipeline.project.projection import Projection

STUDENT_VOCAB_FILE = "student_vocab.parquet"


@dataclass(frozen=True)
class Vocabulary:
    """What tokens are shown as: their bytes and roles, by id."""

    pieces: list[bytes]
    role: list[str | None]

    def shown(self, token: int) -> Piece:
        """A token's bytes made visible; its role where it has none."""
        data = self.pieces[token]
        return visible(data) if data else ["", f"<{self.role[token] or 'empty'}>"]


@dataclass(frozen=True)
class Targets:
    """A sample's targets.

    Attributes:
        row: columns of ``xtoken.schemas.tables.targets``.
        projection: the W they were built with; None where no loss needs it.
    """

    manifest: TargetManifest
    row: dict[str, Any]
    student: Vocabulary
    projection: "Projection | None"


@dataclass(frozen=True)
class Sample:
    """A sample to draw.

    Attributes:
        row: columns of ``xtoken.schemas.tables.capture`` but those of the rows.
        row_of_token: the row of each token; -1: none.
        rows: the teacher's, decoded; None where a subset left them out.
        targets: None of a capture alone.
    """

    manifest: CaptureManifest
    row: dict[str, Any]
    row_of_token: list[int]
    rows: Unpacked | None
    teacher: Vocabulary
    targets: Targets | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return "span_kind" in self.row

    @property
    def taught_bytes(self) -> int:
        """Bytes of the spans that are taught; of plain text all."""
        if not self.is_chat:
            return int(self.row["teacher_end"][-1])
        return sum(span.byte_end - span.byte_start for span in spans_of(self.row) if span.learn)


def load_sample(config: InspectConfig) -> Sample:
    """The sample that ``config.html`` names, ``worst`` being the one with most bits per byte.

    Raises:
        XtokenError: no such sample, no capture, targets without theirs, or with another capture than theirs.
        VerificationError: what is read is not what the manifests say.
    """
    assert config.html is not None, "nothing to draw"
    manifest = read_any_manifest(config.path)
    if isinstance(manifest, CaptureManifest):
        if config.capture is not None:
            raise XtokenError(f"{config.path} is a capture itself; leave --capture out, or give the targets' folder")
        name = find_worst(config.path, manifest) if config.html == WORST else config.html
        return _read_capture(config.path, manifest, name)
    if not isinstance(manifest, TargetManifest):
        raise XtokenError(f"{config.path} is a {manifest.kind}; --html draws a sample of a capture or of targets")
    root = _capture_of(config, manifest)
    capture = read_manifest(root, CaptureManifest)
    name = find_worst(root, capture, config.path) if config.html == WORST else config.html
    place = find(config.path, name)
    sample = _read_capture(root, capture, name, place.part)
    form = target_form(config.path, manifest)
    batch = form.read_batch(read_sample(config.path, place, form.schema))
    return replace(sample, targets=_targets(config.path, manifest, batch, len(sample.row["teacher_ids"])))


def _capture_of(config: InspectConfig, targets: TargetManifest) -> str:
    """The capture that targets were aligned from."""
    if config.capture is None:
        raise XtokenError(
            f"{config.path} holds targets, which have neither text nor teacher rows; "
            "say --capture and the capture they were aligned from"
        )
    content = content_hash(read_manifest(config.capture, CaptureManifest))
    if content != targets.capture_hash:
        raise XtokenError(
            f"{config.capture} has content hash {content[:12]}, but {config.path} was aligned from "
            f"{targets.capture_hash[:12]}; give that capture, or align this one"
        )
    return config.capture


def _read_capture(root: str, manifest: CaptureManifest, name: str, part: int | None = None) -> Sample:
    check = CaptureCheck.of(manifest)
    stored = read_sample(root, find(root, name, None if part is None else [part]), check.schema)
    check.batch(stored)
    batch = LeftOut.of(manifest).fill(restore_ids(stored, ids_of_codes(root)))
    codec = open_codec(manifest.codec)
    rows = None if without_rows(manifest.left_out) else codec.decode(batch)
    spare = set(codec.columns).intersection(codec.own)
    row = {column: values[0] for column, values in batch.to_pydict().items() if column not in spare}
    table = load_vocab(root)
    vocabulary = Vocabulary(table.pieces(), list(table.role))
    return Sample(manifest, row, row_of_token(batch).tolist(), rows, vocabulary)


def _targets(root: str, manifest: TargetManifest, batch: pa.RecordBatch, teacher_tokens: int) -> Targets:
    row = {name: values[0] for name, values in batch.to_pydict().items()}
    _check_lengths(row, manifest)
    _check_ends(row, teacher_tokens)
    _check_ids(row, manifest)
    projection = None
    if any(column.holds == "teacher ids" for column in loss_columns(manifest.losses)):
        from xtoken.pipeline.project.files import read_tables

        projection = read_tables(root, manifest.files, manifest.student, manifest.teacher_tokenizer)
    return Targets(manifest, row, _student(root, manifest), projection)


def _check_lengths(row: dict[str, Any], manifest: TargetManifest) -> None:
    """Lists of one axis have one length, and counts sum to the lengths of what they count."""
    known = {"token": len(row["student_ids"]), "chunk": len(row["chunk_student_end"])}
    for name, axis in target_columns(manifest.losses, chat=manifest.chat is not None):
        if axis == "sample":
            continue
        wanted = known[axis] if axis in known else sum(row[axis])
        if len(row[name]) != wanted or (name.endswith("_count") and min(row[name], default=0) < 0):
            raise VerificationError(
                f"sample {row['sample_id']!r}: {name} has {len(row[name])} values, {axis} says {wanted}, none below 0"
            )


def _check_ends(row: dict[str, Any], teacher_tokens: int) -> None:
    for name, most in (("chunk_teacher_end", teacher_tokens), ("chunk_student_end", len(row["student_ids"]))):
        ends = row[name]
        if sorted(ends) != ends or not all(0 <= end <= most for end in ends):
            raise VerificationError(
                f"sample {row['sample_id']!r}: {name} is not a way through {most} tokens; align the capture again"
            )


def _check_ids(row: dict[str, Any], manifest: TargetManifest) -> None:
    """Ids must be of the vocabulary whose tokens they name."""
    student, teacher = manifest.student.size, manifest.teacher_tokenizer.size
    of = {"student ids": student, "teacher ids": teacher, "shared ids": teacher, "ranks": student}
    sizes = {column.name: of[column.holds] for column in loss_columns(manifest.losses) if column.holds in of}
    # of two columns of ranks the second is where a range ends, one behind its last
    ends = {pair[1].name for loss in manifest.losses for pair in _ranges(loss)}
    for name, size in {"student_ids": student, **sizes}.items():
        if not all(0 <= token < size + (name in ends) for token in row[name]):
            raise VerificationError(f"sample {row['sample_id']!r}: {name} has an id outside 0 to {size - 1}")


def _ranges(loss: str) -> list[list[LossColumn]]:
    """The columns of ranks along each count column that has two."""
    schema = LOSSES[loss]
    along = [schema.along(column.name, "ranks") for column in schema.columns if column.holds == "count"]
    return [columns for columns in along if len(columns) == 2]


def _student(root: str, manifest: TargetManifest) -> Vocabulary:
    table = read_side_table(Folder(root), STUDENT_VOCAB_FILE, manifest.files)
    if not table.schema.equals(VOCAB) or table["token_id"].to_pylist() != list(range(manifest.student.size)):
        raise VerificationError(f"{root}/{STUDENT_VOCAB_FILE} is not the student's vocabulary; align again")
    return Vocabulary(table["bytes"].to_pylist(), table["role"].to_pylist())
