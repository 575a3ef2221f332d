"""What an H100 should take for a training pass and for rows of a teacher, computed from operations and bytes.

    python -m benchmarks.gpu_arithmetic

Nothing is measured here. Each part takes the time of its operations or of its bytes at a rate that such kernels reach
elsewhere (``RATES``); what is launched, waited for or lost between kernels is left out where it is not named.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_sizes import MODELS, Shape, activation_bytes, own_bytes, wire_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Of one H100 SXM: 989 TFLOP/s in bfloat16 and 3.35 TB/s at the peak.
RATES = {
    "large products of matrices": 600e12,
    "the body of a prefill": 540e12,
    "the body of a prefill with experts": 380e12,
    "the body in training, autocast and eager": 400e12,
    "attention by segments": 300e12,
    "attention under a dense mask": 127e12,
    "memory": 2.7e12,
    "NVLink, one way": 300e9,
}
CARD = 80e9  # bytes, for the size of a block of logits
MEMORY, MATRICES, LINK = RATES["memory"], RATES["large products of matrices"], RATES["NVLink, one way"]

MICRO, STEP, SAMPLE = 16_384, 262_144, 1_000  # tokens of a pass, of a step, of a sample in training
ROW_OF_TOKENS = 4_096  # the length of rows under a mask
BACKWARD = 2.5  # of attention, times its forward pass
# Reads and writes of float32 logits by P-KL beside cross-entropy, as tests/unit/trainer/test_block_gradients.py counts
# them on a CPU, but that a GPU's log-softmax reads rows of this width three times: product 1, log-softmax 4, its
# exponentials and their sum 3; backward: scaling 2, to bfloat16 1.5, read by two products 1.
LOSS_PASSES = 12.5
BLOCK_SECONDS = 0.5e-3  # that the device waits for the host in a block

ROWS, K, TILE = 1024, 64, 512
SAMPLE_PREFILL = 2_048  # tokens of a prompt
TOPK = 5  # reads of a row by torch.topk, at least
VLLM_PASSES = TOPK + 2 + 1  # its softmax, its rank
TORCH_PASSES = TOPK + 3 + 2 + 1.5  # log-sum-exp, subtraction, P(space)
SMALL = 0.1e-3  # of sorts and other small kernels, for so many rows
MESSAGE = 30e-6  # of a collective call, however little it carries
CALLS = 4

STUDENTS = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B")
# and the GPUs that share it
TEACHERS = {"Qwen3-0.6B": 1, "Qwen3-4B": 1, "Gemma-3-4b": 1, "Qwen3-8B": 1, "Qwen3-30B-A3B": 1, "Qwen3-32B": 4}


def training(shape: Shape, card: float = CARD) -> dict[str, float]:
    """Seconds of the parts of one pass of P-KL."""
    head = shape.vocabulary * shape.width
    blocks = -(-MICRO // max(256, int(card / 12 / 24 / shape.vocabulary) // 256 * 256))
    attention = MICRO * (1 + BACKWARD)
    return {
        "body": 6 * shape.body() * MICRO / RATES["the body in training, autocast and eager"],
        "attention": attention * shape.attention(SAMPLE / 2) / RATES["attention by segments"],
        "products with the head": 6 * head * MICRO / MATRICES,
        "passes over logits": LOSS_PASSES * 4 * shape.vocabulary * MICRO / MEMORY,
        "adding up the head's gradient": blocks * 8 * head / MEMORY,
        "waiting": blocks * BLOCK_SECONDS,
        "casting weights, adding up gradients": 18 * shape.parameters / MEMORY,
        "AdamW": 28 * shape.parameters / MEMORY * MICRO / STEP,
    }


def masked(shape: Shape) -> float:
    """Seconds of attention in a pass under a dense mask, which computes the square."""
    return MICRO * (1 + BACKWARD) * shape.attention(ROW_OF_TOKENS) / RATES["attention under a dense mask"]


def capture(shape: Shape, workers: int = 1) -> dict[str, float]:
    """Seconds of ``ROWS`` tokens of a teacher on so many GPUs: of its body, of the head, and of rows in each way."""
    body = 2 * shape.body() + shape.attention(SAMPLE_PREFILL / 2)
    rate = RATES["the body of a prefill with experts" if shape.all > 1 else "the body of a prefill"]
    read = 4 * shape.vocabulary * ROWS / MEMORY
    gather = gathered_bytes(shape, workers) / LINK + (2 * read if workers > 1 else 0)  # and a copy in another order
    sliced = sent_bytes(workers, K) / LINK + (CALLS * MESSAGE if workers > 1 else 0)
    return {
        "body": body * ROWS / rate / workers,
        "head": 2 * shape.width * shape.vocabulary * ROWS / MATRICES / workers,
        "vllm": VLLM_PASSES * read + gather,
        "torch": TORCH_PASSES * read / workers + sliced,
        "kernels": (1 + min(1.0, K * TILE * workers / shape.vocabulary)) * read / workers + SMALL + sliced,
    }


def gathered_bytes(shape: Shape, workers: int) -> float:
    """What a GPU receives where float32 logits of ``ROWS`` rows are gathered on each."""
    return 4 * shape.vocabulary * ROWS * (workers - 1) / workers


def sent_bytes(workers: int, k: int, **asked: int) -> float:
    """What it receives of such rows where each reads its own slice."""
    return wire_bytes(k, **asked) * ROWS * (workers - 1)


def training_table() -> list[str]:
    """Milliseconds per pass."""
    parts = {name: training(MODELS[name]) for name in STUDENTS}
    total = {name: sum(found.values()) for name, found in parts.items()}
    masks = {name: total[name] + masked(MODELS[name]) - parts[name]["attention"] for name in STUDENTS}

    def line(label: str, value: Mapping[str, float]) -> str:
        return f"| {label} | " + " | ".join(f"{value[name]:,.0f}" for name in STUDENTS) + " |"

    return [
        f"| ms of a pass of {MICRO:,} tokens, P-KL and CE | {' | '.join(STUDENTS)} |",
        "|---|" + "---:|" * len(STUDENTS),
        *(line(part, {name: 1000 * parts[name][part] for name in STUDENTS}) for part in parts[STUDENTS[0]]),
        line("**pass**", {name: 1000 * total[name] for name in STUDENTS}),
        line("tokens per second", {name: MICRO / total[name] for name in STUDENTS}),
        line(
            f"tokens per second with a dense mask, rows of {ROW_OF_TOKENS:,}", {n: MICRO / masks[n] for n in STUDENTS}
        ),
    ]


def capture_table() -> list[str]:
    """Milliseconds per ``ROWS`` tokens, and shares of a prefill without head."""
    columns = (
        "body",
        "head",
        "vLLM's top k",
        "torch",
        "kernels",
        "share: vLLM's top k",
        "torch",
        "kernels",
        "head alone",
    )
    lines = [f"| teacher, ms per {ROWS:,} tokens | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, workers in TEACHERS.items():
        found = capture(MODELS[name], workers)
        body, head, *seconds = found.values()
        on = f"{name} on {workers} GPUs" if workers > 1 else name
        times = " | ".join(f"{1000 * value:.1f}" for value in found.values())
        shares = " | ".join(f"{body / (body + head + way):.2f}" for way in (*seconds, 0))
        lines.append(f"| {on} | {times} | {shares} |")
    return lines


def wire_table() -> list[str]:
    """MB that a GPU receives per ``ROWS`` rows."""
    shape, gpus = MODELS["Qwen3-32B"], (2, 4, 8)
    ways: dict[str, Callable[[int], float]] = {
        "whole logits": lambda workers: gathered_bytes(shape, workers),
        f"slices, k {K}": lambda workers: sent_bytes(workers, K),
        f"slices, k {K}, two temperatures": lambda workers: sent_bytes(workers, K, temperatures=2),
        "slices, 50 samples": lambda workers: sent_bytes(workers, 1, samples=50),
    }
    columns = " | ".join(f"{workers} GPUs" for workers in gpus)
    return [
        f"| MB received per {ROWS:,} rows, {shape.vocabulary:,} tokens | {columns} |",
        "|---|" + "---:|" * len(gpus),
        *(
            f"| {name} | " + " | ".join(f"{of(workers) / 1e6:,.1f}" for workers in gpus) + " |"
            for name, of in ways.items()
        ),
    ]


def memory_table() -> list[str]:
    """GB of a student and of what a pass keeps."""
    names = ("SmolLM2-135M", "Qwen3-0.6B", "Llama-3.2-1B", "Qwen3-1.7B", "Llama-3.2-3B", "Llama-3.1-8B")
    lines = ["| GB | itself | a pass of 16,384 tokens | with `--activation-checkpointing` |", "|---|---:|---:|---:|"]
    for name in names:
        shape = MODELS[name]
        kept = [activation_bytes(shape, MICRO, checkpointing=checkpointing) / 1e9 for checkpointing in (False, True)]
        lines.append(f"| {name} | {own_bytes(shape) / 1e9:.1f} | {kept[0]:.1f} | {kept[1]:.1f} |")
    return lines


def rates_table() -> list[str]:
    """What is assumed."""
    lines = ["| assumed of one H100 SXM | |", "|---|---:|"]
    for name, rate in RATES.items():
        unit = f"{rate / 1e12:g} TB/s" if name == "memory" else f"{rate / 1e9:g} GB/s" if "NVLink" in name else ""
        lines.append(f"| {name} | {unit or f'{rate / 1e12:g} TFLOP/s'} |")
    return lines


def tables() -> list[list[str]]:
    """All, as the documents show them."""
    return [rates_table(), training_table(), capture_table(), wire_table()]


def figures() -> dict[str, Any]:
    """The same as numbers: seconds, bytes, tokens per second."""
    return {
        "rates": RATES,
        "training": {name: training(MODELS[name]) for name in STUDENTS},
        "under a mask": {name: masked(MODELS[name]) for name in STUDENTS},
        "capture": {f"{name}, {workers}": capture(MODELS[name], workers) for name, workers in TEACHERS.items()},
    }


def report() -> str:
    """Markdown."""
    lines = ["# On an H100, computed", "", "`python -m benchmarks.gpu_arithmetic`. **Nothing here is measured.**", ""]
    for table in (*tables(), memory_table()):
        lines += [*table, ""]
    return "\n".join(lines[:-1]) + "\n"


def main() -> None:
    """Write the tables."""
    text = report()
    print(text)
    RESULTS.joinpath("gpu_arithmetic.md").write_text(text, encoding="utf-8")
    RESULTS.joinpath("gpu_arithmetic.json").write_text(json.dumps(figures(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
