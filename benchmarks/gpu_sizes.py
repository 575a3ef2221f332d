"""Sizes of models, and what follows of them: operations, bytes. For ``gpu_arithmetic`` and ``gpu_check``.

Sizes are those of the models' config.json. P positions, H width, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        layers, width, inner: of the body; ``inner`` is an expert's where there are experts.
        heads, groups, head: query heads, key-value heads, width of each.
        vocabulary: rows of the output head.
        tied: whether the head is the table of inputs.
        experts: that a token goes through; all: that there are. 1 of 1: a dense model.
    """

    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    tied: bool = True
    experts: int = 1
    all: int = 1

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.groups * self.head

    def body(self, experts: int | None = None) -> int:
        """Parameters of the body's matrices that a token goes through; of all that there are, with all experts."""
        attention = 2 * self.width * (self.queries + self.keys)
        return self.layers * (attention + 3 * self.width * self.inner * (experts or self.experts))

    @property
    def parameters(self) -> int:
        """All but norms."""
        return self.body(self.all) + self.vocabulary * self.width * (1 if self.tied else 2)

    def attention(self, context: float) -> float:
        """Operations of a token that sees ``context`` tokens in each layer, forward."""
        return 4 * self.queries * context * self.layers


MODELS = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49_152),
    "Qwen3-0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151_936),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128_256),
    "Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151_936),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128_256),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151_936),
    "Gemma-3-4b": Shape(34, 2560, 10_240, 8, 4, 256, 262_208),
    "Qwen3-8B": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, tied=False),
    "Llama-3.1-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False),
    "Qwen3-30B-A3B": Shape(48, 2048, 768, 32, 4, 128, 151_936, tied=False, experts=8, all=128),
    "Qwen3-32B": Shape(64, 5120, 25_600, 64, 8, 128, 151_936, tied=False),
}


def own_bytes(shape: Shape) -> int:
    """What a student takes: weights, gradient and AdamW's moments in float32, a copy of a pass in bfloat16, and the
    head's gradient once more in float32."""
    return 18 * shape.parameters + 4 * shape.vocabulary * shape.width


def activation_bytes(shape: Shape, tokens: int, *, checkpointing: bool = False) -> int:
    """What a pass keeps under autocast for its backward pass."""
    layer = 34 * shape.width + 4 * shape.queries + 4 * shape.keys + 8 * shape.inner
    return tokens * (4 * shape.width * shape.layers + layer if checkpointing else layer * shape.layers)


def pass_bytes(shape: Shape, tokens: int, *, checkpointing: bool = False, card: int = 0) -> int:
    """At the peak of a training pass; blocks of logits take a twelfth of the card besides."""
    return own_bytes(shape) + activation_bytes(shape, tokens, checkpointing=checkpointing) + card // 12


def wire_bytes(k: int, temperatures: int = 0, samples: int = 0) -> int:
    """What one of several workers sends of a row in place of its slice of the logits: keys, sums, the label's logit and
    rank; for samples two masses and their ids.
    """
    return 8 * (k + 5 + temperatures) + 12 + (8 * (2 + samples) if samples else 0)
