"""Checks of captures: by transformers, and by vLLM against them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_check.inputs import Figures, captured, on_gpu

STEP = {True: 16_384, False: 256}
NEAR = 0.05  # nats: two engines of bfloat16 on the same tokens, mean over rows


def capture_hf(work: Path) -> Figures:
    """A capture by transformers."""
    _, figures = captured(work, "capture-hf")
    return _rates(figures)


def capture_vllm(work: Path) -> Figures:
    """A capture by vLLM: which of its runners, which way rows leave it, and how far they are from transformers'."""
    theirs, _ = captured(work, "capture-hf")
    out, figures = captured(work, "capture-vllm", "--backend", "vllm", "--batch-tokens", STEP[on_gpu()])
    manifest = json.loads((out / "manifest.json").read_text())
    path = manifest["teacher"]["capture_path"]
    found = _rates(figures) | {"path": path, "runner": manifest["engine_settings"]["model_runner"]}
    found["labels apart, nats"] = _apart(theirs, out, "realised_logprob")
    if path != "vllm-rows":
        raise AssertionError(f"vLLM gives no full distributions here, the log says why: {found}")
    found["P(space) apart, nats"] = _apart(theirs, out, "space_logprob")
    if max(found["labels apart, nats"], found["P(space) apart, nats"]) > NEAR:
        raise AssertionError(f"rows by transformers and vLLM are further apart than {NEAR} nats: {found}")
    return found


def _rates(figures: Mapping[str, Any]) -> Figures:
    return {"tokens": figures["tokens"], "seconds": figures["seconds"], "bytes per token": figures["bytes_per_token"]}


def _apart(one: Path, other: Path, column: str) -> float:
    """Mean difference of a column of log-probabilities."""
    from xtoken.pipeline.store.reader import iter_capture

    rows = []
    for capture in (one, other):
        batches = iter_capture(str(capture), ["sample_id", column])
        rows.append({row["sample_id"]: row[column] for batch in batches for row in batch.to_pylist()})
    assert rows[0].keys() == rows[1].keys(), "the captures hold other samples"
    return float(np.mean([np.abs(np.subtract(rows[0][name], rows[1][name])).mean() for name in rows[0]]))
