"""What do two models of different tokenizers gain by reading bytes together, what is lost, and what does it cost?

SmolLM2-135M and Gemma-3-270m on the beginning of the held-out text of the demo, by ``xtoken eval --combine bytes``.

    python -m benchmarks.ensemble              # writes benchmarks/results/ensemble.{json,md}
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line
from xtoken.cli import run_eval
from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.ui.progress import Bars

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = [str(ROOT / ".cache" / "models" / name) for name in ("smollm2-135m", "gemma-3-270m")]
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
BYTES = 400


def table(figures: dict[str, Any]) -> str:
    """A row for each model and one for both."""
    lines = [
        "| | bits per byte | of its own tokens | lost | forward passes per byte | seconds per byte |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['bits_per_byte']:.4f} | {row['token_bits_per_byte']:.4f} | "
        f"{row['lost']:.2%} | {row['passes_per_byte']:.2f} | {row['seconds_per_byte']:.2f} |"
        for row in figures["models"]
    ]
    both = f"| both, mean of P(next byte) | {figures['bits_per_byte']:.4f} | | | | {figures['seconds_per_byte']:.2f} |"
    return "\n".join([*lines, both])


def main() -> None:
    """Measure and write the results."""
    config = EvalConfig(model=MODELS, combine="bytes", text=str(TEXT), max_bytes=BYTES, device="cpu")
    figures = run_eval(config, Bars(quiet=False))
    for row in figures["models"]:
        row["model"] = Path(row["model"]).name  # where it lies is of no interest
    (RESULTS / "ensemble.json").write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
    text = [
        "# Two models of different tokenizers, byte by byte",
        f"The first {figures['bytes']} bytes of {TEXT.name}. Of its own tokens: the same bytes by the tokenizer's own "
        "tokenization alone, the usual figure. Lost: mean share of the mass on tokens that the tokenizer would not "
        "write. "
        f"At most {max(row['undecided'] for row in figures['models']):.2%} of the mass was not looked at.",
        table(figures),
        machine_line(),
    ]
    (RESULTS / "ensemble.md").write_text("\n\n".join(text) + "\n")
    sys.stdout.write("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
