"""Tiny architectures of several families, as config.json files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.model import open_student

WIDTH = 264  # eight columns more than there are bytes
_SIZES: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "untied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": False, "bos_token_id": 1, "pad_token_id": 7},
    "tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SIZES,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": WIDTH,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": WIDTH,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
    },
}
_BYTES = TokenizerInfo(name="bytes", hash="c" * 64, kind="bytes", size=256, adds_bos=False)


@pytest.fixture
def bytes_info() -> TokenizerInfo:
    """The tokenizer of bytes."""
    return _BYTES


@pytest.fixture
def llama() -> dict[str, Any]:
    """Fields of a tiny Llama with an untied head; change them as you like."""
    return dict(FAMILIES["untied"])


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``configure(fields, **options)``: a configuration that trains this architecture on bytes."""

    def build(fields: dict[str, Any], **options: Any) -> TrainConfig:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        base = {"targets": ["t"], "out": str(tmp_path / "run"), "tokenizer": "bytes", "from_scratch": str(path)}
        return TrainConfig.from_flat(**{**base, **options})

    return build


@pytest.fixture
def scratch(configure: Callable[..., TrainConfig]) -> Callable[..., Any]:
    """``scratch(family)``: a tiny random model of this family."""

    def build(family: str, **options: Any) -> Any:
        config = configure(FAMILIES[family], **options)
        return open_student(config.student, torch.device("cpu"), _BYTES, config.data.seed)

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 [2, 12] bytes."""
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
