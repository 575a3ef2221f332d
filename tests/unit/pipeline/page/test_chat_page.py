"""The page of a conversation: what its script is given says the same as the store."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.page.data import UNIT, sample_data
from xtoken.pipeline.page.find import find_worst
from xtoken.pipeline.page.sample import Sample, load_sample
from xtoken.pipeline.page.sample_page import figures, sample_page, write_page
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.configs.artifacts import InspectConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.spans import row_of_token

NAMES = ["talk/plain#0", "talk/thinking#0", "talk/calls#0", "talk/hostile#0"]


def alone(capture: Path, name: str) -> Sample:
    return load_sample(InspectConfig(path=str(capture), html=name))


def both(capture: Path, targets: Path, name: str) -> Sample:
    return load_sample(InspectConfig(path=str(targets), html=name, capture=str(capture)))


def data_of(sample: Sample) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(sample_data(sample)))
    return found


def stored(capture: Path) -> dict[str, Any]:
    """Each sample's own batch, by id."""
    batches = (batch.slice(at, 1) for batch in iter_capture(str(capture)) for at in range(batch.num_rows))
    return {batch["sample_id"][0].as_py(): batch for batch in batches}


@pytest.mark.parametrize("name", NAMES)
def test_rows_stand_at_the_tokens_that_have_them(chat_capture: Path, name: str) -> None:
    sample, batch = alone(chat_capture, name), stored(chat_capture)[name]
    data = data_of(sample)
    assert data["row"] == row_of_token(batch).tolist()
    assert max(data["row"]) + 1 == len(data["rows"]) == len(data["realised"])
    assert data["row"].count(-1) == len(data["t"]) - len(data["rows"]) > 0
    assert [data["teacher"][place][0] for place in data["t"]] == sample.row["teacher_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_each_token_of_a_capture_is_a_box_of_its_span(chat_capture: Path, name: str) -> None:
    sample = alone(chat_capture, name)
    data, row = data_of(sample), sample.row
    sizes = np.diff(row["span_token_end"], prepend=0)
    assert [box[6] for box in data["chunks"]] == np.repeat(np.arange(len(sizes)), sizes).tolist()
    for number, (*_, nats, chunk, span) in enumerate(data["chunks"]):
        learn = row["span_learn"][span]
        assert (chunk == number) == learn == (nats is not None)
        assert nats is None or nats == data["realised"][data["row"][number]]
    assert data["spans"] == [
        [kind, int(learn)] for kind, learn in zip(row["span_kind"], row["span_learn"], strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_turns_name_the_messages(chat_capture: Path, name: str) -> None:
    sample = alone(chat_capture, name)
    data, messages = data_of(sample), json.loads(sample.row["messages"])["messages"]
    said = [turn for turn in data["turns"] if turn["message"] >= 0]
    assert [turn["message"] for turn in said] == list(range(len(messages)))
    assert [turn["role"] for turn in said] == [message["role"] for message in messages]
    assert [turn["taught"] for turn in said] == [message["role"] == "assistant" for message in messages]
    assert [turn["spans"][0] for turn in data["turns"]] == [0, *(turn["spans"][1] for turn in data["turns"][:-1])]


@pytest.mark.parametrize("name", NAMES)
def test_boxes_of_targets_hold_every_token_and_every_chunk(chat_capture: Path, chat_targets: Path, name: str) -> None:
    sample = both(chat_capture, chat_targets, name)
    assert sample.targets is not None
    data, row = data_of(sample), sample.targets.row
    boxes = data["chunks"]
    for before, box in pairwise([[0, 0], *boxes]):
        assert before[0] <= box[0]
        assert before[1] <= box[1]
        assert before[:2] != box[:2]
    assert boxes[-1][:2] == [len(data["t"]), len(data["s"])]
    known = [at for at, value in enumerate(row["teacher_logprob"]) if not math.isnan(value)]
    taught = [box for box in boxes if box[5] >= 0]
    assert [box[5] for box in taught] == known
    for box in taught:
        assert box[:2] == [row["chunk_teacher_end"][box[5]], row["chunk_student_end"][box[5]]]
        assert -box[4] * UNIT == pytest.approx(row["teacher_logprob"][box[5]], abs=UNIT)
        assert data["spans"][box[6]][1] == 1
    assert all(box[4] is None for box in boxes if box[5] < 0)
    text = "".join("".join(part if isinstance(part, str) else part[0::2]) for part in (box[2] for box in boxes))
    assert sum(box[3] for box in boxes) == len(sample.row["text"].encode())
    assert data["learn"] == [int(one) for one in row["learn"]]
    assert text


def test_contents_that_nobody_is_taught_are_cut_where_both_end_a_token(chat_capture: Path, chat_targets: Path) -> None:
    sample = both(chat_capture, chat_targets, "talk/plain#0")
    data = data_of(sample)
    words = [box[2] for box in data["chunks"] if data["spans"][box[6]][0] == "user"]
    assert len(words) > 2, "a question is more than one box"


def test_figures_leave_gaps_out(chat_capture: Path, chat_targets: Path) -> None:
    sample = both(chat_capture, chat_targets, "talk/plain#0")
    assert sample.targets is not None
    found, row, capture = figures(sample), sample.targets.row, sample.row
    known = [value for value in row["teacher_logprob"] if not math.isnan(value)]
    taught = np.diff(capture["span_byte_end"], prepend=0)[np.array(capture["span_learn"])].sum()
    assert (found["chunks"], found["turns"], found["taught_bytes"]) == (len(known), 2, taught)
    assert found["taught_tokens"] == len(capture["realised_logprob"])
    bits = -sum(capture["realised_logprob"]) / math.log(2) / taught
    assert found["bits_per_byte"] == pytest.approx(bits, abs=1e-4)
    assert 0 < found["one_to_one"] <= 1


def test_the_worst_has_most_bits_per_taught_byte(chat_capture: Path) -> None:
    bits = {}
    for name, batch in stored(chat_capture).items():
        row = batch.to_pylist()[0]
        taught = np.diff(row["span_byte_end"], prepend=0)[np.array(row["span_learn"])].sum()
        bits[name] = -sum(row["realised_logprob"]) / taught if taught else -math.inf
    worst = find_worst(str(chat_capture), read_manifest(str(chat_capture), CaptureManifest))
    assert worst == max(bits, key=bits.__getitem__)


def test_the_page_says_what_grey_is(chat_capture: Path, chat_targets: Path, tmp_path: Path) -> None:
    page = sample_page(both(chat_capture, chat_targets, "talk/calls#0"))
    assert "Grey is read, not taught" in page
    assert "turns taught" in page
    out = tmp_path / "page.html"
    shown = write_page(InspectConfig(path=str(chat_capture), html="worst", out=str(out)))
    assert out.stat().st_size == shown["page_bytes"]


def test_plain_text_has_no_turns(capture: str) -> None:
    sample = load_sample(InspectConfig(path=capture, html="plain.txt:0#0"))
    data = data_of(sample)
    assert not {"turns", "spans"} & data.keys()
    assert "Grey is read" not in sample_page(sample)
    assert {len(box) for box in data["chunks"]} == {5}
