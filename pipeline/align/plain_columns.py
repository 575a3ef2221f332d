"""A few plain columns of a capture, read part by part without its vocabulary, before or after targets are built."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import iter_parquet, local_part
from xtoken.schemas.manifest import CaptureManifest, Part
from xtoken.schemas.tables import CHAT_CAPTURE, capture

_ALL = capture(version=CHAT_CAPTURE)


def peek(root: str, manifest: CaptureManifest, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of these columns, null where a subset left them out.

    Args:
        root: folder or URL of a finished capture.
        manifest: its manifest.
        part: one of its parts.
        columns: names of a capture of conversations, none that holds codes.

    Raises:
        XtokenError: the part cannot be read.
    """
    schema = CaptureCheck.of(manifest).schema
    stored = [name for name in columns if name in schema.names]
    wanted = pa.schema([_ALL.field(name) for name in columns])
    with local_part(Folder(root), part.index, part) as path:
        for batch in iter_parquet(path, stored, schema=schema):
            arrays = [
                batch[field.name] if field.name in stored else pa.nulls(batch.num_rows, field.type) for field in wanted
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=wanted)
