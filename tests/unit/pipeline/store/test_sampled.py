"""The codec of draws: what goes in comes out, and every rule of a stored row is checked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.sampled import PackedDraws, decode_draws, encode_draws
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.store.writer import write_parquet
from xtoken.pipeline.teachers.base import Draws
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, read_manifest

DRAWS = 20
SCHEMA = open_codec(CodecInfo(name="sampled", draws=DRAWS)).schema()
TEXTS = ["The quick brown fox, 12345 jumps; naïve café. " * 4, "日本語 and tabs\t\n" * 8, "x"]


def some(**changes: Any) -> Draws:
    found = Draws(
        np.array([2, 1], np.int32),
        np.array([4, 1, 8], np.int32),
        np.array([12, 8, 20], np.int32),
        np.array([0.7, 0.0], np.float32),
    )
    return replace(found, **changes)


def test_draws_come_back_as_log_shares_without_rest():
    packed = encode_draws(some(), draws=DRAWS, vocab_size=9)
    assert [value.dtype for value in vars(packed).values()] == [np.uint16, np.int32, np.uint16, np.float32]
    found = decode_draws(packed.drawn, packed.draw_ids, packed.draw_count, DRAWS)
    assert found.offsets.tolist() == [0, 2, 3]
    assert found.ids.tolist() == [4, 1, 8]
    np.testing.assert_allclose(np.exp(found.logprob), [0.6, 0.4, 1.0])
    assert np.isneginf(found.tail_logprob).all()
    assert len(found.tail_logprob) == 2
    empty = PackedDraws.empty()
    assert decode_draws(empty.drawn, empty.draw_ids, empty.draw_count, DRAWS).offsets.tolist() == [0]


def test_large_vocabularies_and_many_draws_fit():
    one = np.array([1], np.int32)
    found = Draws(one, np.array([2**31 - 2], np.int32), np.array([65535], np.int32), np.zeros(1, np.float32))
    packed = encode_draws(found, draws=65535, vocab_size=2**31 - 1)
    assert packed.draw_ids.tolist() == [2**31 - 2]
    assert packed.draw_count.tolist() == [65535]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": np.array([np.nan, 0], np.float32)}, "entropy is NaN, inf or negative"),
        ({"entropy": np.array([np.inf, 0], np.float32)}, "entropy is NaN, inf or negative"),
        ({"entropy": np.array([0.7, -0.1], np.float32)}, "entropy is NaN, inf or negative"),
        ({"count": np.array([12, 7, 20], np.int32)}, "has 19 sampled tokens, not 20"),
        ({"count": np.array([20, 0, 20], np.int32)}, "the backend is broken"),
        ({"count": np.array([21, -1, 20], np.int32)}, "the backend is broken"),
        ({"ids": np.array([4, 1, 9], np.int32)}, "outside 0 to 8 was sampled"),
        ({"ids": np.array([4, -1, 8], np.int32)}, "outside 0 to 8 was sampled"),
    ],
)
def test_what_is_no_row_of_draws_is_refused(changes, message):
    with pytest.raises(XtokenError, match=message):
        encode_draws(some(**changes), draws=DRAWS, vocab_size=9)


@pytest.fixture(scope="module")
def drawn_capture(small_capture: Callable[..., Path]) -> Path:
    texts = {str(number): text for number, text in enumerate(TEXTS)}
    return small_capture(texts, "bytes", id_field="id", max_tokens=512, codec="sampled", draws=DRAWS)


def check_changed(root: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = read_manifest(str(root), CaptureManifest)
    rows = pq.read_table(root / data_name(0)).to_pylist()
    change(rows[1])
    write_parquet(str(path), SCHEMA, [pa.RecordBatch.from_pylist(rows, SCHEMA)])
    CaptureCheck(manifest.tokenizer.size, manifest.codec)(str(path))


def put(column: str, at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row[column].__setitem__(at, value)


def first_of_many(row: dict[str, Any]) -> tuple[int, int]:
    """Place of the first row with two different counts, and of its first entry."""
    starts = np.concatenate([[0], np.cumsum(row["drawn"])])
    at = next(i for i in range(len(row["drawn"])) if len(set(row["draw_count"][starts[i] : starts[i + 1]])) > 1)
    return at, int(starts[at])


def turned(row: dict[str, Any]) -> None:
    at, start = first_of_many(row)
    span = slice(start, start + row["drawn"][at])
    for name in ("draw_codes", "draw_count"):
        row[name][span] = row[name][span][::-1]


def less_of_one(row: dict[str, Any]) -> None:
    row["draw_count"][first_of_many(row)[1]] -= 1


def moved(row: dict[str, Any]) -> None:
    """All draws of the second entry to the first one: the sum stays."""
    start = first_of_many(row)[1]
    row["draw_count"][start] += row["draw_count"][start + 1]
    row["draw_count"][start + 1] = 0


def twice(row: dict[str, Any]) -> None:
    start = first_of_many(row)[1]
    row["draw_codes"][start + 1] = row["draw_codes"][start]


def shorter(column: str) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.__setitem__(column, row[column][:-1])


BROKEN = {
    "drawn has another length than its tokens": shorter("drawn"),
    "entropy has another length than its tokens": shorter("entropy"),
    "draw_count has not as many entries as drawn says": shorter("draw_count"),
    r"draw_\w+ has not as many entries as drawn says": shorter("draw_codes"),
    r"drawn is not between 1 and 20": put("drawn", 0, 0),
    "drawn is not between 1 and 20 ": put("drawn", 0, 65535),
    "not as many entries as drawn": put("drawn", 3, 19),
    r"draw_\w+ has an id outside 0 to 255": put("draw_codes", 5, 256),
    r"draw_\w+ has an id outside 0 to 255 ": put("draw_codes", 5, -(2**31)),
    "sampled less than once": moved,
    "the sampled tokens of a row are not 20": less_of_one,
    "the sampled tokens of a row are not 20 ": put("draw_count", 0, 65535),
    "an id stands twice in one row": twice,
    "order": turned,
    "entropy is not between 0 and 5.545": put("entropy", 2, float("nan")),
    "entropy is not between 0 and 5.545 ": put("entropy", 2, float("inf")),
    "entropy is not between 0 and 5.545  ": put("entropy", 2, -0.01),
    "entropy is not between 0 and 5.545   ": put("entropy", 2, 5.56),
    "realised_logprob is not a log-probability": put("realised_logprob", 1, float("nan")),
    "realised_logprob has another length": shorter("realised_logprob"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named_with_its_sample(drawn_capture, tmp_path, rule):
    with pytest.raises(VerificationError, match=rule.strip()) as caught:
        check_changed(drawn_capture, tmp_path / "part.parquet", BROKEN[rule])
    assert "sample '1#0'" in str(caught.value)


def test_the_untouched_file_passes_and_so_does_the_whole(drawn_capture, tmp_path):
    check_changed(drawn_capture, tmp_path / "part.parquet", lambda row: row.update())
    assert verify(str(drawn_capture))["entries"] > 1000


def test_a_topk_part_is_no_part_of_a_capture_of_draws(drawn_capture, kept_capture):
    codec = read_manifest(str(drawn_capture), CaptureManifest).codec
    with pytest.raises(VerificationError, match="not those of the format"):
        CaptureCheck(10**6, codec)(str(kept_capture / data_name(0)))


def test_inspect_shows_the_best_draws(drawn_capture):
    shown = inspect(str(drawn_capture))
    assert shown["provenance"]["codec"]["name"] == "sampled"
    row = shown["samples_shown"][0]["row"]
    shares = [logprob for _, logprob in row["teacher"]]
    assert shares == sorted(shares, reverse=True)
    assert np.allclose(np.exp(shares) * DRAWS, np.round(np.exp(shares) * DRAWS), atol=0.02)
    assert 0 < row["entropy"] < 5.55
    assert "rest_logprob" not in row
