"""Tiny models of several families, saved as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "untied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": False},
    "gemma3": {"model_type": "gemma3_text", **_SIZES, "layer_types": ["full_attention"]},
    "bias": {"model_type": "phi", **{k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_key_value_heads")}},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """``saved(family, dtype, **settings)``: the folder of a tiny random model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def build(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> str:
        fields = {**FAMILIES[family], "pad_token_id": None, **settings}
        known: Any = CONFIG_MAPPING
        auto: Any = AutoModelForCausalLM
        config = known[fields.pop("model_type")](**fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=dtype)
            for parameter in model.parameters():  # a bias starts at 0, and would hide what becomes of it
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return build
