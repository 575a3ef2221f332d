"""What the page's script is given says the same as the store."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.html.visible import visible
from xtoken.pipeline.page.data import UNIT, chunk_bytes, sample_data
from xtoken.pipeline.page.sample import Sample

NAMES = ["attack.txt:0#0", "unseen.txt:0#0", "scripts.txt:0#0", "plain.txt:0#0"]
Load = Callable[..., Sample]


def nats(gaps: list[int], unit: float) -> list[float]:
    """Log-probabilities of gap-coded ones."""
    return [-level * unit for level in accumulate(gaps)]


def cut(values: list[Any], counts: list[int]) -> list[list[Any]]:
    return [values[start:end] for start, end in pairwise(accumulate(counts, initial=0))]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_decode_gives(sample_of: Load, name: str) -> None:
    sample = sample_of(name)
    data = json.loads(json.dumps(sample_data(sample)))
    assert sample.rows is not None
    assert len(data["rows"]) == len(sample.row["teacher_ids"]) - sample.row["first_row"] > 10
    for at, (places, gaps, rest) in enumerate(data["rows"]):
        start, end = sample.rows.offsets[at : at + 2]
        assert [data["teacher"][place][0] for place in places] == sample.rows.ids[start:end].tolist()
        assert nats(gaps, data["step"]) == sample.rows.logprob[start:end].tolist()
        assert (-math.inf if rest is None else -rest * data["step"]) == sample.rows.tail_logprob[at]
    realised = [-value * UNIT for value in data["realised"]]
    assert realised == pytest.approx(sample.row["realised_logprob"], abs=UNIT)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_chunks_are_those_of_the_store(sample_of: Load, name: str) -> None:
    sample = sample_of(name)
    assert sample.targets is not None
    data, row = sample_data(sample), sample.targets.row
    assert [data["teacher"][place][0] for place in data["t"]] == sample.row["teacher_ids"]
    assert [data["student"][place][0] for place in data["s"]] == row["student_ids"]
    assert [chunk[0] for chunk in data["chunks"]] == row["chunk_teacher_end"]
    assert [chunk[1] for chunk in data["chunks"]] == row["chunk_student_end"]
    spans = chunk_bytes(sample, row["chunk_teacher_end"])
    assert b"".join(spans) == sample.row["text"].encode()
    assert [chunk[2] for chunk in data["chunks"]] == [visible(span) for span in spans]
    for chunk, value in zip(data["chunks"], row["teacher_logprob"], strict=True):
        assert (chunk[4] is None) == math.isnan(value)
        assert chunk[4] is None or -chunk[4] * UNIT == pytest.approx(value, abs=UNIT)


@pytest.mark.parametrize(
    ("loss", "ids", "count", "logprob", "side"),
    [
        ("p-kl", "pkl_ids", "pkl_count", "pkl_logprob", "teacher"),
        ("h-kl", "hkl_common_ids", "hkl_common_count", "hkl_common_logprob", "student"),
        ("gold", "gold_ids", "gold_count", "gold_logprob", "student"),
        ("byte-prefix", "prefix_ids", "prefix_count", "prefix_logprob", "student"),
    ],
)
def test_targets_are_those_of_the_store(
    sample_of: Load, loss: str, ids: str, count: str, logprob: str, side: str
) -> None:
    sample = sample_of("plain.txt:0#0")
    assert sample.targets is not None
    data, row = sample_data(sample), sample.targets.row
    wanted = zip(cut(row[ids], row[count]), cut(row[logprob], row[count]), strict=True)
    found = data["targets"][loss]
    assert sum(map(bool, row[count])) >= 3
    for (places, gaps, *_), (tokens, values) in zip(found, wanted, strict=True):
        assert [data[side][place][0] for place in places] == tokens
        assert nats(gaps, UNIT) == pytest.approx(values, abs=UNIT)


def test_rest_others_and_likelihoods(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    assert sample.targets is not None
    found, row = sample_data(sample)["targets"], sample.targets.row
    rest = [-math.inf if one[2] is None else -one[2] * UNIT for one in found["p-kl"]]
    assert rest == pytest.approx(row["pkl_rest_logprob"], abs=UNIT)
    others = [nats(one[2], UNIT) for one in found["h-kl"]]
    assert others == [pytest.approx(v, abs=UNIT) for v in cut(row["hkl_other_logprob"], row["hkl_other_count"])]
    lists = [nats(one[0], UNIT) for one in found["uld"]]
    assert lists == [pytest.approx(v, abs=UNIT) for v in cut(row["uld_logprob"], row["uld_count"])]
    factor = [math.nan if one[1] == "?" else -one[1] * UNIT for one in found["uld"]]
    assert factor == pytest.approx(row["factor_logprob"], abs=UNIT, nan_ok=True)
    assert [one[3] for one in found["gold"]] == [one[1] for one in found["uld"]]
    space = [math.nan if one == "?" else -one * UNIT for (one,) in found["alm"]]
    assert space == pytest.approx(row["alm_space_logprob"], abs=UNIT, nan_ok=True)
    assert any(math.isfinite(one) for one in space)


def test_child_groups_begin_with_a_token_of_their_bytes(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    assert sample.targets is not None
    data, row = sample_data(sample), sample.targets.row
    groups = [group for one in data["targets"]["byte-prefix"] for group in one[3]]
    assert len(groups) == len(row["child_low"]) > 0
    # a student of bytes has them in order
    assert [data["student"][place][0] for place, _, _ in groups] == row["child_low"]
    spans = zip(row["child_low"], row["child_high"], strict=True)
    assert [size for _, size, _ in groups] == [high - low for low, high in spans]


def test_what_w_does_not_reach_is_marked(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    assert sample.targets is not None
    assert sample.targets.projection is not None
    assert sample.rows is not None
    data, route_U = sample_data(sample), sample.targets.projection.routes("prefix")
    moved = {data["teacher"][place][0]: to if to < 0 else data["teacher"][to][0] for place, to in data["moved"].items()}
    ids = np.unique(sample.rows.ids).tolist()
    assert moved == {token: int(route_U[token]) for token in ids if route_U[token] != token}
    assert len(moved) > 10


@pytest.mark.parametrize("name", NAMES)
def test_without_text_the_tokens_say_it(sample_of: Load, name: str) -> None:
    sample = sample_of(name)
    ends = list(range(1, len(sample.row["teacher_ids"]) + 1))
    silent = replace(sample, row={**sample.row, "text": None})
    assert chunk_bytes(silent, ends) == chunk_bytes(sample, ends)


def test_a_dummy_space_in_front_is_no_text(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    first = sample.row["teacher_ids"][0]
    pieces = [b" " + data if at == first else data for at, data in enumerate(sample.teacher.pieces)]
    silent = replace(sample, row={**sample.row, "text": None}, teacher=replace(sample.teacher, pieces=pieces))
    assert chunk_bytes(silent, [1]) == [sample.teacher.pieces[first]]


def test_a_capture_alone_has_a_chunk_for_each_token(sample_of: Load) -> None:
    sample = sample_of("scripts.txt:0#0", student=False)
    data = sample_data(sample)
    assert [chunk[0] for chunk in data["chunks"]] == list(range(1, len(data["t"]) + 1))
    assert [chunk[4] for chunk in data["chunks"]][sample.row["first_row"] :] == data["realised"]
    assert "targets" not in data


def test_a_long_sample_stays_small(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    entries = sum(len(row[0]) for row in sample_data(sample)["rows"])
    size = len(json.dumps(sample_data(sample)["rows"], separators=(",", ":")))
    assert size < 10 * entries + 12 * len(sample.row["teacher_ids"]), "8 bytes an entry leave room for 512 rows of 64"
