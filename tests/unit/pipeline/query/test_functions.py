"""The functions against loops in Python, on lists that stretch over samples."""

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.query.functions import Lookup, Spell, UnpackRows, places, readable, steps
from xtoken.pipeline.store.codecs import open_codec
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CodecInfo

INTS = pa.list_(pa.int32())
COUNTS = [[2, 0, 1], [], [0], [3], [1, 1]]
SIZES = [3, 0, 0, 3, 2]


def lists(values: list[list[int]], kind: pa.DataType = INTS) -> pa.ListArray:
    return pa.array(values, kind)


def test_places_are_counted_within_each_sample() -> None:
    found = places(lists(COUNTS), pa.array(SIZES, pa.int32())).to_pylist()
    for counts, at in zip(COUNTS, found, strict=True):
        assert at["place"] == [place for place, count in enumerate(counts) for _ in range(count)]
        assert at["rank"] == [rank for count in counts for rank in range(count)]


def test_functions_read_slices_and_chunked_columns() -> None:
    whole = places(lists(COUNTS), pa.array(SIZES, pa.int32())).to_pylist()
    assert places(lists(COUNTS)[2:4], pa.array(SIZES, pa.int32())[2:4]).to_pylist() == whole[2:4]
    chunked = pa.chunked_array([lists(COUNTS)[:2], lists(COUNTS)[2:]])
    assert places(chunked, pa.chunked_array([pa.array(SIZES, pa.int32())])).to_pylist() == whole


@pytest.mark.parametrize("counts", [[[1, 1]], [[4]], [[-1, 4]], [[2147483647]]])
def test_counts_that_do_not_sum_to_the_entries_are_refused(counts: list[list[int]]) -> None:
    with pytest.raises(VerificationError, match="do not sum to its entries"):
        places(lists(counts), pa.array([3], pa.int32()))


def test_steps_number_the_chunk_of_each_token() -> None:
    ends, sizes = [[1, 3], [], [2], [0, 2], [2]], [4, 2, 2, 2, 0]
    found = steps(lists(ends[:4]), pa.array(sizes[:4], pa.int32())).to_pylist()
    assert found == [[0, 1, 1, None], [None, None], [0, 0], [1, 1]]


@pytest.mark.parametrize(("ends", "size"), [([2], 0), ([3, 1], 3), ([2147483647], 5), ([-1, 2], 3)])
def test_steps_refuse_ends_that_do_not_fit(ends: list[int], size: int) -> None:
    with pytest.raises(VerificationError, match="do not fit its tokens"):
        steps(lists([ends]), pa.array([size], pa.int32()))


def test_rows_are_unpacked_as_a_running_sum_says() -> None:
    kept, gap = [[2, 1], [], [3]], [[4, 8, 32], [], [0, 16, 16]]
    unpack = UnpackRows(open_codec(CodecInfo(name="topk", k=4, step=1 / 32)))
    kinds = pa.list_(pa.uint8()), pa.list_(pa.uint16())
    found = unpack(lists(kept, kinds[0]), lists(gap), lists(gap, kinds[1])).to_pylist()
    assert [row["logprob"] for row in found] == [[-4 / 32, -12 / 32, -1.0], [], [0.0, -0.5, -1.0]]
    assert [row["place"] for row in found] == [[0, 0, 1], [], [0, 0, 0]]
    with pytest.raises(VerificationError, match="as many ids"):
        unpack(lists([[1]], kinds[0]), lists([[1, 2]]), lists([[1]], kinds[1]))
    with pytest.raises(VerificationError, match="do not sum"):
        unpack(lists([[2]], kinds[0]), lists([[1]]), lists([[1]], kinds[1]))


def test_tokens_spell_the_text_whatever_their_own_bytes() -> None:
    pieces = [b"ab", b" x", b"", "é".encode()]
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    spell = Spell(np.frombuffer(b"".join(pieces), np.uint8), offsets)
    ids, ends = [[0, 3], [], [1, 2, 0], [3, 2]], [[2, 4], [], [1, 1, 3], [4, 4]]
    # a stripped space, a token without bytes, and one that is wider than its bytes
    expected = ["abé".encode(), b"", b"xab", "??é".encode()]
    assert spell(lists(ids), lists(ends)).to_pylist() == expected


@pytest.mark.parametrize(
    ("ids", "ends"), [([4], [1]), ([-1], [1]), ([0, 0], [2]), ([0, 0], [2, 1]), ([0], [2147483647])]
)
def test_tokens_that_are_none_are_refused(ids: list[int], ends: list[int]) -> None:
    spell = Spell(np.zeros(4, np.uint8), np.arange(5, dtype=np.int64))
    with pytest.raises(VerificationError, match="xtoken verify"):
        spell(lists([ids]), lists([ends]))


def test_bytes_are_read_as_text_where_they_are() -> None:
    assert readable(pa.array([b"a", None, "é".encode()], pa.binary())).to_pylist() == ["a", None, "é"]
    assert readable(pa.array([b"a\xe6", "é".encode(), None], pa.binary())).to_pylist() == ["a\\xe6", "é", None]


def test_lookups_refuse_ids_of_another_vocabulary() -> None:
    look = Lookup(pa.array(["a", "b"]), "VARCHAR")
    assert look(pa.array([1, None, 0], pa.int32())).to_pylist() == ["b", None, "a"]
    for foreign in (2, -1):
        with pytest.raises(VerificationError, match="outside 0 to 1"):
            look(pa.array([foreign], pa.int32()))
