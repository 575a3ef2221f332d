"""One sample among many: footers say which row groups may hold its id, and only their ids are read.

Shapes: N samples of one batch.
"""

import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from xtoken.pipeline.store.columns import flat, list_lengths, refuse
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture, iter_parquet, local_part, records
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_headers import Compact
from xtoken.schemas.io.parquet_limits import batches, open_parquet, reading
from xtoken.schemas.io.remote import in_parallel, open_url, read_tail
from xtoken.schemas.manifest import CaptureManifest, Part

WORST = "worst"
_NEAR = 5
_ID = "sample_id"
_SPANS = ("span_byte_end", "span_learn")
_DAMAGED = "'xtoken verify' lists what is damaged"
# Field ids of Parquet's footer, on the way to the smallest and largest value of a column chunk.
_GROUPS, _CHUNKS, _META, _PATH, _STATISTICS, _MOST, _LEAST = 4, 1, 3, 3, 12, 5, 6


@dataclass(frozen=True)
class Place:
    """Where a sample lies: part, row group in it, row in that."""

    part: int
    group: int
    row: int


def find(root: str, sample_id: str, parts: Collection[int] | None = None) -> Place:
    """Where a sample lies.

    Args:
        root: a finished capture, or targets.
        parts: numbers of the parts that may hold it; all when left out.

    Raises:
        XtokenError: no sample has this id; the message names those nearest to it.
        VerificationError: a part is missing or torn.
    """
    folder, known = Folder(root), records(root)
    wanted = [part for index, part in sorted(known.items()) if parts is None or index in parts]
    likely = in_parallel(partial(_groups, sample_id.encode()), [folder.url(data_name(p.index)) for p in wanted], root)
    for part, groups in zip(wanted, likely, strict=True):
        if groups:
            place = _look(folder, part, sample_id, groups)
            if place is not None:
                return place
    # untrusted statistics may say anything: an id counts as unknown only when all were read
    for part in wanted:
        place = _look(folder, part, sample_id, None)
        if place is not None:
            return place
    raise XtokenError(f"no sample of {root} is called {sample_id!r}{_near(root, sample_id)}")


def _groups(wanted: bytes, url: str) -> list[int]:
    """Row groups of a part whose ids may include the wanted one, by what its footer says."""
    with reading(url, _DAMAGED):
        data = read_tail(url).getvalue()
        length = int.from_bytes(data[-8:-4], "little")
        footer, _ = Compact(data[-8 - length : -8]).parse()
        try:
            return [at for at, group in enumerate(footer.get(_GROUPS, [])) if _may_hold(group[_CHUNKS], wanted)]
        except AttributeError as error:
            raise VerificationError(f"{url}: its footer is damaged ({error}); fetch it again") from error


def _may_hold(chunks: Sequence[dict[int, dict[int, object]]], wanted: bytes) -> bool:
    for chunk in chunks:
        if chunk[_META][_PATH] == [_ID.encode()]:
            known = chunk[_META].get(_STATISTICS)
            least, most = (known.get(_LEAST), known.get(_MOST)) if isinstance(known, dict) else (None, None)
            return not (isinstance(least, bytes) and isinstance(most, bytes)) or least <= wanted <= most
    return True


def _look(folder: Folder, part: Part, sample_id: str, groups: Sequence[int] | None) -> Place | None:
    """Read the ids of some row groups of a part, or of all."""
    with local_part(folder, part.index, part) as path, reading(path, _DAMAGED), open_url(path) as file:
        parquet = open_parquet(file, path)
        if _ID not in parquet.schema_arrow.names:
            raise VerificationError(f"{path} has no column {_ID}; fetch the artifact again")
        for group in range(parquet.metadata.num_row_groups) if groups is None else groups:
            before = 0
            for batch in batches(parquet, file, path, columns=[_ID], groups=[group]):
                names = batch[_ID].to_pylist()
                if sample_id in names:
                    return Place(part.index, group, before + names.index(sample_id))
                before += len(names)
    return None


