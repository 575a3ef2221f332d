"""What lies under the views: parts as lists of checked files, and side tables as tables in memory."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from xtoken.pipeline.query.functions import Function, Join, Lookup, Spell, row_functions, target_functions
from xtoken.pipeline.query.loss_views import serves_student_mass
from xtoken.pipeline.query.views import View, read_view
from xtoken.pipeline.store.checks import CaptureCheck, refuse_other_columns
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import inverse, read_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.reader import VOCAB_FILE, load_vocab, local_part, read_side_table, records, target_form
from xtoken.schemas.categories import category
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_limits import check_file, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import CaptureManifest, Part, TargetManifest, content_hash, read_manifest
from xtoken.schemas.tables import CHAT_CAPTURE, UNREACHED, VOCAB, W, read_as, targets

_SQL_TYPES = {"int32": "INTEGER", "uint8": "UTINYINT", "uint16": "USMALLINT", "float": "FLOAT", "string": "VARCHAR"}
_SQL_TYPES |= {"int16": "SMALLINT"}
_PART = ("samples", "tokens", "rows", "entries", "text_bytes", "file_bytes", "sha256")
W_FILE, UNREACHED_FILE, STUDENT_VOCAB_FILE = "w.parquet", "unreached.parquet", "student_vocab.parquet"
Connection = Any
Bases = dict[str, Callable[[Connection], None]]
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class CaptureFolder:
    """A capture."""

    root: str
    stack: ExitStack

    @cached_property
    def manifest(self) -> CaptureManifest:
        """Its manifest."""
        return read_manifest(self.root, CaptureManifest)

    def held(self) -> dict[str, bool]:
        """What views may need of it."""
        rows = not without_rows(self.manifest.left_out)
        return {"capture": True, "rows": rows}

    def views(self) -> list[View]:
        """Views that are not files of their own: ``_rows`` as the codec has it, where rows are there."""
        if without_rows(self.manifest.left_out):
            return []
        return [read_view("capture", "_rows.sql", open_codec(self.manifest.codec).rows_sql)]

    def reasons(self) -> dict[str, str]:
        """Why something is not there, and the way out."""
        rows = f"{self.root} is a subset that left the teacher's rows out; pull it again with --columns text,rows"
        return {"rows": rows}

    def notes(self) -> list[str]:
        """What is null in views that are there."""
        dropped = [name for name in ("text", "space_logprob") if name in self.manifest.left_out]
        notes = [f"{name} was left out by the subset {self.root} is: what follows from it is null" for name in dropped]
        if self.manifest.set_aside:
            notes.append(f"shards quarantined at capture, not here: {len(self.manifest.set_aside)}")
        return notes

    def bases(self) -> Bases:
        """What its views stand on, by full name, and how each is made in a session."""
        return {
            "capture._stored": self._stored,
            "capture._vocabulary": self._vocabulary,
            "capture._categories": self._categories,
            "capture._records": partial(_records, "capture", self.manifest.parts),
        }

    def _stored(self, session: Connection) -> None:
        manifest = self.manifest
        check, codec = CaptureCheck.of(manifest), open_codec(manifest.codec)
        paths = _paths(self.root, self.stack, check.file, manifest.parts)
        whole = codec.schema(version=CHAT_CAPTURE)
        named = {} if manifest.has_codes else {name: read_as(name) for name in whole.names}
        on_disk = {name: there for name, there in named.items() if there in check.schema.names}
        _view_of_files(session, "capture._stored", paths, whole, check.schema, on_disk)
        session.execute(f"SET VARIABLE step = CAST({manifest.codec.step!r} AS DOUBLE)")
        eos_id = manifest.tokenizer.eos_id
        session.execute(f"SET VARIABLE teacher_eos = {'NULL' if eos_id is None else int(eos_id)}::INTEGER")
        for name, function in row_functions(codec).items():
            register(session, name, function)

    def _vocabulary(self, session: Connection) -> None:
        table = load_vocab(self.root)
        manifest = self.manifest
        codes = np.arange(table.size, dtype=np.int32)
        if manifest.has_codes:
            stored = read_codes(read_side_table(Folder(self.root), VOCAB_FILE, manifest.files))
            if stored is None or len(stored) != table.size:
                raise VerificationError(f"{self.root} has no code for each token; fetch the artifact again")
            codes = stored
        shown = _vocabulary(table.to_tables()[0]).append_column("code", pa.array(codes))
        _table(session, "capture._vocabulary", shown)
        _register_tokens(session, "teacher", shown)
        register(session, "teacher_id_of", Lookup(pa.array(inverse(codes)), "INTEGER").function)
        named = [piece or f"<{role}>".encode() for piece, role in zip(table.pieces(), table.role, strict=True)]
        register(session, "teacher_tokens_text", Join(pa.array(named, pa.binary())).function)

    def _categories(self, session: Connection) -> None:
        _table(session, "capture._categories", _categories(load_vocab(self.root).to_tables()[0]))


@dataclass(frozen=True)
class TargetsFolder:
    """Targets."""

    root: str
    stack: ExitStack

    @cached_property
    def manifest(self) -> TargetManifest:
        """Its manifest."""
        return read_manifest(self.root, TargetManifest)

    @cached_property
    def vocab(self) -> pa.Table:
        """The student's vocabulary, in the order of ids."""
        table = self._side(STUDENT_VOCAB_FILE, VOCAB).sort_by("token_id")
        if not np.array_equal(table["token_id"].to_numpy(), np.arange(self.manifest.student.size)):
            raise VerificationError(f"{STUDENT_VOCAB_FILE} in {self.root} has not each id once; fetch it again")
        return table

    def held(self) -> dict[str, bool]:
        """What views may need of it."""
        mass = any(map(serves_student_mass, self.manifest.losses))
        return {loss: loss in self.manifest.losses for loss in LOSSES} | {"student_mass": mass, "capture": False}

    def reasons(self) -> dict[str, str]:
        """Why something is not there, and the way out."""
        served = list(dict.fromkeys(["ce", *self.manifest.losses]))
        no_capture = f"it reads the capture that {self.root} was aligned from too; name it with --capture"
        reasons = {loss: self._no_loss(loss, served) for loss in LOSSES}
        return {**reasons, "student_mass": reasons["p-kl"], "capture": no_capture}

    def _no_loss(self, loss: str, served: list[str]) -> str:
        common = set(targets(["ce"]).names)
        names = ", ".join(name for name in targets([loss]).names if name not in common)
        wanted = ",".join([*(name for name in served if name != "ce"), loss])
        return (
            f"it reads the columns of loss {loss} ({names}), and the targets in {self.root} were made for "
            f"{', '.join(served)}; run 'xtoken align ... --for {wanted}' into a new folder"
        )

    def notes(self) -> list[str]:
        """What is null in views that are there."""
        return []

    def bases(self) -> Bases:
        """What its views stand on, by full name, and how each is made in a session."""
        return {
            "targets._stored": self._stored,
            "targets._student_vocabulary": self._student_vocabulary,
            "targets._student_categories": self._student_categories,
            "targets._w": partial(self._side_table, "targets._w", W_FILE, W),
            "targets._unreached": partial(self._side_table, "targets._unreached", UNREACHED_FILE, UNREACHED),
            "targets._records": partial(_records, "targets", self.manifest.parts),
        }

    def _stored(self, session: Connection) -> None:
        form = target_form(self.root, self.manifest)
        paths = _paths(self.root, self.stack, partial(_check_columns, form.schema), self.manifest.parts)
        on_disk = {}
        for name, (expression, function, call) in target_functions(form).items():
            register(session, function, call)
            on_disk[name] = expression
        _view_of_files(session, "targets._stored", paths, targets(LOSSES, chat=True), form.schema, on_disk)

    def _student_vocabulary(self, session: Connection) -> None:
        shown = _vocabulary(self.vocab)
        _table(session, "targets._student_vocabulary", shown)
        _register_tokens(session, "student", shown)
        pieces = self.vocab["bytes"].combine_chunks()
        lengths = np.array([len(piece) for piece in pieces.to_pylist()], np.int64)
        data = np.frombuffer(b"".join(pieces.to_pylist()), np.uint8)
        spell = Spell(data, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
        register(session, "spelled", spell.function)

    def _student_categories(self, session: Connection) -> None:
        _table(session, "targets._student_categories", _categories(self.vocab))

    def _side_table(self, name: str, file: str, schema: pa.Schema, session: Connection) -> None:
        _table(session, name, self._side(file, schema))

    def _side(self, name: str, schema: pa.Schema) -> pa.Table:
        table = read_side_table(Folder(self.root), name, self.manifest.files)
        if not table.schema.equals(schema):
            raise VerificationError(
                f"{name} in {self.root} has columns {table.schema.names[:20]}, not those of the format; fetch it again"
            )
        return table


def refuse_other_capture(targets_: TargetsFolder, capture_: CaptureFolder) -> None:
    """Raise XtokenError unless the targets were aligned from this capture."""
    given, wanted = content_hash(capture_.manifest), targets_.manifest.capture_hash
    if given != wanted:
        raise XtokenError(
            f"{targets_.root} was aligned from another capture (content hash {wanted[:12]}) than {capture_.root} "
            f"({given[:12]}); give --capture the folder that 'xtoken align' read"
        )


def register(session: Connection, name: str, function: Function) -> None:
    """Make a function known to a session."""
    import duckdb

    takes = [duckdb.type(kind) for kind in function.takes]
    session.create_function(name, function.call, takes, duckdb.type(function.gives), type="arrow")


def quoted(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _paths(root: str, stack: ExitStack, check: Callable[[str], None], parts: list[Part]) -> list[str]:
    """Files of the parts, by their numbers, local and checked before DuckDB opens any; good until the stack closes."""
    folder, known = Folder(root), records(root)
    missing = [part.index for part in parts if part.index not in known]
    if missing:
        raise VerificationError(
            f"{root} has no commit record of part {missing[0]}; 'xtoken verify' lists what is damaged"
        )
    paths = []
    for part in parts:
        path = stack.enter_context(local_part(folder, part.index, known[part.index]))
        check(path)
        paths.append(path)
    return paths


def _check_columns(schema: pa.Schema, path: str) -> None:
    with reading(path, "'xtoken verify' lists what is damaged"), open_url(path) as file:
        refuse_other_columns(check_file(file, path), schema)


def _view_of_files(
    session: Connection, name: str, paths: list[str], whole: pa.Schema, stored: pa.Schema, on_disk: dict[str, str]
) -> None:
    """A view with the columns of ``whole``: those not stored are null; ``on_disk`` says what the others are made of."""
    columns = []
    for field in whole:
        missing = field.name not in on_disk and field.name not in stored.names
        held = f"NULL::{_sql_type(field.type)}" if missing else on_disk.get(field.name, field.name)
        columns.append(f"{held} AS {field.name}")
    # a part's path may hold what DuckDB takes for a pattern
    listed = ", ".join(quoted(_GLOB.sub(lambda match: f"[{match[0]}]", path)) for path in paths)
    source = f"read_parquet([{listed}])" if paths else f"(SELECT {_no_rows(stored)} WHERE false)"
    session.execute(f"CREATE VIEW {name} AS SELECT {', '.join(columns)} FROM {source}")


def _no_rows(stored: pa.Schema) -> str:
    return ", ".join(f"NULL::{_sql_type(field.type)} AS {field.name}" for field in stored)


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    return _SQL_TYPES.get(str(kind), "BOOLEAN")


def _table(session: Connection, name: str, table: pa.Table) -> None:
    """A table in DuckDB's own memory, under its limit."""
    session.register("arrow_table", table)
    session.execute(f"CREATE TABLE {name} AS FROM arrow_table")
    session.unregister("arrow_table")


def _vocabulary(vocab: pa.Table) -> pa.Table:
    """A vocabulary with each token as text."""
    shown = [piece.decode("utf-8", "backslashreplace") for piece in vocab["bytes"].to_pylist()]
    return vocab.append_column("token", pa.array(shown, pa.string()))


def _register_tokens(session: Connection, side: str, shown: pa.Table) -> None:
    """``teacher_bytes_of`` and ``teacher_text_of`` of an id, or the student's."""
    for name, column, kind in (("bytes", "bytes", "BLOB"), ("text", "token", "VARCHAR")):
        register(session, f"{side}_{name}_of", Lookup(shown[column].combine_chunks(), kind).function)


def _categories(vocab: pa.Table) -> pa.Table:
    pairs = zip(vocab["bytes"].to_pylist(), vocab["role"].to_pylist(), strict=True)
    kinds = pa.array([category(piece, role) for piece, role in pairs], pa.string())
    return pa.table({"token_id": vocab["token_id"], "category": kinds})


def _records(folder: str, parts: list[Part], session: Connection) -> None:
    kinds = {"part": pa.int64(), **dict.fromkeys(_PART, pa.int64()), "sha256": pa.string()}
    schema = pa.schema([*kinds.items(), ("counts", pa.map_(pa.string(), pa.int64()))])
    rows = [
        {"part": part.index, **{name: getattr(part, name) for name in _PART}, "counts": list(part.counts.items())}
        for part in parts
    ]
    _table(session, f"{folder}._records", pa.Table.from_pylist(rows, schema))
