"""A capture read by strangers: DuckDB, pandas and datasets, without our code, and by our own reader."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import read_codes, recode
from xtoken.pipeline.store.publish import committed
from xtoken.pipeline.store.reader import iter_capture, iter_parquet, load_vocab, read_table
from xtoken.pipeline.store.writer import group_rows, write_parquet
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_limits import GROUPS
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, read_manifest

CAPTURE = open_codec(CodecInfo(k=64)).schema()

NUMBERS = ("teacher_ids", "teacher_end", "kept", "topk_codes", "topk_gap", "rest_gap", "realised_logprob")


def recode_ids(batch: pa.RecordBatch, codes) -> pa.RecordBatch:
    """Ids, as our reader gives them, back to the codes that lie in the file."""
    names = ["topk_codes" if name == "topk_ids" else name for name in batch.schema.names]
    return recode(batch.rename_columns(names), codes)


def own_sums(root) -> dict[str, float]:
    codes = read_codes(read_table(str(root / "vocab.parquet")))
    table = pa.Table.from_batches(recode_ids(batch, codes) for batch in iter_capture(str(root)))
    return {name: sum(float(np.sum(row, dtype=np.float64)) for row in table[name].to_pylist()) for name in NUMBERS}


def files(root) -> list[str]:
    return sorted(str(path) for path in (root / "data").glob("*.parquet"))


def test_duckdb_reads_the_same(kept_capture):
    import duckdb

    columns = ", ".join(f"sum(list_sum({name}::double[]))" for name in NUMBERS)
    found = duckdb.connect().execute(f"SELECT {columns} FROM read_parquet(?)", [files(kept_capture)]).fetchone()
    assert found == pytest.approx(tuple(own_sums(kept_capture).values()))
    spaces, firsts = (
        duckdb.connect()
        .execute("SELECT count(space_logprob), sum(first_row) FROM read_parquet(?)", [files(kept_capture)])
        .fetchone()
    )
    assert spaces == firsts == sum(part.samples for part in committed(str(kept_capture)).values())


def test_pandas_reads_the_same(kept_capture):
    import pandas

    frame = pandas.read_parquet(kept_capture / "data")
    expected = own_sums(kept_capture)
    for name in NUMBERS:
        assert sum(row.astype(np.float64).sum() for row in frame[name]) == pytest.approx(expected[name])
    assert frame["topk_gap"][0].dtype == np.uint16


def test_datasets_reads_the_same(kept_capture, tmp_path):
    import datasets

    found = datasets.load_dataset("parquet", data_files=files(kept_capture), split="train", cache_dir=str(tmp_path))
    expected = own_sums(kept_capture)
    for name in NUMBERS:
        assert sum(float(np.sum(row, dtype=np.float64)) for row in found[name]) == pytest.approx(expected[name])
    assert found[0]["text"].startswith("The quick brown fox")


def test_layout_is_the_documented_one(kept_capture):
    metadata = pq.read_metadata(files(kept_capture)[0])
    for index in range(metadata.num_columns):
        column = metadata.row_group(0).column(index)
        assert column.compression == "ZSTD"
        assert not column.has_dictionary_page
        if column.physical_type in ("INT32", "FLOAT"):
            assert "BYTE_STREAM_SPLIT" in column.encodings
    assert pq.read_schema(files(kept_capture)[0]).equals(CAPTURE, check_metadata=True)


def test_row_groups_are_small_however_rows_arrive(tmp_path):
    schema = pa.schema([pa.field("n", pa.int32(), nullable=False)])
    batches = [pa.record_batch([pa.array(range(a, b), pa.int32())], schema=schema) for a, b in ((0, 5), (5, 90))]
    write_parquet(str(tmp_path / "x"), schema, batches)
    metadata = pq.read_metadata(tmp_path / "x")
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [32, 32, 26]
    assert pq.read_table(tmp_path / "x")["n"].to_pylist() == list(range(90))


def test_only_committed_parts_are_read(capture):
    parts = committed(str(capture))
    assert len(parts) > 1
    (capture / "commits" / "part-00001.json").unlink()
    (capture / "data" / "part-00099.parquet").write_bytes(b"not committed")
    rows = sum(batch.num_rows for batch in iter_capture(str(capture), ["sample_id"]))
    assert rows == sum(part.samples for index, part in parts.items() if index != 1)
    with pytest.raises(XtokenError, match="no committed part 1"):
        list(iter_capture(str(capture), parts=[1]))


def test_a_torn_file_is_named(tmp_path):
    (tmp_path / "torn").write_bytes(b"PAR1 and nothing more")
    for name in ("torn", "absent"):
        with pytest.raises(VerificationError, match=name):
            list(iter_parquet(str(tmp_path / name)))


def test_the_vocabulary_travels_with_the_capture(capture):
    table = load_vocab(str(capture))
    manifest = read_manifest(str(capture), CaptureManifest)
    assert table.info == manifest.tokenizer
    row = next(iter_capture(str(capture))).to_pylist()[0]
    assert b"".join(table.token(token) for token in row["teacher_ids"]) == row["text"].encode()
    content = bytearray((capture / "vocab.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (capture / "vocab.parquet").write_bytes(content)
    with pytest.raises(VerificationError, match=r"vocab\.parquet"):
        load_vocab(str(capture))


def test_row_groups_grow_where_there_would_be_too_many():
    assert group_rows(0) == group_rows(65_536) == 32
    assert group_rows(65_537) == 33
    assert 10**7 / group_rows(10**7) <= 2048 < GROUPS
