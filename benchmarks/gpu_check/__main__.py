"""Check xtoken on the GPU at hand: what runs, how fast, and whether fast ways give the values of slow ones.

    python -m benchmarks.gpu_check WORK [--budget 840] [--only trainer-ce,vllm] [--write]

Nothing is installed or downloaded: models have random weights and the sizes of Llama-3.2-1B, Qwen3-0.6B and of a few
layers of Gemma-3-4b, texts are the repository's. Each check is a process of its own, so that a crash ends none but
itself, in order of value while the budget (seconds) lasts. WORK/checks.json is written after each. What lacks a GPU or
a package says "not run" and why; without a GPU toy models are used, so that the script itself is tested everywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.checks import CHECKS, Check, Result, lacking
from benchmarks.gpu_check.inputs import on_gpu
from benchmarks.gpu_check.report import DOCUMENT, filled, shown
from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Run the checks, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--budget", type=float, default=840.0, help="seconds in all")
    parser.add_argument("--only", default="", help="names of checks, by commas")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="on a GPU, also write benchmarks/results and docs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    known = {check.name: check for check in CHECKS}
    if options.one:
        print(json.dumps(known[options.one].run(options.work)))
        return
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(known)}")
    until, results = time.monotonic() + options.budget, dict[str, Result]()
    for name in names:
        results[name] = attempt(known[name], options.work, until)
        print(line(name, results[name]), flush=True)
        found = {"machine": machine(), "checks": results}
        (options.work / "checks.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.write and not on_gpu():
        print("nothing is written to benchmarks/results or docs/performance.md: there is no GPU, and these were toys")
    elif options.write:
        (RESULTS / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "gpu_check.md").write_text(table(found))
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")
    if any(one["verdict"] == "failed" for one in results.values()):
        sys.exit(1)


def attempt(check: Check, work: Path, until: float) -> Result:
    """One check in a process of its own; how it ended."""
    if why := lacking(check):
        return {"verdict": "not run", "why": why}
    left = until - time.monotonic()
    if left < check.least:
        return {"verdict": "not run", "why": f"{left:.0f} s of the budget were left, and it takes {check.least:.0f}"}
    left = min(left, check.most)
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(work), "--one", check.name]
    log = work / f"{check.name}.log"
    with log.open("w") as said:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"verdict": "failed", "why": f"it took longer than the {left:.0f} s that it had; see {log}"}
    seconds = round(time.monotonic() - began, 1)
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"verdict": "failed", "why": last[0][:300], "seconds": seconds}
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": seconds}


def line(name: str, result: Result) -> str:
    """A check in one line."""
    figures = ", ".join(f"{key} {shown(value)}" for key, value in result.get("figures", {}).items())
    return f"{result['verdict']:8} {name}: {'; '.join(filter(None, [figures, result.get('why', '')]))}"


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    host = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    lines = [
        "# On a GPU",
        "",
        f"`python -m benchmarks.gpu_check WORK` on {host}.",
        "",
        "| check | | figures |",
        "|---|---|---|",
    ]
    for name, result in found["checks"].items():
        text = line(name, result).partition(": ")[2]
        lines.append(f"| {name} | {result['verdict']} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
