"""Checkpoints: folders of safetensors and one JSON file, published by a rename, verified when written and loaded.

checkpoints/step-000050/model.safetensors      weights, persistent buffers, what losses learn
                        optimizer.safetensors  AdamW's state
                        rng.safetensors        random state
                        state.json             step, loader position, sha256 of the three, and of itself
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from schemas.errors import VerificationError, XtokenError
from schemas.manifest import digest
from trainer.losses.base import Loss
from trainer.optim import named_parameters, optimizer_tensors, restore_optimizer

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says beside tensors; ``damaged`` are newer checkpoints that failed their sha256."""

    step: int
    state: dict[str, Any]
    damaged: list[str]


def save_checkpoint(
    root: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[Loss],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write, read back, publish, then delete all but the newest ``keep``.

    Raises:
        XtokenError: the disk refused; earlier checkpoints are as they were.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, step, (model, optimizer, losses), state)
        _verify(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be in the way
        temporary.rename(final)
        _sync(root)
    except (OSError, SafetensorError, VerificationError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise XtokenError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints stay, "
            "make room and run the same command again"
        ) from error
    for old in _found(root)[keep:]:
        shutil.rmtree(old)


def restore_checkpoint(
    root: Path, model: Any, optimizer: torch.optim.Optimizer, losses: Sequence[Loss]
) -> Restored | None:
    """Load the newest checkpoint whose files have their recorded sha256; None where there are none.

    Damaged newer ones are set aside as ``damaged-step-...``, so that ``keep`` never counts them.

    Raises:
        VerificationError: there are checkpoints and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    for folder in _found(root):
        try:
            record = _verify(folder)
        except VerificationError as error:
            damaged[folder] = str(error)
            continue
        _load(folder, (model, optimizer, losses))
        for bad in damaged:
            shutil.rmtree(bad.with_name(f"damaged-{bad.name}"), ignore_errors=True)
            bad.rename(bad.with_name(f"damaged-{bad.name}"))
        return Restored(record["step"], record["state"], list(damaged.values()))
    if damaged:
        reasons = "; ".join(damaged.values())
        raise VerificationError(f"every checkpoint is damaged: {reasons}; delete {root} to start again")
    return None


def _found(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    folders = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


_Trained = tuple[Any, torch.optim.Optimizer, Sequence[Loss]]


def _write(folder: Path, step: int, trained: _Trained, state: dict[str, Any]) -> None:
    model, optimizer, losses = trained
    parameters = named_parameters(model, losses)
    tensors = (_model_tensors(model, losses), optimizer_tensors(parameters, optimizer), _random_state())
    for name, group in zip(FILES, tensors, strict=True):
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, folder / name)
    record: dict[str, Any] = {"step": step, "state": state, "sha256": {name: _sha256(folder / name) for name in FILES}}
    (folder / STATE).write_text(json.dumps(record | {"digest": digest(record)}, indent=1) + "\n")
    for name in (*FILES, STATE):
        _sync(folder / name)


def _verify(folder: Path) -> dict[str, Any]:
    """Read state.json and check every sha256 in it."""
    try:
        record: dict[str, Any] = json.loads((folder / STATE).read_text())
        if record.pop("digest") != digest(record):
            raise VerificationError(f"{folder / STATE} was altered")
        for name in FILES:
            if _sha256(folder / name) != record["sha256"][name]:
                raise VerificationError(f"{folder / name} does not have its recorded sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VerificationError(f"{folder} cannot be read ({error!r})") from error
    return record


def _load(folder: Path, trained: _Trained) -> None:
    model, optimizer, losses = trained
    ours = _model_tensors(model, losses)
    stored = load_file(folder / FILES[0])
    if stored.keys() != ours.keys() or any(stored[name].shape != ours[name].shape for name in ours):
        raise XtokenError(f"{folder} holds another model's weights; use another --out")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(stored[name])
    restore_optimizer(named_parameters(model, losses), optimizer, load_file(folder / FILES[1]))
    random = load_file(folder / FILES[2])
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _model_tensors(model: Any, losses: Sequence[Loss]) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once), persistent buffers, and what losses learn."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return named_parameters(model, losses) | buffers


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
