"""Checkpoints: folders of safetensors and one JSON file, published by a rename, verified when written and loaded.

checkpoints/step-000050/model.safetensors      weights, persistent buffers, what losses learn
                        optimizer.safetensors  the optimizer's state
                        state.json             step, what the loop holds beside tensors, sha256 of the two and of itself

There is no random state among them: what is random in a step follows from seed, step and stream.
A folder is one of three: ``step-000050`` is whole, ``.step-000050.*`` is being written or deleted and swept away by the
next start, ``damaged-step-000050`` failed its sha256 and is left for whoever wants to know why.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import digest

FORMAT = 3  # before it, steps were cut elsewhere and had medians without sizes
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Policy:
    """Which checkpoints stay: the newest ``keep``, and for good those at multiples of ``keep_every`` steps."""

    keep: int
    keep_every: int | None = None

    def keeps(self, step: int, newer: int) -> bool:
        """Whether the checkpoint of ``step`` stays where ``newer`` are newer than it."""
        return newer < self.keep or (self.keep_every is not None and step % self.keep_every == 0)


@dataclass(frozen=True)
class Restored:
    """A checkpoint whose sha256 are right; ``damaged`` says what was wrong with newer ones.

    Plain data: one rank may restore and send this to the others, which load the tensors themselves.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    damaged: list[str]

    def tensors(self, group: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of ``group`` on the CPU, mapped from the file: pages are read when they are touched.

        Raises:
            XtokenError: names, shapes or dtypes are not those of ``like``.
        """
        tensors: dict[str, Tensor] = load_file(self.folder / _file(group))
        if like is not None and _kinds(tensors) != _kinds(like):
            raise XtokenError(f"{self.folder} holds another model's weights; use another --out")
        return tensors


def refuse_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise XtokenError for a tensor that no checkpoint can hold, before hours of training depend on one."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise XtokenError(
                f"{name} of the student is {tensor.dtype}, which safetensors cannot hold; change its code"
            )


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], policy: Policy
) -> None:
    """Write, read back, publish, then delete what ``policy`` does not keep.

    Args:
        tensors: of each group, such as ``model`` and ``optimizer``, tensors by name, on any device; they are copied to
            the CPU one at a time.
        state: plain JSON.

    Raises:
        XtokenError: the disk refused; earlier checkpoints are as they were.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, step, tensors, state)
        _verify(temporary)
        if final.exists():
            final.rename(_replaced(final))
        temporary.rename(final)
        _sync(root)
    except (OSError, VerificationError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise XtokenError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints stay, "
            "make room and run the same command again"
        ) from error
    _prune(root, policy)


def restore_checkpoint(root: Path, before: int | None = None) -> Restored | None:
    """The newest checkpoint whose files have their recorded sha256; None where there are none. For one rank only.

    Damaged newer ones are quarantined as ``damaged-step-...``, so that ``Policy`` never counts them.

    Args:
        before: go back to a step before this one. Checkpoints from here on are deleted: a run that was set back must
            never resume from what it turned away from.

    Raises:
        VerificationError: there are checkpoints and all are damaged.
        XtokenError: an earlier version of xtoken wrote them.
    """
    _sweep(root)
    folders = _found(root)
    wanted = [folder for folder in folders if before is None or _step(folder) < before]
    chosen, damaged = _newest_whole(wanted)
    if chosen is None and damaged:
        reasons = "; ".join(damaged.values())
        raise VerificationError(f"every checkpoint is damaged: {reasons}; delete {root} to start again")
    for folder in folders[: len(folders) - len(wanted)]:
        _discard(folder)
    for bad in damaged:
        aside = bad.with_name(f"damaged-{bad.name}")
        shutil.rmtree(aside, ignore_errors=True)
        bad.rename(aside)
    if chosen is None:
        return None
    folder, record = chosen
    return Restored(folder, record["step"], record["state"], list(damaged.values()))


def _newest_whole(folders: list[Path]) -> tuple[tuple[Path, dict[str, Any]] | None, dict[Path, str]]:
    """The first folder that verifies, with its record, and what is wrong with those before it."""
    damaged: dict[Path, str] = {}
    for folder in folders:
        try:
            return (folder, _verify(folder)), damaged
        except VerificationError as error:
            damaged[folder] = str(error)
    return None, damaged


def _found(root: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted((path for path in root.glob("step-*") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _file(group: str) -> str:
    return f"{group}.safetensors"


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _replaced(folder: Path) -> Path:
    """What ``folder`` is called while another takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def _sweep(root: Path) -> None:
    """Undo or finish what a killed run was at."""
    for replaced in root.glob(".step-*.replaced"):
        folder = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not folder.exists():
            replaced.rename(folder)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover)


def _discard(folder: Path) -> None:
    """Delete ``folder``: at no moment is a part of it taken for a checkpoint."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _prune(root: Path, policy: Policy) -> None:
    for newer, folder in enumerate(_found(root)):
        if not policy.keeps(_step(folder), newer):
            _discard(folder)
        elif _replaced(folder).exists():
            shutil.rmtree(_replaced(folder))


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    sums = {}
    for group, members in tensors.items():
        with open(folder / _file(group), "wb") as file:
            sums[_file(group)] = _write_tensors(file, members)
            _flush(file)
    record: dict[str, Any] = {"format": FORMAT, "step": step, "state": state, "sha256": sums}
    with open(folder / STATE, "wb") as file:
        file.write(json.dumps(record | {"digest": digest(record)}, indent=1).encode() + b"\n")
        _flush(file)
    _sync(folder)


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
    """Write the safetensors format; returns the sha256 of what was meant to be written.

    ``safetensors.save_file`` wants all of them on the CPU at once, and would leave the sha256 to be taken of what the
    disk made of them.
    """
    # Wide types first: every tensor then starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    for piece in (len(text).to_bytes(8, "little"), text):
        sha256.update(piece)
        file.write(piece)
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        sha256.update(data)
        file.write(data)
    return sha256.hexdigest()


def _verify(folder: Path) -> dict[str, Any]:
    """Read state.json and check every sha256 in it."""
    try:
        record: dict[str, Any] = json.loads((folder / STATE).read_text())
        if record.pop("digest") != digest(record):
            raise VerificationError(f"{folder / STATE} was altered")
        if record.get("format") != FORMAT:
            raise XtokenError(
                f"{folder} was written by another version of xtoken, which this one cannot go on from bit for bit; "
                "finish the run with that version, or use another --out"
            )
        for name in record["sha256"]:
            if _sha256(folder / name) != record["sha256"][name]:
                raise VerificationError(f"{folder / name} does not have its recorded sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VerificationError(f"{folder} cannot be read ({error!r})") from error
    return record


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: BinaryIO) -> None:
    """To the disk and out of the page cache, so that what is read back is what the disk holds."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
