"""Folders of training runs as ``xtoken train`` writes them, with curves that look like real ones and no training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

GAIN = {"ce": 0.0, "p-kl": 0.06, "alm": 0.03, "h-kl": 0.05}  # bits per byte that a loss wins over CE
HASH = "0123456789abcdef" * 4
Lines = Iterable[dict[str, Any]]


def write_lines(path: Path, lines: Lines) -> None:
    """JSON lines, as ``json`` writes them by default."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    root: Path,
    loss: str = "p-kl",
    seed: int = 0,
    *,
    steps: int = 400,
    finished: bool = True,
    held_out: bool = True,
    documents: int = 60,
    text: str = "The whale rose.",
    **identity: Any,
) -> str:
    """One run; ``identity`` overrides fields of run.json's identity and configuration. Returns its folder."""
    rng = np.random.default_rng([seed, len(loss)])
    root.mkdir(parents=True)
    fields = {
        "loss": [loss],
        "mix": "fixed",
        "kd_weight": 1.0,
        "ce_weight": 0.1,
        "steps": 400,
        "lr": 5e-5,
        "seed": seed,
    }
    fields |= {"student": ".cache/models/smollm2-135m", "targets_hash": [HASH], **identity}
    config = {**fields, "out": str(root), "device": "auto", "targets": ["/data/targets"]}
    run = {"identity": fields, "run_hash": HASH, "config": config, "xtoken_version": "0.4.0"}
    run |= {"argv": ["xtoken", "train", "/data/targets", "--loss", loss, "--seed", str(seed)]}
    run |= {"environment": {"torch": "2.8.0", "python": "3.11.7", "machine": "x86_64"}}
    (root / "run.json").write_text(json.dumps(run))
    bits = 1.9 - GAIN[loss] + rng.normal(0, 0.004)
    lines = list(metrics(rng, loss, steps, bits, finished=finished, held_out=held_out))
    write_lines(root / "metrics.jsonl", lines)
    if not finished:
        return str(root)
    after = {k: v for k, v in lines[-1].items() if k not in ("step", "eval")} if held_out else {}
    last = next(line for line in reversed(lines) if "loss" in line)
    summary = {"steps": steps, "tokens": last["tokens"], "seconds": 2.0 * steps, "loss": last["loss"], "ce": last["ce"]}
    (root / "summary.json").write_text(json.dumps(summary | ({"after": after} if after else {})))
    if held_out:
        write_lines(root / "held-out.jsonl", held_out_lines(rng, bits, documents))
        write_lines(root / "completions.jsonl", completion_lines(loss, text))
    return str(root)


def metrics(rng: np.random.Generator, loss: str, steps: int, bits: float, *, finished: bool, held_out: bool) -> Lines:
    """Lines of metrics.jsonl."""
    if held_out:
        yield {"step": 0, "eval": "before", **evaluation(2.6, 1.4)}
    tokens = 0
    for step in range(1, steps + 1):
        tokens += 4096 - int(rng.integers(0, 60))
        ce = 2.4 + 1.6 * np.exp(-step / 60) - GAIN[loss] + rng.normal(0, 0.12)
        kd = 0.35 + 1.1 * np.exp(-step / 80) + rng.normal(0, 0.05)
        line = {"step": step, "epoch": step // 150, "tokens": tokens, "seconds": 2.0 + rng.normal(0, 0.1)}
        line |= {"tokens_per_s": 2000 + rng.normal(0, 100), "lr": 5e-5 * min(1.0, step / 20), "chunks": 3000}
        line |= {"top1_agreement": 0.6 + step / 9000} if step % 10 == 0 and loss != "ce" else {}
        line |= {"grad_norm": float(np.exp(rng.normal(0.3, 0.3))), "padding": 0.08, "ce": ce}
        yield line | ({"loss": ce} if loss == "ce" else {"kd": kd, "loss": kd + 0.1 * ce})
        if held_out and step % 100 == 0 and step < steps:
            yield {
                "step": step,
                "eval": "step",
                **evaluation(bits + 0.6 * np.exp(-step / 90), 0.4 + np.exp(-step / 90)),
            }
    if held_out and finished:
        yield {"step": steps, "eval": "after", **evaluation(bits, 0.4 + 0.2 * (bits - 1.8))}


def evaluation(bits: float, kl: float) -> dict[str, Any]:
    """Figures of an evaluation line."""
    parts = ("numerals_1", "numerals_3", "whitespace", "operators", "latin", "other_scripts")
    categories = {
        n: {"kl": kl * (1 + i / 5), "top1_agreement": 0.7 - i / 50, "chunks": 900} for i, n in enumerate(parts)
    }
    sources = {name: {"bits_per_byte": bits + add, "bytes": 2e5} for name, add in (("books", -0.1), ("web", 0.2))}
    figures = {"bits_per_byte": bits, "bytes": 4e5, "kl": kl, "top1_agreement": 0.7 - kl / 10, "chunks": 9000}
    return {**figures, "teacher_bits_per_byte": 1.41, "by_source": sources, "by_category": categories}


def held_out_lines(rng: np.random.Generator, bits: float, documents: int) -> Lines:
    """Lines of held-out.jsonl, two windows of a document; the hard ones are hard for every run."""
    hard = np.random.default_rng(7).normal(0, 0.4, documents)
    for when, mean in (("before", 2.6), ("after", bits)):
        for at in range(documents):
            for window in range(2):
                value = mean + hard[at] + rng.normal(0, 0.02)
                yield {"when": when, "id": f"doc-{at}#{window}", "source": "books", "bits": 500 * value, "bytes": 500}


def completion_lines(loss: str, text: str) -> Lines:
    """Lines of completions.jsonl."""
    for when in ("before", "after"):
        for at in range(2):
            wrote = text if when == "before" else f"{text} ({loss} wrote this)"
            line = {"when": when, "id": f"doc-{at}#0", "prompt": "Call me ", "completion": wrote * 3}
            yield line | {"text": "Ishmael. Some years ago - never mind how long precisely - having little money"}
