"""Checks of training: speed, memory, and whether fast ways take the steps of slow ones."""

import gc
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.inputs import Figures, model, on_gpu, targets, verb
from benchmarks.gpu_sizes import MODELS, pass_bytes

MICRO = {True: 16_384, False: 256}
STEPS = 8
SAME_LOSS = 0.01  # relative: bfloat16 through all layers, added up in another order
MEMORY = 1.25  # times what the documents say, at most


def _train(work: Path, name: str, loss: str, steps: int, *flags: object) -> list[dict[str, Any]]:
    """Steps of one pass each; what metrics.jsonl says of them.

    Nothing is saved: checkpoints of nine runs of a billion parameters would take minutes and a disk.
    """
    from xtoken.trainer import loop
    from xtoken.trainer.start import Training

    # in this process, which is of one check alone
    Training.save, loop.save_result = (lambda *_, **__: None), (lambda _: {})
    out, micro = work / f"run-{name}", MICRO[on_gpu()]
    shutil.rmtree(out, ignore_errors=True)  # of an earlier turn, which would be gone on with
    words = ["train", targets(work), "--student", model(work, "student"), "--loss", loss, "--steps", steps]
    words += ["--step-tokens", micro, "--micro-tokens", micro, "--max-tokens", 1024, "--save-every", 1000]
    verb(*words, "--completions", 0, "--out", out, *flags)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "tokens_per_s" in row]
    if not np.isfinite([row["loss"] for row in found]).all():
        raise AssertionError(f"the loss is not finite: {[row['loss'] for row in found]}")
    return found


def _speed(work: Path, loss: str) -> Figures:
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    rows = _train(work, loss, loss, STEPS)
    found: Figures = {"tokens per second": statistics.median(row["tokens_per_s"] for row in rows[3:])}
    return found | ({"GiB at the peak": torch.cuda.max_memory_allocated() / 2**30} if on_gpu() else {})


def trainer_ce(work: Path) -> Figures:
    """Steps of CE."""
    return _speed(work, "ce")


def trainer_p_kl(work: Path) -> Figures:
    """Steps of P-KL."""
    return _speed(work, "p-kl")


def trainer_parts(work: Path) -> Figures:
    """What steps of P-KL spend on the device, by the names of kernels; the rest of wall time it waits."""
    from torch.profiler import ProfilerActivity, profile

    targets(work)
    kind_of = ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU
    with profile(activities=[kind_of]) as seen:
        rows = _train(work, "profiled", "p-kl", 3)
    spent = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in seen.key_averages():
        seconds = float(event.self_device_time_total if on_gpu() else event.self_cpu_time_total) / 1e6
        name = event.key.lower()
        spent[next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")] += (
            seconds
        )
    return {"seconds of steps": sum(row["seconds"] for row in rows), **spent}


KERNELS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products of matrices": ("gemm", "cutlass", "cublas", "mm", "matmul"),
    "optimizer": ("adam", "multi_tensor"),
    "softmax and sums": ("softmax", "reduce", "logsumexp", "sum"),
    "copies": ("memcpy", "memset", "copy"),
}


def packing(work: Path) -> Figures:
    """Whether samples in one row are kept apart, in the dtype of training."""
    from xtoken.trainer.student.head import find_head
    from xtoken.trainer.student.model import load_student

    device = torch.device("cuda" if on_gpu() else "cpu")
    loaded = load_student(str(model(work, "student")), device, False).eval()
    head = find_head(loaded)
    if not head.fusable:
        raise AssertionError("the head of a Llama is not known as a matrix")
    lengths = (37, 64, 11)
    ids = torch.arange(sum(lengths), device=device)[None] % 200 + 20
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    with torch.no_grad():
        packed = head.states(ids, positions)[0]
        alone = [
            head.states(part, torch.arange(part.shape[1], device=device)[None])[0] for part in ids.split(lengths, 1)
        ]
    worst = float((packed - torch.cat(alone)).abs().max() / packed.abs().max())
    if worst > 1e-3:
        raise AssertionError(f"packed samples see each other: hidden states differ by {worst:.2g} of the largest")
    return {"largest difference": worst}


def liger(work: Path) -> Figures:
    """CE by Liger's kernel against eager blocks: first losses and gradient norms."""
    found = {}
    for kernel in ("eager", "liger"):
        row = _train(work, kernel, "ce", 2, "--kernel", kernel)[0]
        found[kernel] = row["ce"], row["grad_norm"]
    apart = [abs(a - b) / abs(a) for a, b in zip(found["eager"], found["liger"], strict=True)]
    if max(apart) > 0.01:
        raise AssertionError(f"CE and gradient norm, eager and by Liger: {found}")
    return {"CE, relative": apart[0], "gradient norm, relative": apart[1]}


def attention(work: Path) -> Figures:
    """Attention by segments against masks: the same first losses, and milliseconds of a pass by either."""
    from xtoken.trainer import opening

    flat, used = opening.attend_flat, list[bool]()

    def by_segments(*given: Any) -> bool:
        used.append(flat(*given))
        return used[-1]

    found: dict[str, list[dict[str, Any]]] = {}
    for name, way in (("segments", by_segments), ("masks", lambda *_: False)):
        opening.attend_flat = way
        found[name] = _train(work, f"attention-{name}", "p-kl", 4)
    opening.attend_flat = flat
    first, other = (rows[0]["loss"] for rows in found.values())
    figures: Figures = {
        f"ms by {name}": 1000 * statistics.median(row["seconds"] for row in rows[1:]) for name, rows in found.items()
    }
    figures |= {"loss, relative": abs(first - other) / abs(other), "by segments": "yes" if any(used) else "no"}
    if abs(first - other) > SAME_LOSS * abs(other):
        raise AssertionError(f"the first loss is {first:.6g} by segments and {other:.6g} by masks")
    if on_gpu() and not any(used):
        raise AssertionError(f"the student's probe refused attention by segments: {figures}")
    return figures


def memory(work: Path) -> Figures:
    """Bytes at the peak of passes, against those that docs/train.md computes, without and with checkpoints."""
    shape, card = MODELS["Llama-3.2-1B"], torch.cuda.get_device_properties(0).total_memory
    figures: Figures = {}
    for name, flags in (("plain", ()), ("checkpointing", ("--activation-checkpointing",))):
        gc.collect()  # what is left of the turn before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _train(work, f"memory-{name}", "p-kl", 2, *flags)
        computed = pass_bytes(shape, MICRO[True], checkpointing=bool(flags), card=card)
        figures[f"{name}, GB"] = torch.cuda.max_memory_allocated() / 1e9
        figures[f"{name}, GB computed"] = computed / 1e9
        if torch.cuda.max_memory_allocated() > MEMORY * computed:
            raise AssertionError(f"a pass takes more than docs/train.md says: {figures}")
    return figures
