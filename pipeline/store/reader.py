"""Reading artifacts back: only what a commit record vouches for, in order of part number."""

from collections.abc import Collection, Iterator, Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.files import Folder
from pipeline.store.publish import committed, data_name
from pipeline.store.writer import ROW_GROUP
from pipeline.tokens import TokenTable
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import CaptureManifest, read_manifest

VOCAB_FILE = "vocab.parquet"
MERGES_FILE = "merges.parquet"


def iter_parquet(url: str, columns: Sequence[str] | None = None, rows: int = ROW_GROUP) -> Iterator[pa.RecordBatch]:
    """Record batches of one Parquet file.

    Raises:
        VerificationError: the file is missing or torn.
    """
    try:
        with fsspec.open(url, "rb") as file:
            yield from pq.ParquetFile(file).iter_batches(batch_size=rows, columns=columns)
    except (pa.ArrowException, FileNotFoundError) as error:
        raise VerificationError(f"{url} cannot be read ({error}); 'xtoken verify' lists what is damaged") from error


def iter_capture(
    root: str, columns: Sequence[str] | None = None, parts: Collection[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Record batches of a capture's committed parts, in plan order.

    Args:
        root: capture folder or URL.
        columns: names of ``schemas.tables.capture``; all when left out.
        parts: part numbers; all committed ones when left out.

    Raises:
        XtokenError: a wanted part is not committed.
        VerificationError: a committed part is missing or torn.
    """
    folder, found = Folder(root), committed(root)
    wanted = sorted(found if parts is None else set(parts))
    missing = [index for index in wanted if index not in found]
    if missing:
        raise XtokenError(f"{root} has no committed part {missing[0]} (of {len(missing)}); run precompute to its end")
    for index in wanted:
        yield from iter_parquet(folder.url(data_name(index)), columns)


def load_vocab(root: str) -> TokenTable:
    """The teacher's token table from a capture folder; the teacher itself is not needed.

    Raises:
        XtokenError: no capture there.
        VerificationError: the tables are not those the manifest records.
    """
    manifest = read_manifest(root, CaptureManifest)
    folder = Folder(root)
    for name in (VOCAB_FILE, MERGES_FILE):
        check_side_file(folder, name, manifest.files)
    return TokenTable.from_tables(
        read_table(folder.url(VOCAB_FILE)), read_table(folder.url(MERGES_FILE)), manifest.tokenizer
    )


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
    try:
        with fsspec.open(url, "rb") as file:
            return pq.read_table(file)
    except (pa.ArrowException, FileNotFoundError) as error:
        raise VerificationError(f"{url} cannot be read ({error}); fetch the artifact again") from error
