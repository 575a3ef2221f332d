"""List columns as they are written and checked, against plain Python."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import Packed
from xtoken.pipeline.store.columns import any_per_sample, check_ids
from xtoken.pipeline.store.writer import Sample, capture_batch, list_column, rounded
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CodecInfo

CAPTURE = open_codec(CodecInfo(k=64)).schema()


@given(st.lists(st.lists(st.booleans(), max_size=4), max_size=8))
def test_any_per_sample_is_any(samples):
    bad = np.array([value for sample in samples for value in sample], np.bool_)
    lengths = np.array([len(sample) for sample in samples], np.int64)
    assert any_per_sample(bad, lengths).tolist() == [any(sample) for sample in samples]


@pytest.mark.parametrize(("ids", "named"), [([[1], [], [0, 9, 2], [9]], "c"), ([[0], [1], [2], [-1]], "d")])
def test_the_sample_of_an_id_outside_the_vocabulary_is_named(ids, named):
    batch = pa.record_batch(
        {"sample_id": list("abcd"), "topk_ids": list_column([np.array(row, np.int32) for row in ids], "teacher_ids")}
    )
    lengths = np.array([len(row) for row in ids])
    check_ids(batch.slice(0, 2), "topk_ids", lengths[:2], 9)
    with pytest.raises(VerificationError, match=f"sample '{named}': topk_ids has an id outside 0 to 8"):
        check_ids(batch, "topk_ids", lengths, 9)


def sample(number: int, rng: np.random.Generator, *, space: bool) -> Sample:
    """One of ``number`` rows, of one to three entries each."""
    kept = rng.integers(1, 4, number).astype(np.uint8)
    entries = int(kept.sum())
    packed = Packed(
        kept,
        rng.integers(0, 50, entries).astype(np.int32),
        rng.integers(0, 9, entries).astype(np.uint16),
        rng.integers(0, 9, number).astype(np.uint16),
    )
    logprob = -rng.exponential(3, (2, number)).astype(np.float32)
    ids = np.arange(number + 1, dtype=np.int32)
    return Sample(f"s{number}", None, ids, ids, packed, logprob[0], logprob[1] if space else None, 1, False, False)


def test_a_batch_holds_codes_rounded_floats_and_nulls():
    rng = np.random.default_rng(3)
    samples = [sample(number, rng, space=number != 2) for number in (3, 0, 2, 5)]
    codes = rng.permutation(50).astype(np.int32)
    batch = capture_batch(samples, CAPTURE, codes)
    assert batch.schema.equals(CAPTURE)
    assert batch["topk_codes"].to_pylist() == [codes[one.packed.topk_ids].tolist() for one in samples]
    assert batch["topk_gap"].to_pylist() == [one.packed.topk_gap.tolist() for one in samples]
    assert batch["teacher_ids"].to_pylist() == [one.teacher_ids.tolist() for one in samples]
    assert batch["realised_logprob"].to_pylist() == [rounded(one.realised_logprob).tolist() for one in samples]
    spaces = [None if one.space_logprob is None else rounded(one.space_logprob).tolist() for one in samples]
    assert batch["space_logprob"].to_pylist() == spaces
    assert capture_batch(samples, CAPTURE)["topk_codes"].to_pylist() == [
        one.packed.topk_ids.tolist() for one in samples
    ]
