"""One rank and two of the same run: how far the curves lie apart, DDP and FSDP2, on gloo.

    python -m benchmarks.ranks TARGETS --student FOLDER

SmolLM2-135M learns from real targets by P-KL for a few steps of two streams: in one process, in two replicated and in
two sharded. Both start from the same weights and take the same samples; what differs is the order of sums.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line

RESULTS = Path(__file__).parent / "results"
XTOKEN = Path(sys.executable).with_name("xtoken")
FIGURES = ("loss", "kd", "ce", "grad_norm")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def curve(options: argparse.Namespace, folder: Path, name: str, ranks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Lines of metrics of one run."""
    flags = {"student": options.student, "loss": "p-kl", "steps": options.steps, "step-tokens": options.step_tokens}
    flags |= {"micro-tokens": 256, "max-tokens": 256, "streams": 2, "warmup": 2, "decoders": 1, "device": "cpu"}
    flags |= {"parallel": "fsdp" if name == "fsdp" else "ddp", "out": folder / name, "save-every": 10_000}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, *ranks, str(XTOKEN), "train", options.targets, *words, "--quiet"]
    threads = {"OMP_NUM_THREADS": "1" if ranks else "2"}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets")
    parser.add_argument("--student", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--step-tokens", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: curve(options, Path(folder), name, ranks)
            for name, ranks in (("one", ()), ("ddp", TWO), ("fsdp", TWO))
        }
    apart = {
        name: {
            figure: max(abs(two[figure] / one[figure] - 1) for one, two in zip(runs["one"], runs[name], strict=True))
            for figure in FIGURES
        }
        for name in ("ddp", "fsdp")
    }
    result = {"machine": machine(), "steps": options.steps, "apart": apart, "curves": runs}
    (RESULTS / "ranks.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# One rank and two",
        "",
        f"{machine_line()}. SmolLM2-135M, P-KL, {options.steps} steps of {options.step_tokens} tokens, two streams,",
        "gloo: `python -m benchmarks.ranks`. Largest relative difference of a step's figure to one process.",
        "",
        "| | " + " | ".join(FIGURES) + " |",
        "|---|" + "---|" * len(FIGURES),
        *(f"| {name} | " + " | ".join(f"{apart[name][figure]:.1e}" for figure in FIGURES) + " |" for name in apart),
        "",
        "| step | one process: KD | CE | DDP: KD | CE | FSDP2: KD | CE |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {one['step']} | {' | '.join(f'{line[key]:.6f}' for line in (one, *two) for key in ('kd', 'ce'))} |"
            for one, *two in zip(runs["one"], runs["ddp"], runs["fsdp"], strict=True)
        ),
    ]
    (RESULTS / "ranks.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
