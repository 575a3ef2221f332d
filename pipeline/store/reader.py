"""Reading artifacts back: only what a commit record vouches for, in order of part number."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa

from xtoken.pipeline.store.checks import CaptureCheck, refuse_other_columns
from xtoken.pipeline.store.codes import Codes, inverse, read_codes, restore_ids
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import LeftOut
from xtoken.pipeline.store.publish import committed, data_name, read_commit
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.cache import cached
from xtoken.schemas.io.parquet_limits import batches, open_parquet, read_whole, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import (
    MANIFEST,
    CaptureManifest,
    Part,
    TargetManifest,
    read_any_manifest,
    read_manifest,
)
from xtoken.schemas.tables import stored_as
from xtoken.schemas.target_form import CODES_FILE, TargetForm, TokenCodes, needs_codes

VOCAB_FILE = "vocab.parquet"
MERGES_FILE = "merges.parquet"


def iter_parquet(
    url: str, columns: Sequence[str] | None = None, rows: int = ROW_GROUP, schema: pa.Schema | None = None
) -> Iterator[pa.RecordBatch]:
    """Record batches of one Parquet file, which must have the columns of ``schema`` where one is given.

    Raises:
        VerificationError: the file is missing or torn.
    """
    with reading(url, "'xtoken verify' lists what is damaged"), open_url(url) as file:
        parquet = open_parquet(file, url)
        if schema is not None:
            refuse_other_columns(parquet, schema)
        if schema is not None and not parquet.schema_arrow.equals(schema):
            raise VerificationError(f"{url} has columns {parquet.schema_arrow.names[:50]}, not those of the format")
        missing = sorted(set(columns or ()) - set(parquet.schema_arrow.names))
        if missing:
            raise VerificationError(f"{url} lacks the columns {', '.join(missing)}; fetch the artifact again")
        yield from batches(parquet, file, url, columns=columns, rows=rows)


def iter_capture(
    root: str, columns: Sequence[str] | None = None, parts: Collection[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Record batches of a capture's committed parts, in plan order, with the teacher's ids in the place of codes.

    Args:
        root: capture folder or URL.
        columns: names of the capture's table, but ``topk_ids`` for ``topk_codes``; all when left out.
        parts: part numbers; all committed ones when left out.

    Raises:
        XtokenError: a wanted part is not committed.
        VerificationError: a committed part is missing or torn.
    """
    folder, found = Folder(root), records(root)
    wanted = sorted(found if parts is None else set(parts))
    missing = [index for index in wanted if index not in found]
    if missing:
        raise XtokenError(f"{root} has no committed part {missing[0]} (of {len(missing)}); run precompute to its end")
    id_of_code = ids_of_codes(root)
    left_out = _left_out(folder)
    schema = CaptureCheck.of(read_manifest(root, CaptureManifest)).schema if folder.exists(MANIFEST) else None
    names = stored_columns(columns if left_out is None else left_out.stored(columns), id_of_code)
    for index in wanted:
        with local_part(folder, index, found[index]) as path:
            for batch in iter_parquet(path, names, schema=schema):
                whole = restore_ids(batch, id_of_code)
                yield whole if left_out is None else left_out.fill(whole, columns)


def target_form(root: str, manifest: TargetManifest) -> TargetForm:
    """How the parts of finished targets hold their columns.

    Raises:
        VerificationError: codes.parquet is missing or torn, or not the one the manifest records.
    """
    codes = None
    if needs_codes(manifest.losses, manifest.parts_version):
        table = read_side_table(Folder(root), CODES_FILE, manifest.files)
        codes = TokenCodes.of(table, manifest.teacher_tokenizer.size, manifest.student.size)
    return TargetForm(manifest.losses, manifest.parts_version, manifest.step or 0.0, codes)


def iter_targets(root: str) -> Iterator[pa.RecordBatch]:
    """Record batches of finished targets in order, with the columns of ``xtoken.schemas.tables.targets``.

    Raises:
        VerificationError: a part or codes.parquet is missing or torn.
    """
    manifest = read_manifest(root, TargetManifest)
    form, folder = target_form(root, manifest), Folder(root)
    for part in manifest.parts:
        with local_part(folder, part.index, part) as path:
            for batch in iter_parquet(path, schema=form.schema):
                yield form.read_batch(batch)


def _left_out(folder: Folder) -> LeftOut | None:
    """What a finished capture's readers fill in; a capture that runs has all its columns."""
    return LeftOut.of(read_manifest(folder.root, CaptureManifest)) if folder.exists(MANIFEST) else None


