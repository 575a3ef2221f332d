"""Streaming through an engine that takes batches."""

from collections.abc import Hashable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import Teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig


@pytest.fixture
def teacher() -> Teacher:
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="bytes", backend="fake", k=8)
    return open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)


def test_a_stream_of_batches_is_a_call_for_each(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [np.frombuffer(word, np.uint8).astype(np.int32) for word in (b"whale", b"ship", b"the sea")]
    calls: list[int] = []
    rows = teacher.rows
    monkeypatch.setattr(teacher, "rows", lambda given: calls.append(len(given)) or rows(given))
    batches: Iterator[list[tuple[Hashable, NDArray[np.int32]]]] = iter(
        [[("a", batch[0]), (("b", 1), batch[1])], [("c", batch[2])]]
    )
    found = dict(teacher.stream(batches))
    assert calls == [2, 1]
    assert list(found) == ["a", ("b", 1), "c"]
    for one, other in zip(found.values(), rows(batch), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logprob, other.logprob)


def test_an_engine_without_another_way_says_so(teacher: Teacher) -> None:
    assert teacher.second_path([np.array([1, 2], np.int32)]) is None
    assert teacher.settings == {}
