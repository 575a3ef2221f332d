"""What is computed for a GPU: by hand for one model, and the documents show what the script gives."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent
with pytest.MonkeyPatch.context() as patch:  # scripts are run from there, and import each other by these names
    patch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_arithmetic
    from benchmarks.gpu_check import report
    from benchmarks.gpu_sizes import MODELS, pass_bytes, wire_bytes

PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_sizes_are_those_of_the_models() -> None:
    """Parameters without norms and routers of experts, as the model cards round them."""
    billions = {name: round(shape.parameters / 1e9, 2) for name, shape in MODELS.items()}
    assert billions["Llama-3.2-1B"] == 1.24
    assert billions["Qwen3-4B"] == 4.02
    assert billions["Qwen3-30B-A3B"] == 30.52
    assert billions["Qwen3-32B"] == 32.76
    assert round(MODELS["Qwen3-30B-A3B"].body() / 1e9, 1) == 2.7, "what one token goes through, without head and table"


def test_a_pass_by_hand() -> None:
    """Llama-3.2-1B: 16 layers of 60.8 million, a head of 263 million, 16,384 tokens in 8 blocks of 2,048 or 2,304."""
    found = gpu_arithmetic.training(MODELS["Llama-3.2-1B"])
    layer = 2 * 2048 * (2048 + 512) + 3 * 2048 * 8192
    head = 128_256 * 2048
    assert found["body"] == pytest.approx(6 * 16 * layer * 16_384 / 400e12)
    assert found["products with the head"] == pytest.approx(6 * head * 16_384 / 600e12)
    assert found["adding up the head's gradient"] == pytest.approx(8 * 8 * head / 2.7e12)
    assert found["waiting"] == pytest.approx(8 * 0.5e-3)
    assert found["attention"] == pytest.approx(3.5 * 16_384 * 16 * 4 * 2048 * 500 / 300e12)


def test_rows_by_hand() -> None:
    """Qwen3-32B on four GPUs: 467 MB of logits come from the others, or 64 keys, five sums and 12 bytes of a row."""
    assert wire_bytes(64) == 8 * 64 + 8 * 5 + 4 + 8
    assert wire_bytes(1, samples=50) == 8 * 6 + 12 + 8 * 52
    assert gpu_arithmetic.gathered_bytes(MODELS["Qwen3-32B"], 4) == pytest.approx(1024 * 151_936 * 4 * 0.75)
    assert gpu_arithmetic.sent_bytes(4, 64) == 3 * 1024 * 564
    alone = gpu_arithmetic.capture(MODELS["Qwen3-4B"])
    assert alone["kernels"] == pytest.approx((1 + 64 * 512 / 151_936) * 4 * 151_936 * 1024 / 2.7e12 + 1e-4)
    assert alone["vllm"] == pytest.approx(8 * 4 * 151_936 * 1024 / 2.7e12)


def test_results_are_what_the_script_gives() -> None:
    assert (RESULTS / "gpu_arithmetic.md").read_text(encoding="utf-8") == gpu_arithmetic.report()
    assert json.loads((RESULTS / "gpu_arithmetic.json").read_text(encoding="utf-8")) == gpu_arithmetic.figures()


def test_the_document_shows_them() -> None:
    for table in gpu_arithmetic.tables():
        assert "\n".join(table) in PERFORMANCE, table[0]


def test_the_memory_that_training_needs_is_computed_alike() -> None:
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\S+) \| [\d.]+ \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(shown) == 6
    for name, *gigabytes in shown:
        passes = [pass_bytes(MODELS[name], tokens) for tokens in (1024, 4096, 16_384)]
        passes.append(pass_bytes(MODELS[name], 16_384, checkpointing=True))
        assert [round(one / 1e9) for one in passes] == [int(one) for one in gigabytes], name


def test_the_document_shows_what_was_measured() -> None:
    path = RESULTS / "gpu_check.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    assert report.filled(PERFORMANCE, found) == PERFORMANCE
    assert path.exists() or PERFORMANCE.count(report.NOT_YET) == len(report.rows())


def test_a_check_fills_its_place() -> None:
    checks: dict[str, Any] = {
        "environment": {"verdict": "passed", "figures": {"device": "NVIDIA H100"}},
        "trainer-p-kl": {"verdict": "passed", "figures": {"tokens per second": 41_234.5}},
        "engine-killed": {"verdict": "failed", "why": "it hung"},
    }
    document = report.filled(PERFORMANCE, {"checks": checks})
    assert "measured on NVIDIA H100" in document
    assert "| Llama-3.2-1B, tokens per second, P-KL | 46,429 | 41,234 |" in document
    assert "| a killed engine is noticed after, seconds |  | failed |" in document
    assert report.filled(document, None) == report.filled(PERFORMANCE, None)
