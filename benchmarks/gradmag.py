"""What ``--mix gradmag`` costs: a step that measures gradients, and one that does not, against ``--mix fixed``.

    python -m benchmarks.gradmag TARGETS --student FOLDER

Targets hold p-kl, h-kl, alm and byte-prefix. Steps are those of ``benchmarks.step``: the same student, rows of text
and AdamW, in turns in one process; figures are medians of the ratios of a turn.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, machine_line
from benchmarks.step import OURS, Bench
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.step import count_step, run_step

RESULTS = Path(__file__).parent / "results"
EVERY = 10
KINDS = {"fixed": ("fixed", 2), "between": ("gradmag", 2), "measured": ("gradmag", 1 + EVERY), "first": ("gradmag", 1)}


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets")
    parser.add_argument("--student", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options)
    losses = {name: _ratios(bench, name, options.turns) for name in OURS if name != "ce"}
    result = {"machine": machine(), "tokens": bench.tokens, "threads": options.threads, "losses": losses}
    text = _table(result)
    print(text)
    if options.write:
        (RESULTS / "gradmag.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "gradmag.md").write_text(text)


def _ratios(bench: Bench, name: str, turns: int) -> dict[str, float]:
    """Seconds of a step of ``--mix fixed``, and what the others take times that."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):
        for kind, (mode, step) in KINDS.items():
            began = time.perf_counter()
            _step(bench, name, mode, step)
            if turn:  # the first pays for what is made once
                seconds[kind].append(time.perf_counter() - began)
        print(f"{name}: turn {turn} of {turns}", file=sys.stderr)
    found = {"seconds": statistics.median(seconds["fixed"])}
    for kind in list(KINDS)[1:]:
        pairs = zip(seconds[kind], seconds["fixed"], strict=True)
        found[kind] = statistics.median(one / other for one, other in pairs)
    return found


def _step(bench: Bench, name: str, mode: str, step: int) -> None:
    mixing, batch, ranks = Mixing(mode, 1.0, 1.0, every=EVERY), bench.batches[name], Ranks()
    if step > 1:
        mixing.observe([1.0, 1.0])
    run_step(Objective(bench.student, (bench.losses[name],)), batch, count_step(batch, ranks), mixing, ranks, step=step)
    bench.update()


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# Mixing by gradients",
        "",
        f"{machine_line()}; {result['threads']} threads.",
        f"SmolLM2-135M, {result['tokens']} student tokens per step, float32; times a step of `--mix fixed`, medians of",
        f"turns; `python -m benchmarks.gradmag` says what each is. Mean: one step in {EVERY} is measured.",
        "",
        "| loss | seconds, fixed | not measured | measured | first | mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in result["losses"].items():
        mean = (one["measured"] + (EVERY - 1) * one["between"]) / EVERY
        lines.append(
            f"| {name} | {one['seconds']:.3f} | {one['between']:.3f} | {one['measured']:.3f} | {one['first']:.3f} "
            f"| {mean:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
