"""The objective as one call, for training loops of others: ``xtoken.distillation_loss``.

Shapes: B rows, L inputs of a row, P predicting positions, H width of the hidden states, M width of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.blocks import tensor
from xtoken.trainer.data.dataset import BatchTargets
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import Sums, score_states
from xtoken.trainer.student.head import Head, find_head

# What was found of models' heads, without the models: these would otherwise never be freed.
_HEADS: "WeakKeyDictionary[Any, Head]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Distilled:
    """What ``distillation_loss`` gives.

    Attributes:
        loss: scalar, nats, with its gradient: ``kd_weight * kd + ce_weight * ce``.
        ce: mean per predicted token.
        kd: sum over teachers of the weighted mean per chunk.
        teachers: of each teacher, the mean per chunk without weights of samples.
    """

    loss: Tensor
    ce: float
    kd: float
    teachers: tuple[float, ...]


def distillation_loss(
    output: Tensor,
    targets: BatchTargets,
    *,
    head: Any = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.1,
    step: Sequence[BatchTargets] = (),
) -> Distilled:
    """Loss of a batch of ``xtoken.targets_dataset``, that of ``xtoken train --mix fixed``.

    Args:
        output: the model's logits [B, L, M]; or with ``head`` its last hidden states [B, L, H], as
            ``model.base_model(**batch)[0]`` gives them: then logits of all positions never exist, which saves most of
            the memory.
        targets: of the batch.
        head: the model that turns these states into logits: a transformers model for causal language modelling, as it
            is (not wrapped by DDP; FSDP shards the head: give logits).
        kd_weight, ce_weight: of distillation and of cross-entropy.
        step: targets of all batches whose gradients are added up before the optimizer steps, these among them: sums are
            divided by what all of them hold, as in ``xtoken train``. Left out: by what this batch holds.

    Raises:
        XtokenError: ``output`` is not of this batch, the model predicts fewer tokens than the tokenizer has, or its
            head is more than a matrix, a scale and a cap.
    """
    if not isinstance(targets, BatchTargets):
        raise XtokenError(
            f"targets are a {type(targets).__name__}: give batch['targets'] of xtoken.targets_dataset, whose collate "
            "goes to the DataLoader"
        )
    if output.ndim != 3 or output.shape[:2] != targets.micro.input_BL.shape:
        wanted = tuple(targets.micro.input_BL.shape)
        raise XtokenError(
            f"the output has shape {tuple(output.shape)} and this batch is {wanted} tokens: give logits or hidden "
            "states of all positions, rows first"
        )
    states_PH = output.flatten(0, 1).index_select(0, tensor(targets.micro.place_P, output.device))
    found = Head(None, fusable=False, positions=True) if head is None else _head(head)
    weight_MH = found.weight_MH
    if weight_MH is not None and output.shape[2] != weight_MH.shape[1]:
        raise XtokenError(
            f"with head, the output is hidden states of width {weight_MH.shape[1]}, and this has {output.shape[2]}; of "
            "logits leave head out"
        )
    vocabulary = min(targets.vocabulary, output.shape[2] if weight_MH is None else len(weight_MH))
    autocast = torch.get_autocast_dtype(output.device.type) if torch.is_autocast_enabled(output.device.type) else None
    losses = targets.asked.opened(vocabulary, output.device)
    student = Student(None, output.device, None if head is None else autocast, vocabulary, found)
    totals = [sum(parts) for parts in zip(*(one.totals for one in step or [targets]), strict=True)]
    weights = [ce_weight] + [kd_weight] * len(losses)
    factors = [weight / total if total else 0.0 for weight, total in zip(weights, totals, strict=True)]
    value, found_sums = score_states(Objective(student, losses), targets.micro, states_PH, factors)
    sums = Sums.of(found_sums.tolist(), len(losses))
    shares, plain = (
        [one / total if total else 0.0 for one, total in zip(values, totals[1:], strict=True)]
        for values in (sums.weighted, sums.plain)
    )
    return Distilled(value, sums.ce / totals[0], sum(shares), tuple(plain))


def _head(model: Any) -> Head:
    """The model's head, looked for once."""
    if model not in _HEADS:
        with torch.no_grad():
            found = find_head(model)
        if not found.fusable:
            raise XtokenError(
                f"{type(model).__name__} makes its logits in a way of its own; leave head out, give logits"
            )
        _HEADS[model] = replace(found, model=None)
    return replace(_HEADS[model], model=model)