def records(root: str) -> dict[int, Part]:
    """What vouches for each committed part; of a finished remote artifact its manifest, which is one request."""
    folder = Folder(root)
    if folder.local or not folder.exists(MANIFEST):
        return committed(root)
    return {part.index: part for part in read_any_manifest(root).parts}


@contextmanager
def local_part(folder: Folder, index: int, part: Part | None = None) -> Iterator[str]:
    """Path of a part's file, good inside the block: where it lies, or of a remote one its copy in the local cache.

    Args:
        part: its record; read when left out.

    Raises:
        VerificationError: a remote part is missing, or has another sha256 than its record.
        XtokenError: it has no record, the server cannot be asked, or the cache has no room for it.
    """
    url = folder.url(data_name(index))
    if folder.local:
        yield url
        return
    record = part or read_commit(folder, index)
    if record is None:
        raise XtokenError(f"{folder.root} has no committed part {index}; publish it again")
    try:
        with cached(url, record.sha256, record.file_bytes) as path:
            yield path
    except FileNotFoundError as error:
        raise VerificationError(f"{url} is missing; 'xtoken verify' lists what is damaged") from error


def ids_of_codes(root: str) -> Codes | None:
    """int32 [U], the teacher id of each code in a capture, finished or not; None where its rows hold ids.

    Raises:
        VerificationError: vocab.parquet is missing or torn, not the one the manifest records, or its codes are not
            a permutation.
    """
    folder = Folder(root)
    if not folder.exists(MANIFEST):
        codes = read_codes(read_table(folder.url(VOCAB_FILE)))
        return None if codes is None else inverse(codes)
    manifest = read_manifest(root, CaptureManifest)
    if not manifest.has_codes:
        return None
    codes = read_codes(read_side_table(folder, VOCAB_FILE, manifest.files))
    if codes is None or len(codes) != manifest.tokenizer.size:
        raise VerificationError(f"{folder.url(VOCAB_FILE)} has no code for each token; fetch the artifact again")
    return inverse(codes)


def stored_columns(columns: Sequence[str] | None, id_of_code: Codes | None) -> list[str] | None:
    """Names on disk of columns as readers know them; None = all."""
    if columns is None:
        return None
    return list(columns) if id_of_code is None else [stored_as(name) for name in columns]


def load_vocab(root: str) -> TokenTable:
    """The teacher's token table from a capture folder; the teacher itself is not needed.

    Raises:
        XtokenError: no capture there.
        VerificationError: the tables are not those the manifest records.
    """
    manifest = read_manifest(root, CaptureManifest)
    folder = Folder(root)
    vocab, merges = (read_side_table(folder, name, manifest.files) for name in (VOCAB_FILE, MERGES_FILE))
    return TokenTable.from_tables(vocab, merges, manifest.tokenizer)


def read_side_table(folder: Folder, name: str, files: dict[str, str]) -> pa.Table:
    """A side table that has the sha256 its manifest records; a remote one comes through the local cache.

    Raises:
        VerificationError: it is not recorded, missing, torn, or another file.
    """
    if folder.local or name not in files:
        check_side_file(folder, name, files)
        return read_table(folder.url(name))
    try:
        with cached(folder.url(name), files[name]) as path:
            return read_table(path)
    except FileNotFoundError as error:
        raise VerificationError(f"{folder.url(name)} is missing; fetch the artifact again") from error


def check_side_file(folder: Folder, name: str, files: dict[str, str]) -> None:
    """Compare a side table, whose name is ours, with the sha256 its manifest records.

    Raises:
        VerificationError: it is not recorded, missing, or another file.
    """
    if name not in files:
        raise VerificationError(f"the manifest in {folder.root} records no {name}; fetch the artifact again")
    try:
        found, _ = folder.sha256(name)
    except FileNotFoundError as error:
        raise VerificationError(f"{folder.url(name)} is missing; fetch the artifact again") from error
    if found != files[name]:
        raise VerificationError(
            f"{folder.url(name)} has sha256 {found[:12]}, its manifest says {files[name][:12]}; "
            "fetch the artifact again"
        )


def read_table(url: str) -> pa.Table:
    """A whole Parquet file; VerificationError when it is missing or torn."""
    with reading(url, "fetch the artifact again"), open_url(url) as file:
        return read_whole(file, url)