def read_sample(root: str, place: Place, schema: pa.Schema) -> pa.RecordBatch:
    """The one row at a place, all columns, as stored.

    Raises:
        VerificationError: the part has other columns than ``schema``, or is torn.
    """
    folder, part = Folder(root), records(root)[place.part]
    with local_part(folder, place.part, part) as path, reading(path, _DAMAGED), open_url(path) as file:
        parquet = open_parquet(file, path)
        if not parquet.schema_arrow.equals(schema):
            raise VerificationError(f"{path} has columns {parquet.schema_arrow.names[:50]}, not those of the format")
        before = 0
        for batch in batches(parquet, file, path, groups=[place.group]):
            if place.row < before + batch.num_rows:
                return batch.slice(place.row - before, 1)
            before += batch.num_rows
    raise VerificationError(f"{path} changed while it was read; ask again")


def _near(root: str, sample_id: str) -> str:
    """The ids nearest to one that is unknown, for a message."""
    near = difflib.get_close_matches(sample_id, list(all_ids(root)), _NEAR, 0.3)
    return f"; near it: {', '.join(map(repr, near))}" if near else "; 'xtoken query' lists the ids"


def all_ids(root: str, part: int | None = None) -> Iterator[str]:
    """Ids of the samples of all parts, or of one."""
    folder = Folder(root)
    for index, record in sorted(records(root).items()):
        if part is None or index == part:
            with local_part(folder, index, record) as path:
                for batch in iter_parquet(path, [_ID]):
                    yield from batch[_ID].to_pylist()


def find_worst(root: str, manifest: CaptureManifest, targets: str | None = None) -> str:
    """Id of the sample with most bits per byte, the first of equals.

    Args:
        root: of the capture.
        targets: if given, only samples that these hold count.

    Raises:
        XtokenError: no sample has a row and a byte.
    """
    worst: str | None = None
    most = -math.inf
    columns = [_ID, "realised_logprob", *(("teacher_end",) if manifest.chat is None else _SPANS)]
    for part in manifest.parts:
        held = None if targets is None else set(all_ids(targets, part.index))
        for batch in iter_capture(root, columns, [part.index]):
            for name, bits in zip(batch[_ID].to_pylist(), _bits_per_byte(batch), strict=True):
                if bits > most and (held is None or name in held):
                    worst, most = name, float(bits)
    if worst is None:
        raise XtokenError(f"no sample of {targets or root} has a row and a byte of text: there is nothing to draw")
    return worst


def _bits_per_byte(batch: pa.RecordBatch) -> np.ndarray:
    """float64 [N]; -inf where a sample has no row or no byte. Labels that an import does not know count for nothing."""
    rows_N = list_lengths(batch, "realised_logprob")
    bits_N = -np.array([np.nansum(chunk) for chunk in _split(batch, "realised_logprob", rows_N)]) / math.log(2)
    bytes_N = _bytes(batch)
    return np.where((rows_N > 0) & (bytes_N > 0), bits_N / np.maximum(bytes_N, 1), -np.inf)


def _bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Bytes of each sample; of conversations those of the spans that are taught [N]."""
    if "span_learn" not in batch.schema.names:
        ends = _split(batch, "teacher_end", list_lengths(batch, "teacher_end"))
        return np.array([chunk[-1] if len(chunk) else 0 for chunk in ends])
    spans_N = list_lengths(batch, "span_learn")
    refuse(batch, list_lengths(batch, "span_byte_end") != spans_N, "its spans have columns of several lengths")
    ends, learn = (_split(batch, name, spans_N) for name in _SPANS)
    return np.array([np.diff(end, prepend=0)[taught > 0].sum() for end, taught in zip(ends, learn, strict=True)])


def _split(batch: pa.RecordBatch, name: str, lengths_N: np.ndarray) -> list[np.ndarray]:
    return np.split(flat(batch, name).astype(np.float64), np.cumsum(lengths_N)[:-1])
