"""The parts of a capture as the stage reads them: checked, whole, in file order, in bounded memory.

Read by pyarrow: no connection to open for each part, and less CPU time than DuckDB's reader
(``benchmarks/results/align.md``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xtoken.pipeline.store.checks import CaptureCheck, refuse_other_columns
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import Codes, restore_ids
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.pipeline.store.left_out import LeftOut, optional_columns
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import ids_of_codes, local_part, records
from xtoken.pipeline.store.writer import ROW_GROUP
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_headers import Chunk
from xtoken.schemas.io.parquet_limits import batches, group_chunks, open_parquet, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.io.sizes import parse_size
from xtoken.schemas.manifest import CaptureManifest, Part, read_manifest

# What an entry takes from its page to the target it becomes: two ids, gap, log-probability, probability, target and
# the writer's copies of it; and what a loss adds.
_ENTRY_BYTES, _LOSS_BYTES = 64, 16
_SHARE = 4  # of the limit is for one batch; the rest is DuckDB's, and room


@dataclass(frozen=True)
class CaptureParts:
    """A finished capture, opened for reading part by part; side tables are read once.

    Attributes:
        root: folder or URL.
        memory_limit: such as 512MB.
        losses: how many a batch becomes targets of.
    """

    root: str
    memory_limit: str
    losses: int = 1

    @cached_property
    def manifest(self) -> CaptureManifest:
        """As it lies there."""
        return read_manifest(self.root, CaptureManifest)

    @cached_property
    def records(self) -> dict[int, Part]:
        """What vouches for each part."""
        return records(self.root)

    @cached_property
    def _id_of_code(self) -> Codes | None:
        return ids_of_codes(self.root)

    def read(self, part: int) -> Iterator[pa.RecordBatch]:
        """Batches of at most 32 samples with all columns, the teacher's ids in the place of codes, what a subset left
        out made up, and ``teacher_eos``: whether a sample's last token is the eos that closes its document.

        Raises:
            StopRun: a sample needs more memory than the limit.
            VerificationError: the part is missing, damaged, or not the one that was recorded.
        """
        left_out, check = LeftOut.of(self.manifest), CaptureCheck.of(self.manifest)
        folder, name = Folder(self.root), f"part {part} of {self.root}"
        way_out, eos_id = f"'xtoken verify {self.root}' lists what is damaged", self.manifest.tokenizer.eos_id
        with reading(name, way_out), local_part(folder, part) as path, open_url(path) as file:
            self._refuse_other_bytes(part, name, way_out)
            parquet = open_parquet(file, name, page_checksum_verification=True)
            refuse_other_columns(parquet, check.schema)
            for group, chunks in enumerate(all_chunks := group_chunks(parquet, file, name)):
                rows = self._rows_at_once(chunks, parquet.metadata.row_group(group).num_rows, name)
                for batch in batches(parquet, file, name, rows=rows, groups=[group], chunks=all_chunks):
                    check.batch(batch)
                    yield with_teacher_eos(left_out.fill(restore_ids(batch, self._id_of_code)), eos_id)

    def _refuse_other_bytes(self, part: int, name: str, way_out: str) -> None:
        """A remote part was compared with its record when it was fetched."""
        record = self.records.get(part)
        if record is None:
            raise VerificationError(f"{name} has no commit record; {way_out}")
        folder = Folder(self.root)
        if not folder.local:
            return
        sha256, size = folder.sha256(data_name(part))
        if (sha256, size) != (record.sha256, record.file_bytes):
            raise VerificationError(
                f"{name} has {size} bytes with sha256 {sha256[:12]}, recorded are {record.file_bytes} with "
                f"{record.sha256[:12]}; {way_out}"
            )

    def _rows_at_once(self, chunks: list[Chunk], rows: int, name: str) -> int:
        """Samples of a row group that are read at once, of about equal numbers of entries."""
        own = optional_columns(open_codec(self.manifest.codec))["rows"]
        entries = max((chunk.values for chunk in chunks if chunk.column in own), default=0)
        each = entries / max(1, rows) * (_ENTRY_BYTES + _LOSS_BYTES * self.losses)
        room = parse_size(self.memory_limit) / _SHARE
        if each > room:
            raise StopRun(
                f"{name} has samples of {round(each / 1e6, 1)} MB, which do not fit --memory-limit "
                f"{self.memory_limit}; give more, or capture with a smaller --max-tokens"
            )
        return max(1, min(ROW_GROUP, int(room / each) if each else ROW_GROUP))


def with_teacher_eos(batch: pa.RecordBatch, eos_id: int | None) -> pa.RecordBatch:
    """A batch with ``teacher_eos``: eos closes a complete document; its id is compared, its bytes are none."""
    ids: Any = batch["teacher_ids"]
    last_N = ids.values.to_numpy()[ids.offsets.to_numpy()[1:] - 1]
    is_eos_N = last_N == eos_id if eos_id is not None else np.zeros(batch.num_rows, np.bool_)
    return batch.append_column("teacher_eos", pc.and_(batch["complete"], pa.array(is_eos_N)))
