"""The output head apart from the model, so that logits exist for a few positions at a time.

Shapes: B rows, L inputs of a row, P positions, H width of the hidden states, M width of the head, V columns in use.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.student import flat

# Logits made in another order differ by rounding; another formula is off by far more than this share of the largest.
_ROUNDING = 1e-4
_ROUNDING_HALF = 0.05  # of bfloat16 through all layers; samples that see each other are off by far more
_FLAT_DEVICE = "cuda"
# Lengths of the samples that a probe packs into two rows: some kernels tell samples apart in a batch of one row only.
_PROBE = ((5, 7, 3), (9, 6))


@dataclass(frozen=True)
class Head:
    """How a model's hidden states become logits: linear, times ``scale``, then ``softcap * tanh(x / softcap)``.

    Attributes:
        fusable: whether that is all the model does, so that its matrix can be fused with the loss; else the model makes
            its logits itself, whole.
        positions: whether the model takes position ids.
    """

    model: Any
    fusable: bool
    positions: bool
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight_MH(self) -> Tensor | None:
        """The head's matrix as it stands now (a sharded model holds it only while it runs); None if not fused."""
        return self.model.get_output_embeddings().weight if self.fusable else None

    @property
    def bias_M(self) -> Tensor | None:
        """The head's bias, if it has one and is fused."""
        return getattr(self.model.get_output_embeddings(), "bias", None) if self.fusable else None

    def states(self, input_BL: Tensor, position_BL: Tensor, segments: Mapping[str, Any] | None = None) -> Tensor:
        """[B, L, H] what the head sees, or [B, L, M] logits of a model whose head is not fused.

        Args:
            segments: where samples begin, for a model that attends by them (``xtoken.trainer.student.flat``).
        """
        options = ({"position_ids": position_BL} if self.positions else {}) | dict(segments or {})
        if not self.fusable:
            logits: Tensor = self.model(input_ids=input_BL, use_cache=False, **options).logits
            return logits
        states: Tensor = self.model.base_model(input_ids=input_BL, use_cache=False, **options)[0]
        return states

    def logits(self, states_PH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None) -> Tensor:
        """[P, V] logits in the dtype of the states."""
        if weight_VH is None:
            return states_PH
        return self.bend(torch.nn.functional.linear(states_PH, weight_VH, bias_V))

    def bend(self, linear_PV: Tensor) -> Tensor:
        """Scale and cap of what the head's matrix made; nothing where the head is not fused."""
        if self.scale != 1:
            linear_PV = linear_PV * self.scale
        return linear_PV if self.softcap is None else torch.tanh(linear_PV / self.softcap) * self.softcap


def find_head(model: Any) -> Head:
    """The head of a causal language model, known by comparing it with the model's own logits on a few tokens."""
    positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    whole = Head(model, fusable=False, positions=positions)
    if model.base_model is model or model.get_output_embeddings() is None:
        return whole
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [getattr(config, "logit_scale", None) or 1.0, 1 / (getattr(config, "logits_scaling", None) or 1.0), 1.0]
    for scale in dict.fromkeys(scales):
        head = Head(model, fusable=True, positions=positions, scale=scale, softcap=cap)
        if _same_logits(head, whole):
            return head
    return whole


def packing_changes_nothing(head: Head) -> bool:
    """Whether samples in one row, told apart by position ids, get the states that they get alone."""
    if not head.positions:
        return False
    samples = _probe(head.model)
    with _quiet(head.model), torch.no_grad():
        alone = _alone(head, samples)
        inputs, positions = (tensor.reshape(len(_PROBE), -1) for tensor in _packed(samples))
        packed = head.states(inputs, positions)
    return _close(packed.flatten(0, 1), alone)


