"""AdamW with decay on matrices only; linear warm-up, then a cosine to a tenth of the peak."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtoken.schemas.configs.train import OptimGroup
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.ranks import like
from xtoken.trainer.student.model import vocabulary_parameters

FLOOR = 0.1  # share of the peak learning rate at the last step


def build_optimizer(model: Any, optim: OptimGroup, losses: Sequence[Loss] = ()) -> torch.optim.AdamW:
    """AdamW over all parameters; vectors (norms, biases) and what losses learn are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    learned = [p for loss in losses for p in loss.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay, "peak": optim.lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak": optim.lr},
        *([{"params": learned, "weight_decay": 0.0, "peak": optim.w_lr}] if learned else []),
    ]
    # One kernel for all parameters, on a CPU too; the step count lies where the parameters do.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def named_parameters(model: Any, losses: Sequence[Loss]) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by name (tied ones once) and those of losses as ``loss.<teacher>.<number>``."""
    learned = {f"loss.{i}.{n}": p for i, loss in enumerate(losses) for n, p in enumerate(loss.parameters())}
    return dict(model.named_parameters()) | learned


def learning_rate(step: int, optim: OptimGroup) -> float:
    """Learning rate of optimizer step ``step``, counted from 1."""
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def drop_gradients_of_body(model: Any) -> None:
    """Leave gradients to what the model has by token only (``--freeze-steps``).

    AdamW passes by what has no gradient: it is not decayed, and no state is made for it.
    """
    kept = {id(parameter) for _, parameter in vocabulary_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.grad = None


def optimizer_tensors(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """AdamW's state as tensors named ``<state>:<parameter>``, sharded as the parameters are."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value
    return tensors


def restore_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of ``optimizer_tensors``, exact: a parameter without state there has none after it."""
    optimizer.state.clear()
    for name, tensor in tensors.items():
        key, _, parameter_name = name.partition(":")
        parameter = parameters[parameter_name]
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = _placed(key, tensor, parameter)


def _placed(key: str, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """As AdamW keeps it: the step count whole, the rest sharded as the parameter; never a view of a mapped file."""
    return (tensor.to(parameter.device) if key == "step" else like(parameter, tensor)).clone()
