"""A student whose weights one rank reads and the others receive, layer by layer, before each layer is sharded.

The others build an outline: the same modules with tensors on the meta device, which take no memory. What comes to them
is what the first rank has, bit by bit: weights, adapters and buffers, frozen or not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.schemas.configs.train import StudentGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.expansion import is_expanded
from xtoken.trainer.student.scratch import build_student

META = torch.device("meta")


class Slot(NamedTuple):
    """A parameter or buffer of a model, as all ranks must have it; ``same_as`` is the first slot of a tied one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    same_as: str


def outline(student: StudentGroup, tokenizer: TokenizerInfo, seed: int) -> Any | None:
    """The modules of ``open_student`` on the meta device.

    None for a model that is more than its config.json, or whose code asks for values while it is built: each rank then
    loads it whole.
    """
    if student.from_scratch is None and is_expanded(str(student.student)):
        return None
    try:
        with META:
            model = _built(student, tokenizer, seed)
    except Exception:  # code of an architecture, of which the first rank says what is wrong with it
        return None
    return None if any(_lost(module) for module in model.modules()) else model


def _built(student: StudentGroup, tokenizer: TokenizerInfo, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = student.trust_remote_code
    if student.from_scratch is not None:
        return build_student(Path(student.from_scratch), tokenizer, seed, trust)
    config = AutoConfig.from_pretrained(str(student.student), trust_remote_code=trust)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32, trust_remote_code=trust)


def _lost(module: torch.nn.Module) -> bool:
    """Whether a module holds a tensor that is neither parameter nor buffer, so that nobody would send it."""
    return any(isinstance(one, Tensor) and one.device == META for one in vars(module).values())


def slots(model: Any) -> list[Slot]:
    """Every place of a parameter or buffer, in the order in which ``receive`` fills them."""
    first: dict[int, str] = {}
    return [
        Slot(name, tuple(one.shape), str(one.dtype), one.requires_grad, first.setdefault(id(one), name))
        for name, one, _, _ in _places(model)
    ]


def refuse_unlike(model: Any, wanted: list[Slot], source: str) -> None:
    """Refuse a model other than the first rank's, whose slots are given.

    Raises:
        XtokenError: a slot is missing, or another.
    """
    ours, theirs = set(slots(model)), set(wanted)
    if ours != theirs:
        other = min(ours ^ theirs)
        raise XtokenError(
            f"the model that {source} describes is not the one that is loaded from it ({other.name} of shape "
            f"{list(other.shape)} is in one of them), so its weights cannot be shared out; use --parallel ddp"
        )


def receive(module: torch.nn.Module, device: torch.device) -> None:
    """Give the first rank's parameters and buffers in ``module`` to all ranks; what is sharded already is left out.

    All ranks must call it.

    Args:
        device: where those of an outline are made.
    """
    import torch.distributed as dist

    known: dict[int, tuple[Tensor, Tensor]] = {}  # what was replaced, and by what: tied ones stay one
    for _, one, owner, key in _places(module):
        if hasattr(one, "device_mesh"):
            continue
        if id(one) not in known:
            empty = one.device == META
            whole = torch.empty(one.shape, dtype=one.dtype, device=device) if empty else one.detach().contiguous()
            if whole.numel():
                dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # bytes: not every dtype can be sent everywhere
            known[id(one)] = one, _like(one, whole) if empty else one
        owner[key] = known[id(one)][1]


def _like(one: Tensor, whole: Tensor) -> Tensor:
    return torch.nn.Parameter(whole, one.requires_grad) if isinstance(one, torch.nn.Parameter) else whole


def _places(model: torch.nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any], str]]:
    """Name, tensor, and where its module keeps it; tied ones once for each of their places."""
    for path, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, one in list(owner.items()):
                if one is not None:
                    yield f"{path}.{key}".lstrip("."), one, owner, key
