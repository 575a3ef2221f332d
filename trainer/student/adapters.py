"""LoRA by peft, put into the student's own modules: it stays the Hugging Face model that it was.

Shapes: O outputs, I inputs of a linear layer, R rank.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import whole_folder
from xtoken.trainer.student.expansion import ExpandedModel
from xtoken.trainer.student.model import readable_like, vocabulary_parameters

_NAME = "default"
_BASE = ".base_layer."
# The fused kernels of these architectures read the weights of these modules themselves and would pass an adapter by.
_FUSED = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_KERNELS = ("conv1d", "x_proj", "dt_proj", "out_proj")


def require_adapters() -> None:
    """Check that LoRA can be used here, before a model is loaded.

    Raises:
        XtokenError: peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise XtokenError("--lora needs peft; pip install 'xtoken[lora]'") from error


def add_adapters(model: Any, rank: int, alpha: float | None = None, seed: int = 0, *, embeddings: bool = False) -> Any:
    """Freeze ``model`` and add a LoRA adapter to every linear layer but the head, in place.

    The model's output stays the same until the first step, since B starts at 0. The caller's random state stays.

    Args:
        model: a Hugging Face causal language model.
        rank: R.
        alpha: the adapter's output is scaled by alpha / R; twice the rank when None.
        seed: of the random A.
        embeddings: leave embedding and head as they are, to be trained in full. A tied one stays one matrix: peft's
            own way (``modules_to_save``) makes copies, which would untie it.

    Raises:
        XtokenError: peft is missing, or the model has no layer that it can adapt.
    """
    require_adapters()
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if isinstance(model, ExpandedModel):
        raise XtokenError("--lora does not go with a model of expanded inputs; leave --lora out")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        exclude_modules=list(_READ_BY_KERNELS) if model.config.model_type in _FUSED else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    # the state of the devices that the model lies on, not that of every GPU of the machine
    used = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(used, key=str)):
        torch.manual_seed(seed)
        try:
            wrapped: Any = get_peft_model(model, config)
        except ValueError as error:
            raise XtokenError(f"peft cannot adapt {type(model).__name__} ({error}); leave --lora out") from error
    adapted = wrapped.get_base_model()
    if embeddings:
        for _, parameter in vocabulary_parameters(adapted):
            parameter.requires_grad_(True)
    return adapted


def merged(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the plain model with the adapters added in; nothing in ``model`` changes.

    Weights without an adapter are the tensors of ``state`` themselves.

    Args:
        model: what ``add_adapters`` returned.
        state: its weights by name, whole, where ``model`` is sharded; its own when left out.
    """
    state = model.state_dict() if state is None else state
    layers = {f"{name}{_BASE}weight": (name, layer) for name, layer in _layers(model)}
    found = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        if name in layers:
            prefix, layer = layers[name]
            value = (value + _delta(layer, prefix, state).to(value.device, value.dtype)).contiguous()
        found[name.replace(_BASE, ".")] = value.detach()
    return found


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _delta(layer: Any, prefix: str, state: Mapping[str, Tensor]) -> Tensor:
    """[O, I] what an adapter adds to its layer's weight; [I, O] for a layer that stores it so."""
    a_RI, b_OR = (state[f"{prefix}.lora_{part}.{_NAME}.weight"] for part in ("A", "B"))
    delta_OI: Tensor = (b_OR @ a_RI) * layer.scaling[_NAME]
    return delta_OI.T if layer.fan_in_fan_out else delta_OI


def save_adapter(model: Any, out: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters as peft's own folder (``PeftModel.from_pretrained(base, out)``), whole or not at all.

    An embedding and a head that were trained in full lie beside them, under the names by which peft loads them.

    Args:
        model: what ``add_adapters`` returned.
        out: the folder.
        state: as in ``merged``.
    """
    state = model.state_dict() if state is None else state
    trained = {name for name, parameter in vocabulary_parameters(model) if parameter.requires_grad}
    tensors = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in state.items()
        if ".lora_" in name or name in trained
    }
    assert tensors
    with whole_folder(out) as temporary:
        temporary.mkdir(parents=True)
        model.peft_config[_NAME].save_pretrained(temporary)
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        readable_like(temporary / "adapter_config.json", temporary)
