"""AdamW with decay on matrices only; linear warm-up, then a cosine to a tenth of the peak."""

import math
from typing import Any

import torch

from schemas.config import TrainConfig

FLOOR = 0.1  # share of the peak learning rate at the last step


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step``, counted from 1."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as tensors named ``<state>:<parameter>``."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach().cpu().contiguous()
    return tensors


def restore_optimizer(model: Any, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``optimizer_tensors``, exact."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        key, _, parameter_name = name.partition(":")
        parameter = parameters[parameter_name]
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = tensor.clone() if key == "step" else tensor.to(parameter.device)
