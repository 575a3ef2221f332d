"""A file that was just written is what its writer meant, to the last bit of every page."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.writer import write_parquet
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_headers import read_chunks
from xtoken.schemas.io.parquet_limits import check_pages

SCHEMA = pa.schema([("sample_id", pa.string()), ("values", pa.list_(pa.int32()))])
ROWS = 100


@pytest.fixture
def written(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 1000, rng.integers(0, 50)).tolist() for _ in range(ROWS)]
    batch = pa.RecordBatch.from_pydict({"sample_id": [f"s{i}" for i in range(ROWS)], "values": lists}, SCHEMA)
    write_parquet(str(tmp_path / "x.parquet"), SCHEMA, [batch])
    return tmp_path / "x.parquet"


def check(path: Path, rows: int = ROWS, schema: pa.Schema = SCHEMA) -> None:
    with path.open("rb") as file:
        check_pages(file, "x", schema, rows)


def test_what_was_written_passes(written: Path) -> None:
    check(written)


def test_a_flipped_bit_of_any_page_is_found(written: Path) -> None:
    data = written.read_bytes()
    with written.open("rb") as file:
        chunks = [chunk for group in read_chunks(file, "x") for chunk in group]
    assert len(chunks) > 6
    for chunk in chunks:
        at = chunk.start + chunk.size - 1  # the last byte of its last page
        written.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(VerificationError, match=f"column {chunk.column}: a page is not what its checksum says"):
            check(written)


def test_other_rows_and_other_columns_are_found(written: Path) -> None:
    with pytest.raises(VerificationError, match="x has 100 rows of other columns than the 99 written"):
        check(written, rows=99)
    with pytest.raises(VerificationError, match="other columns"):
        check(written, schema=pa.schema([("sample_id", pa.string())]))


def test_pages_without_checksums_prove_nothing(written: Path) -> None:
    pq.write_table(pq.read_table(written), written, write_page_checksum=False)
    with pytest.raises(VerificationError, match="a page is not what its checksum says"):
        check(written)