def attend_flat(head: Head, dtype: torch.dtype | None) -> bool:
    """Have the model attend by segments, if it is on CUDA in bfloat16 and a probe shows that this changes nothing.

    Args:
        dtype: of autocast.

    Returns:
        Whether it does; if not, the model is as it was.
    """
    device = head.model.get_input_embeddings().weight.device
    if device.type != _FLAT_DEVICE or dtype != torch.bfloat16 or not head.positions:
        return False
    samples = _probe(head.model)
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        with _quiet(head.model):
            alone = _alone(head, samples)
        try:
            flat.set_flat(head.model)
        except flat.NotFlat:
            return False
        inputs, positions = (tensor[None] for tensor in _packed(samples))
        ends = flat.segments(positions.cpu().numpy())
        ends |= {name: torch.from_numpy(ends[name]).to(device) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        try:
            head.states(inputs, positions, ends)  # as it trains: with dropout, which the kernel has not
            with _quiet(head.model):
                if _close(head.states(inputs, positions, ends)[0], alone, _ROUNDING_HALF):
                    return True
        except (flat.NotFlat, TypeError, RuntimeError):  # no such argument, no such kernel
            pass
    head.model.set_attn_implementation(flat.ROWS)
    return False


def _probe(model: Any) -> list[Tensor]:
    lengths = [length for row in _PROBE for length in row]
    return [_tokens(model, length, seed) for seed, length in enumerate(lengths)]


def _alone(head: Head, samples: Sequence[Tensor]) -> Tensor:
    """States of each sample in a pass of its own, one behind the other."""
    return torch.cat([head.states(ids[None], _count(ids)[None])[0] for ids in samples])


def _packed(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and positions of samples, one behind the other."""
    return torch.cat(list(samples)), torch.cat([_count(ids) for ids in samples])


def pick_packing(head: Head, batching: str, source: str) -> bool:
    """Whether to pack, as ``--batching`` says.

    Raises:
        XtokenError: packing was asked for, and it would let this model's samples see each other.
    """
    if batching == "pad":
        return False
    harmless = packing_changes_nothing(head)
    if batching == "pack" and not harmless:
        raise XtokenError(
            f"--batching pack: samples of one row would see each other in {source} (a probe of a few tokens gave other "
            "states than each sample alone); use --batching pad or auto"
        )
    return harmless


def leaves_some_out(head: Head) -> bool:
    """Whether parameters that are to be trained take no part in a few tokens of text: DDP must know.

    Such are the towers of models that also see images, and experts that nothing was sent to.
    """
    called = _Called()
    with _quiet(head.model), torch.no_grad():
        hooks = [module.register_forward_hook(called) for module in head.model.modules()]
        try:
            ids = _tokens(head.model, 6, 0)
            head.states(ids[None], _count(ids)[None])
        finally:
            for hook in hooks:
                hook.remove()
    outside = [module for module in head.model.modules() if id(module) not in called.seen]
    outside = [module for module in outside if module is not head.model.get_output_embeddings()]
    return any(one.requires_grad for module in outside for one in module.parameters(recurse=False))


class _Called:
    """A forward hook that remembers the modules it was called for."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, module: torch.nn.Module, *_: object) -> None:
        self.seen.add(id(module))


def _same_logits(head: Head, whole: Head) -> bool:
    ids = _tokens(head.model, 6, 0)[None]
    positions = _count(ids[0])[None]
    with _quiet(head.model), torch.no_grad():
        ours = head.logits(head.states(ids, positions), head.weight_MH, head.bias_M)
        return _close(ours, whole.states(ids, positions))


def _close(states: Tensor, wanted: Tensor, rounding: float = _ROUNDING) -> bool:
    if states.shape != wanted.shape:
        return False
    limit = rounding * float(wanted.abs().max())
    return bool(((states - wanted).abs() <= limit).all())


def _tokens(model: Any, length: int, seed: int) -> Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (length,), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.get_input_embeddings().weight.device)


def _count(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)


class _quiet:  # noqa: N801 - used as a function
    """The model without dropout."""

    def __init__(self, model: Any) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)
