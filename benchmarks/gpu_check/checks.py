"""The checks, in order of value. Each returns figures, and fails by raising."""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.inputs import captured, model, on_gpu, targets, verb

Result = dict[str, Any]
Figures = dict[str, float | str]
MICRO = {True: 16_384, False: 256}
STEPS = 8
NEAR = 0.05  # nats: two engines of bfloat16 on the same tokens, mean over kept entries


@dataclass(frozen=True)
class Check:
    """One question.

    Attributes:
        name: of the check.
        function: gets the folder to work in; returns figures, raises where the answer is wrong.
        needs: "cuda" or names of packages.
        least: seconds of the budget that must be left.
    """

    name: str
    function: Callable[[Path], Figures]
    needs: tuple[str, ...] = ()
    least: float = 20.0

    def run(self, work: Path) -> Result:
        """The check, in this process."""
        return {"verdict": "passed", "figures": self.function(work)}


def lacking(check: Check) -> str:
    """Why a check cannot run here; empty: it can."""
    for name in check.needs:
        if name == "cuda" and not on_gpu():
            return "needs a GPU that torch can use"
        if name != "cuda" and find_spec(name) is None:
            return f"needs the package {name}"
    return ""


def environment(_: Path) -> Figures:
    """Versions, driver and device."""
    found: Figures = {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}", "GPUs": torch.cuda.device_count()}
    elif Path("/dev/nvidia0").exists():
        raise RuntimeError("the machine has a GPU that torch cannot use: driver 580 or newer is needed for CUDA 13")
    return found


def _train(work: Path, name: str, loss: str, steps: int, *flags: object) -> list[dict[str, Any]]:
    """Steps of one pass each; what metrics.jsonl says of them."""
    out, micro = work / f"run-{name}", MICRO[on_gpu()]
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


def capture_hf(work: Path) -> Figures:
    """A capture by transformers."""
    _, figures = captured(work, "capture-hf")
    return _rates(figures)


def capture_vllm(work: Path) -> Figures:
    """A capture by vLLM, and its rows against those by transformers."""
    theirs, _ = captured(work, "capture-hf")
    out, figures = captured(work, "capture-vllm", "--backend", "vllm", "--batch-tokens", MICRO[on_gpu()])
    teacher = json.loads((out / "manifest.json").read_text())["teacher"]
    found = _rates(figures) | {"path": teacher["capture_path"]}
    apart = _apart(theirs, out)
    if apart > NEAR:
        raise AssertionError(
            f"labels' log-probabilities by transformers and vLLM are {apart:.3f} nats apart in the mean"
        )
    return found | {"labels apart, nats": apart}


def _rates(figures: Mapping[str, Any]) -> Figures:
    return {"tokens": figures["tokens"], "seconds": figures["seconds"], "bytes per token": figures["bytes_per_token"]}


def _apart(one: Path, other: Path) -> float:
    """Mean difference of the labels' log-probabilities."""
    from xtoken.pipeline.store.reader import iter_capture

    rows = []
    for capture in (one, other):
        batches = iter_capture(str(capture), ["sample_id", "realised_logprob"])
        rows.append({row["sample_id"]: row["realised_logprob"] for batch in batches for row in batch.to_pylist()})
    assert rows[0].keys() == rows[1].keys(), "the captures hold other samples"
    return float(np.mean([np.abs(np.subtract(rows[0][name], rows[1][name])).mean() for name in rows[0]]))


CHECKS = (
    Check("environment", environment, least=5),
    Check("packing", packing, least=30),
    Check("capture-hf", capture_hf, least=60),
    Check("trainer-ce", trainer_ce, least=60),
    Check("trainer-p-kl", trainer_p_kl, least=60),
    Check("trainer-parts", trainer_parts, least=60),
    Check("capture-vllm", capture_vllm, needs=("vllm",), least=120),
    Check("liger", liger, needs=("cuda", "liger_kernel"), least=60),
)
