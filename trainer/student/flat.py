"""Attention over samples laid end to end: each sees itself alone, and no mask exists.

transformers makes a dense mask for packed rows, [B, 1, L, L], which keeps torch from its flash kernels: the whole
square is computed, and keys are copied for every query head. ``varlen_attn`` of torch takes where samples begin
instead. It is used on CUDA in bfloat16, where a probe of the student shows that it changes nothing; else attention
stays as it was.

Shapes: I inputs of all rows, N segments (samples, and the padding of rows), Q query heads, G heads of keys and values,
D width of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAME = "xtoken_flat"
ROWS = "sdpa"
MOST_WIDTH = 256  # of a head, for flash kernels
_DTYPE = torch.bfloat16  # of the kernel; rotary embeddings leave queries and keys in float32 under autocast
# Arguments that change what attention computes and that the kernel does not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask", "cache")
_KINDS = ("full_attention", "sliding_attention")


class NotFlat(Exception):
    """This model's attention is more than the kernel computes; the text says what."""


def segments(position_BL: NDArray[np.int64]) -> dict[str, Any]:
    """What the model hands to its attention: int32 [N + 1] ends of the segments, and the longest, by the names that
    transformers has for its own flash kernels.

    Args:
        position_BL: positions of all rows; each segment begins at 0.
    """
    ends_N = np.append(np.flatnonzero(position_BL.ravel() == 0), position_BL.size).astype(np.int32)
    longest = int(np.diff(ends_N).max())
    return {"cu_seq_lens_q": ends_N, "cu_seq_lens_k": ends_N, "max_length_q": longest, "max_length_k": longest}


def flat_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls them.

    Args:
        query: [1, Q, I, D]. key, value: [1, G, I, D].
        sliding_window: how many inputs a query sees, itself included.
        cu_seq_lens_q, max_length_q: see ``segments``.

    Returns:
        [1, I, Q, D], in the dtype of the values.

    Raises:
        NotFlat: the module asks for more than the kernel computes.
    """
    if reason := _beyond(module, key, value, attention_mask, dropout, sliding_window, options):
        raise NotFlat(reason)
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotFlat("the model does not hand on where samples begin")
    query_IQD, key_IGD, value_IGD = (part[0].transpose(0, 1).to(_DTYPE) for part in (query, key, value))
    out_IQD: Tensor = kernel()(
        query_IQD,
        key_IGD,
        value_IGD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query_IQD.shape[1] != key_IGD.shape[1],
    )
    return out_IQD[None].to(value.dtype), None


def _beyond(
    module: torch.nn.Module,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    window: int | None,
    options: dict[str, Any],
) -> str | None:
    """What the kernel does not compute of it; a probe is too short to see windows, chunks and small caps."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and hasattr(module, "layer_idx") else None
    slides = kind == "sliding_attention" if kind else bool(getattr(config, "sliding_window", None))
    unknown = next((name for name in _UNKNOWN if options.get(name) is not None), None)
    reasons = {
        f"it has {unknown}": unknown is not None,
        "it has dropout": dropout != 0,
        "it has a mask of its own": mask is not None,
        "it is not causal": not getattr(module, "is_causal", True) or options.get("is_causal") is False,
        f"its layers are {kind}": kind is not None and kind not in _KINDS,
        "it looks at chunks": getattr(config, "attention_chunk_size", None) is not None,
        "its window is not told": slides and window is None,
        f"its heads are wider than {MOST_WIDTH}": max(key.shape[-1], value.shape[-1]) > MOST_WIDTH,
        "its keys are not as wide as its values": key.shape[-1] != value.shape[-1],
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@cache
def kernel() -> Any:
    """``varlen_attn`` of torch, with windows and grouped heads.

    Raises:
        NotFlat: this torch has none.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotFlat("this torch has no varlen_attn") from error
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        raise NotFlat("varlen_attn of this torch knows no windows or grouped heads")
    return varlen_attn


def set_flat(model: Any) -> None:
    """Have ``model``, which attends as transformers does by default, attend by ``flat_attention``.

    Raises:
        NotFlat: it does not, or its code has attention of its own.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = str(model.config._attn_implementation)
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if before != ROWS or can_set is None or not can_set():
        raise NotFlat(f"it attends by {before}")
    # transformers makes no mask for a name that its masks do not know
    ALL_ATTENTION_FUNCTIONS.register(NAME, flat_attention)
    model.set_attn_implementation(NAME)


@contextmanager
def rows_again(model: Any) -> Iterator[None]:
    """Within, attention is over rows, by masks: for generation, whose inputs are no segments. Without gradient only:
    activations recomputed behind the block would attend otherwise."""
    if getattr(model.config, "_attn_implementation", None) != NAME:
        yield
        return
    model.set_attn_implementation(ROWS)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
