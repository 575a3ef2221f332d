"""Codes: a permutation that compresses, undone by every reader."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.codes import codes_by_use, inverse, read_codes, recode, restore_ids, with_codes
from xtoken.pipeline.store.reader import ids_of_codes, iter_capture, iter_parquet, read_table
from xtoken.pipeline.store.writer import rounded
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.tables import CAPTURE_VOCAB


def test_codes_follow_use_then_id():
    codes = codes_by_use([np.array([5, 5, 2], np.int32), np.array([2, 5, 7], np.int32)], 8)
    assert inverse(codes).tolist() == [5, 2, 7, 0, 1, 3, 4, 6]
    assert codes[inverse(codes)].tolist() == list(range(8))
    assert codes.dtype == np.int32


def test_readers_see_ids_where_files_hold_codes(kept_capture):
    id_of_code = ids_of_codes(str(kept_capture))
    assert id_of_code is not None
    assert not np.array_equal(id_of_code, np.arange(len(id_of_code)))
    stored = [batch for path in sorted((kept_capture / "data").iterdir()) for batch in iter_parquet(str(path))]
    read = list(iter_capture(str(kept_capture)))
    assert len(stored) == len(read) > 0
    for there, here in zip(stored, read, strict=True):
        assert [id_of_code[row].tolist() for row in there["topk_codes"].to_pylist()] == here["topk_ids"].to_pylist()
        assert there.drop_columns(["topk_codes"]).equals(here.drop_columns(["topk_ids"]))
    (only,) = {tuple(batch.schema.names) for batch in iter_capture(str(kept_capture), ["topk_ids", "kept"])}
    assert set(only) == {"topk_ids", "kept"}


def test_the_most_used_token_of_the_corpus_has_code_0(kept_capture):
    used = np.concatenate(
        [np.array(ids) for b in iter_capture(str(kept_capture)) for ids in b["teacher_ids"].to_pylist()]
    )
    id_of_code = ids_of_codes(str(kept_capture))
    assert np.bincount(used)[id_of_code[0]] == np.bincount(used).max()


def test_recoding_goes_from_one_capture_to_another():
    random = np.random.default_rng(1)
    mine, theirs = (random.permutation(50).astype(np.int32) for _ in range(2))
    ids = random.integers(0, 50, 40)
    kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
    batch = pa.record_batch({"draw_codes": pa.array([theirs[ids[:15]].tolist(), theirs[ids[15:]].tolist()], kind)})
    moved = recode(batch.slice(1), mine[inverse(theirs)])
    assert moved["draw_codes"].to_pylist() == [mine[ids[15:]].tolist()]
    assert restore_ids(moved, inverse(mine))["draw_ids"].to_pylist() == [ids[15:].tolist()]
    with pytest.raises(VerificationError, match="a code is outside 0 to 9"):
        restore_ids(batch, np.arange(10, dtype=np.int32))


def test_a_vocabulary_whose_codes_are_no_permutation_is_refused():
    vocab, _ = load_tokenizer("bytes").table.to_tables()
    assert read_codes(vocab) is None  # version 1
    codes = np.arange(vocab.num_rows, dtype=np.int32)[::-1].copy()
    coded = with_codes(vocab, codes)
    assert coded.schema.equals(CAPTURE_VOCAB)
    assert np.array_equal(read_codes(coded), codes)
    codes[3] = codes[4]
    with pytest.raises(VerificationError, match="not 0 to V-1 once each"):
        read_codes(with_codes(vocab, codes))


def test_the_side_table_is_joined_by_code(kept_capture):
    table = read_table(str(kept_capture / "vocab.parquet"))
    assert sorted(table["code"].to_pylist()) == table["token_id"].to_pylist()
    assert pq.read_schema(kept_capture / "vocab.parquet").equals(CAPTURE_VOCAB, check_metadata=True)


def test_rounding_keeps_16_bits_and_what_is_no_number():
    value = np.concatenate([-np.random.default_rng(0).exponential(4, 10000), [-0.0, -1e-30, -1e5]]).astype(np.float32)
    near = rounded(value)
    assert (near.view(np.uint32) & 0xFF == 0).all()
    np.testing.assert_allclose(near, value, rtol=2.0**-16)
    special = np.array([np.nan, -np.inf, np.inf, 0], np.float32)
    np.testing.assert_array_equal(rounded(special), special)
