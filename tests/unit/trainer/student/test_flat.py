"""Attention by segments against masks: same states and gradients, and none of it where the kernel would compute less.

The kernel is a GPU's. Here a slow one takes its place, called with the arguments of torch's own.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import xtoken.trainer.student.flat as flat
import xtoken.trainer.student.head as head_module
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import score
from xtoken.trainer.student.flat import NAME, NotFlat, flat_attention, kernel, rows_again, segments
from xtoken.trainer.student.head import Head, attend_flat, find_head
from xtoken.trainer.student.model import load_student, prepare, save_student

CPU, HALF = torch.device("cpu"), torch.bfloat16
FLOAT32 = 1e-5  # of the largest: sums over other blocks of the same float32 numbers
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 4},
    "cohere": {},
    "granite": {"logits_scaling": 8.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def model_of(family: str, attention: str = "sdpa", **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **options})
    return auto.from_config(config, attn_implementation=attention).eval()


def slow_kernel(*args: Any, **options: Any) -> Tensor:
    """``varlen_attn`` by its documentation, segment by segment."""
    given = inspect.signature(kernel.__wrapped__()).bind(*args, **options)
    given.apply_defaults()
    query, key, value, ends, scale = (given.arguments[name] for name in ("query", "key", "value", "cu_seq_q", "scale"))
    left, right = given.arguments["window_size"]
    assert given.arguments["enable_gqa"] == (query.shape[1] != key.shape[1])
    assert ends.dtype == torch.int32
    assert right == 0
    assert given.arguments["max_q"] == given.arguments["max_k"] == int(ends.diff().max())
    repeat, parts = query.shape[1] // key.shape[1], []
    for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        at = torch.arange(high - low)
        seen = at[:, None] >= at[None]
        seen &= (at[:, None] - at[None] <= left) if left >= 0 else True
        q, k, v = (part[low:high].transpose(0, 1) for part in (query, key, value))
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU: the kernel is there, in float32."""
    monkeypatch.setattr(flat, "kernel", lambda: slow_kernel)
    monkeypatch.setattr(flat, "_DTYPE", torch.float32)
    monkeypatch.setattr(head_module, "_FLAT_DEVICE", "cpu")


@pytest.fixture
def micro(make_targets: Callable[..., str], pair: Any) -> Micro:
    """Samples packed into rows of different lengths, with padding."""
    loss = open_loss("p-kl", pair.setup())
    sources, layout = Sources([Targets(make_targets([[9, 12, 5], [6, 8], [13, 4, 9]]))]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=200, micro_tokens=200, seed=0, packing=True) as loader:
        found = loader.step().micros[0]
    assert len(found.input_BL) > 1
    assert (found.position_BL == 0).sum() > len(found.sample_ids), "a row is padded"
    return found


def test_segments_end_where_positions_begin_again() -> None:
    position_BL = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])
    found = segments(position_BL)
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 9, 10]
    assert found["cu_seq_lens_q"].dtype == np.int32
    assert (found["max_length_q"], found["max_length_k"]) == (4, 4)
    assert segments(np.arange(6)[None])["cu_seq_lens_k"].tolist() == [0, 6]


def states_and_gradients(head: Head, micro: Micro, by_segments: bool) -> list[Tensor]:
    student, model = Student(head.model, CPU, None, 24, head, by_segments), head.model
    states_PH = student.states(micro)
    model.zero_grad()
    (states_PH * torch.linspace(-1, 1, states_PH.numel()).view_as(states_PH)).sum().backward()
    return [states_PH.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "cohere", "granite"])
def test_packed_rows_are_attended_as_by_masks(family: str, recompute: bool, micro: Micro) -> None:
    """Grouped heads, windows shorter than samples; also where activations are made again in the backward pass."""
    model = prepare(model_of(family, attention_dropout=0.0), recompute, False)
    head = find_head(model)
    wanted = states_and_gradients(head, micro, False)
    assert attend_flat(head, HALF)
    assert model.config._attn_implementation == NAME
    assert model.training
    found = states_and_gradients(head, micro, True)
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) <= FLOAT32 * float(other.abs().max())


@pytest.mark.usefixtures("on_gpu")
def test_losses_are_the_same(micro: Micro, pair: Any, student_dir: str) -> None:
    loss, values = open_loss("p-kl", pair.setup()), []
    for by_segments in (False, True):
        model = load_student(student_dir, CPU, False)
        head = find_head(model)
        assert not by_segments or attend_flat(head, HALF)
        objective = Objective(Student(model, CPU, None, 24, head, by_segments), [loss])
        values.append(float(score(objective, micro, (0.5, 0.5))[0].detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {}),  # caps the scores
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"head_dim": 264}),
        ("qwen3", {"attention_chunk_size": 4}),
        ("llama", {"sliding_window": 4}),  # which its code does not tell its attention
        ("llama", {"attention": "eager"}),
        ("gpt2", {}),  # dropout
    ],
)
@pytest.mark.usefixtures("on_gpu")
def test_what_the_kernel_does_not_compute_stays_with_masks(family: str, options: dict[str, Any]) -> None:
    """Also what a probe of a few tokens could not see."""
    model = model_of(family, **options).train()
    before = model.config._attn_implementation
    assert not attend_flat(find_head(model), HALF)
    assert model.config._attn_implementation == before
    assert model.training


def test_a_kernel_that_lets_samples_see_each_other_is_found_out(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_segment(*args: Any, **options: Any) -> Tensor:
        query, key, value, *_ = args
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return slow_kernel(query, key, value, whole, whole, len(query), len(query), **options)

    monkeypatch.setattr(flat, "kernel", lambda: one_segment)
    assert not attend_flat(find_head(model_of("llama")), HALF)


def test_only_on_cuda_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    head = find_head(model_of("llama"))
    assert not attend_flat(head, HALF)
    monkeypatch.setattr(head_module, "_FLAT_DEVICE", "cpu")
    assert not attend_flat(head, None)
    assert not attend_flat(head, torch.float16)
    assert not attend_flat(head, HALF), "torch's own kernel is not for a CPU"
    assert head.model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("on_gpu")
def test_generation_is_over_rows(student_dir: str, tmp_path: Path) -> None:
    """Without segments attention refuses rather than let all be seen; within ``rows_again`` it is what it was."""
    model = load_student(student_dir, CPU, False).eval()
    ids, head = torch.arange(4, 12)[None].repeat(2, 1), find_head(model)
    with torch.no_grad():
        wanted = model(ids).logits
        assert attend_flat(head, HALF)
        with pytest.raises(NotFlat, match="where samples begin"):
            model(ids)
        with rows_again(model):
            assert torch.equal(model(ids).logits, wanted)
    assert model.config._attn_implementation == NAME
    save_student(model, "bytes", tmp_path / "model")
    assert NAME not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))


def test_shapes_and_dtypes_of_the_real_kernel() -> None:
    """Torch's own, on tensors without data: grouped heads in float32, as rotary embeddings leave them, and values."""
    module = torch.nn.Module()
    query, key = (torch.empty(1, heads, 10, 64, device="meta") for heads in (4, 2))
    value = torch.empty(1, 2, 10, 64, device="meta", dtype=HALF)
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    for window in (None, 4):
        out, weights = flat_attention(module, query, key, value, None, 0.0, 0.125, window, ends, 7)
        assert (out.shape, out.dtype, weights) == ((1, 10, 4, 64), HALF, None)
