"""Bytes of a run on a GPU against the table in docs/train.md, and the advice that follows from them."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from xtoken.schemas.configs.train import TrainConfig
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.student.memory import Needs, advice, room_notes

DOCS = Path(__file__).parents[4] / "docs" / "train.md"
LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8}
QWEN: dict[str, Any] = {"vocab_size": 151_936, "num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 128}
CONFIGS: dict[str, Any] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": Qwen3Config(
        **QWEN, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, tie_word_embeddings=True
    ),
    "Llama-3.2-1B": LlamaConfig(
        **LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": Qwen3Config(
        **QWEN, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, tie_word_embeddings=True
    ),
    "Llama-3.2-3B": LlamaConfig(
        **LLAMA,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        **LLAMA,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}
GB = 10**9


def needs_of(name: str, **options: Any) -> Needs:
    with torch.device("meta"):
        found = Needs.of(AutoModelForCausalLM.from_config(CONFIGS[name]), **options)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_the_docs(name: str) -> None:
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    table = [float(cell) for cell in row[1].split("|")]
    needs = needs_of(name)
    passes = [needs.bytes_of(tokens, False) for tokens in (1024, 4096, 16_384)]
    for found, shown in zip([needs.itself, *passes, needs.bytes_of(16_384, True)], table, strict=True):
        assert found / GB == pytest.approx(shown, abs=0.6)


@pytest.mark.parametrize(
    ("name", "tokens", "checkpointing", "memory", "ways"),
    [
        ("Llama-3.2-1B", 16_384, False, 80, None),
        ("Llama-3.2-1B", 16_384, False, 48, "--activation-checkpointing or --micro-tokens 8192"),
        ("Llama-3.2-1B", 16_384, True, 48, None),
        ("Llama-3.2-1B", 16_384, False, 26, "--micro-tokens 512$|--activation-checkpointing and --micro-tokens"),
        ("Llama-3.2-1B", 16_384, True, 29, "--micro-tokens 8192"),
        ("Llama-3.1-8B", 16_384, False, 80, "--lora 16 or --parallel fsdp on several GPUs or a smaller student"),
    ],
)
def test_what_helps(name: str, tokens: int, checkpointing: bool, memory: int, ways: str | None) -> None:
    needs = needs_of(name)
    said = advice(needs, tokens, checkpointing, memory * GB)
    assert (said is None) == (ways is None)
    if said is not None and ways is not None:
        assert re.search(ways, said), said
        assert f"this GPU has {memory} GB" in said
        for size in re.findall(r"--micro-tokens (\d+)", said):  # what it names does fit
            assert needs.bytes_of(int(size), "checkpointing and" in said or checkpointing) <= memory * GB * 11 // 12


def test_shards_and_frozen_weights_take_less() -> None:
    whole, eighth = needs_of("Llama-3.1-8B"), needs_of("Llama-3.1-8B", shards=8)
    assert whole.itself - eighth.itself == pytest.approx(16 * 8.03 * GB * 7 / 8, rel=0.01)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["Llama-3.2-1B"]).requires_grad_(False)
    frozen = Needs.of(model)
    assert frozen is not None
    assert frozen.itself == 6 * model.num_parameters()


def test_a_model_of_another_kind_gets_no_advice() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert Needs.of(model) is None


def test_a_run_on_cuda_is_told_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=48 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card if device.index == 3 else None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["Llama-3.2-1B"])
    gpu, half = Ranks(device=torch.device("cuda", 3)), torch.bfloat16
    config = TrainConfig.from_flat(targets=["t"], student="s", out="o").sized("cuda")
    (said,) = room_notes(model, config, gpu, half)
    assert said.endswith("use --activation-checkpointing or --micro-tokens 8192")
    assert room_notes(model, config.changed(activation_checkpointing=True), gpu, half) == []
    assert room_notes(model, config, gpu, None) == room_notes(model, config, Ranks(), half) == []
