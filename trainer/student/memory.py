"""Whether a run's passes fit a GPU, computed before the first step; the figures are those of docs/train.md.

A token of a pass in half precision keeps 34 H + 4 Q + 4 K + 8 I bytes per layer: the casts and products that backward
reads, and the float32 residual. With activation checkpointing it keeps the residual, 4 H, and one layer is whole at a
time.

Shapes: H width of the hidden states, Q of all queries, K of all keys, I of the inner layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.trainer.ranks import Ranks

_BLOCKS = 12  # blocks of logits and what losses make of them take a twelfth of the card (``xtoken.trainer.blocks``)
_LEAST = 512  # tokens of a pass below which nobody trains


@dataclass(frozen=True)
class Needs:
    """Bytes of GPU memory.

    Attributes:
        itself: what a student takes whatever the passes are.
        layer: of one layer, per token. residual: of one layer with activation checkpointing.
    """

    itself: int
    layer: int
    residual: int
    layers: int

    @classmethod
    def of(cls, model: Any, shards: int = 1) -> "Needs | None":
        """From a model in float32 that autocasts, shared out over so many ranks; None of a config of another kind."""
        config = model.config.get_text_config()
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        found = [getattr(config, name, None) for name in names]
        if not all(isinstance(value, int) for value in found):
            return None
        hidden, heads, inner, layers = (int(value) for value in found if value is not None)
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        layer = 34 * hidden + 4 * heads * head_dim + 4 * keys + 8 * inner
        return cls(_itself(model, shards), layer, 4 * hidden, layers)

    def bytes_of(self, tokens: int, checkpointing: bool) -> int:
        """A run with passes of so many tokens, without blocks of logits."""
        token = self.residual * self.layers + self.layer if checkpointing else self.layer * self.layers
        return self.itself + tokens * token


def _itself(model: Any, shards: int) -> int:
    """Weights, gradients, AdamW's moments and the half-precision copy, and the head's gradient once more."""
    every: Sequence[torch.nn.Parameter] = list(model.parameters())
    held = sum(4 * one.numel() + 12 * one.numel() * one.requires_grad for one in every)
    head = model.get_output_embeddings()
    again = 4 * head.weight.numel() if head is not None and head.weight.requires_grad else 0
    return held // shards + 2 * sum(one.numel() for one in every) + again


def advice(needs: Needs, tokens: int, checkpointing: bool, memory: int) -> str | None:
    """What to change where a run does not fit a GPU of so many bytes; None where it does."""
    room = memory - memory // _BLOCKS
    if needs.bytes_of(tokens, checkpointing) <= room:
        return None
    said = (
        f"computed, not measured: passes of {tokens:,} tokens need {_gb(needs.bytes_of(tokens, checkpointing))} beside "
        f"blocks of logits, {_gb(needs.itself)} of which the student itself, and this GPU has {_gb(memory)}"
    )
    ways = [] if checkpointing or needs.bytes_of(tokens, True) > room else ["--activation-checkpointing"]
    if (most := _most_tokens(needs, checkpointing, room)) is not None:
        ways.append(f"--micro-tokens {most}")
    elif not ways and (most := _most_tokens(needs, True, room)) is not None:
        ways.append(f"--activation-checkpointing and --micro-tokens {most}")
    if not ways:
        ways = ["--lora 16", "--parallel fsdp on several GPUs", "a smaller student"]
    return f"{said}; use {' or '.join(ways)}"


def room_notes(model: Any, config: TrainConfig, ranks: Ranks, autocast: torch.dtype | None) -> list[str]:
    """``advice`` for a run on CUDA in half precision, if there is any."""
    if ranks.device.type != "cuda" or autocast is None:
        return []
    needs = Needs.of(model, ranks.size if config.student.parallel == "fsdp" else 1)
    memory = torch.cuda.get_device_properties(ranks.device).total_memory
    said = needs and advice(needs, config.sizes[1], config.student.activation_checkpointing, memory)
    return [said] if said else []


def _most_tokens(needs: Needs, checkpointing: bool, room: int) -> int | None:
    """The largest power of two that fits."""
    sizes = [1 << power for power in range(20, 0, -1) if 1 << power >= _LEAST]
    return next((size for size in sizes if needs.bytes_of(size, checkpointing) <= room), None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.0f} GB"
