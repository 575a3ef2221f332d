"""What the documents show of the checks: a table beside what was computed, which says so until a GPU has run them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_arithmetic import MICRO, ROWS, capture, training
from benchmarks.gpu_sizes import MODELS, pass_bytes

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: make gpu-check fills this table -->", "<!-- measured: end -->"
NOT_YET = "not measured yet"
_STUDENT, _TEACHER = "Llama-3.2-1B", "Qwen3-0.6B"


def shown(value: Any) -> str:
    """A figure as people read it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rows() -> list[tuple[str, float | None, str, str]]:
    """What is shown, what is computed of it for an H100, and the check and figure that measure it."""
    parts, teacher = training(MODELS[_STUDENT]), capture(MODELS[_TEACHER])
    seconds = sum(parts.values())
    share = teacher["body"] / (teacher["body"] + teacher["head"] + teacher["kernels"])
    plain, kept = (pass_bytes(MODELS[_STUDENT], MICRO, checkpointing=one) / 1e9 for one in (False, True))
    return [
        (f"{_STUDENT}, tokens per second, P-KL", MICRO / seconds, "trainer-p-kl", "tokens per second"),
        (f"{_STUDENT}, tokens per second, CE", None, "trainer-ce", "tokens per second"),
        ("ms of a pass, attention by segments", 1000 * seconds, "attention", "ms by segments"),
        ("ms of a pass, attention under a dense mask", None, "attention", "ms by masks"),
        ("GB at the peak (computed: without blocks of logits, a twelfth of the card)", plain, "memory", "plain, GB"),
        ("the same with `--activation-checkpointing`", kept, "memory", "checkpointing, GB"),
        (f"ms of {ROWS:,} rows, top k, kernels", 1000 * teacher["kernels"], "kernels", "ms, top k, kernels"),
        (f"ms of {ROWS:,} rows, top k, torch", 1000 * teacher["torch"], "kernels", "ms, top k, torch"),
        (f"{_TEACHER} under vLLM, share of a prefill, steps of 16,384", share, "rate-large-steps", "ratio"),
        (f"{_TEACHER} under vLLM, share of a prefill, steps of 2,048", None, "rate-small-steps", "ratio"),
        ("labels by vLLM and transformers apart, nats", None, "capture-vllm", "labels apart, nats"),
        ("a killed engine is noticed after, seconds", None, "engine-killed", "seconds"),
    ]


def measured(found: Mapping[str, Any] | None) -> list[str]:
    """The table; of what ``checks.json`` holds."""
    checks = {} if found is None else found["checks"]
    device = checks.get("environment", {}).get("figures", {}).get("device", "a GPU")
    lines = [f"| | computed for an H100 | measured on {device} |", "|---|---:|---:|"]
    for label, computed, check, figure in rows():
        one = checks.get(check, {})
        value = one.get("figures", {}).get(figure)
        text = shown(value) if value is not None else one.get("verdict", NOT_YET)
        lines.append(f"| {label} | {'' if computed is None else shown(computed)} | {text} |")
    return lines


def filled(document: str, found: Mapping[str, Any] | None) -> str:
    """The document with its table of measured values written again."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *measured(found), "", END]) + after
