"""The whole way on real models: capture, W, align, train with P-KL and with CE alone, compare.

    make demo                              # prepares the models, then runs this
    python examples/demo.py --steps 30     # again; what is done already is not done twice

Each step is a command of xtoken, shown before it runs; its figures are what ``--json`` prints.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = "gemma-3-270m", "smollm2-135m"
HELD_OUT_TEXT = "moby-dick-held-out"
HELD_OUT = ("bits_per_byte", "kl", "top1_agreement")
Figures = dict[str, Any]


def main() -> None:
    asked = arguments()
    for source in (asked.teacher, asked.student):
        if source.startswith(models()) and not Path(source).is_dir():
            raise SystemExit(f"error: {source} does not exist: 'make demo' prepares it")
    began = time.monotonic()
    captures = {"train": captured(asked, "train", "moby-dick"), "held-out": captured(asked, "held-out", HELD_OUT_TEXT)}
    runs = {
        "p-kl": trained(asked, "p-kl", ["--kd-weight", "1.0", "--ce-weight", "1.0"]),
        "ce": trained(asked, "ce", []),
    }
    folders = [f"{asked.out}/run-{loss}" for loss in runs]
    page = xtoken(asked, "report", *folders, "--out", f"{asked.out}/report.html")["page"]
    show(figures(page, captures["train"], runs, time.monotonic() - began), as_json=asked.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo-run", help="folder for everything the demo writes; a rerun resumes")
    parser.add_argument("--teacher", default=f"{models()}/{TEACHER}", help="by default the one of 'make demo'")
    parser.add_argument("--student", default=f"{models()}/{STUDENT}", help="likewise")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="neither commands nor progress")
    return parser.parse_args()


def models() -> str:
    return os.path.relpath(ROOT / ".cache" / "models")


def texts(name: str) -> str:
    return f"{os.path.relpath(ROOT / 'examples' / 'data')}/{name}.jsonl"


def captured(asked: argparse.Namespace, name: str, text: str) -> Figures:
    """A capture of a text, and its targets through W, which the first capture makes; figures of both."""
    capture, targets, w = (f"{asked.out}/{folder}" for folder in (f"capture-{name}", f"targets-{name}", "w"))
    found = xtoken(
        *(asked, "precompute", texts(text), "--id-field", "id", "--teacher", asked.teacher, "--out", capture),
        *("--max-tokens", "512", "--shard-bytes", str(1 << 15)),
    )
    if name == "train":
        xtoken(asked, "project", "--student", asked.student, "--teacher", capture, "--out", w)
    words = [capture, "--student", asked.student, "--out", targets, "--w", w, "--for", "p-kl"]
    return found | {f"align_{key}": value for key, value in xtoken(asked, "align", *words).items()}


def trained(asked: argparse.Namespace, loss: str, weights: list[str]) -> Figures:
    sizes = ["--step-tokens", "512", "--micro-tokens", "512", "--warmup", "5"]
    return xtoken(
        *(asked, "train", f"{asked.out}/targets-train", "--student", asked.student, "--out", f"{asked.out}/run-{loss}"),
        *("--loss", loss, "--steps", str(asked.steps), *sizes, *weights),
        *("--eval-text", texts(HELD_OUT_TEXT), "--eval-targets", f"{asked.out}/targets-held-out"),
    )


def xtoken(asked: argparse.Namespace, *words: str) -> Figures:
    """Show a command of xtoken and run it; its figures. What it says on the way stands on standard error."""
    if not asked.quiet:
        sys.stderr.write(f"$ xtoken {shlex.join(words)}\n")
    quiet = ["--quiet"] if asked.quiet else []
    command = [sys.executable, "-m", "xtoken", *words, *quiet, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout))


def figures(page: str, train: Figures, runs: dict[str, Figures], seconds: float) -> Figures:
    """What the demo shows at its end: a row for each model on the held-out chapter."""
    before = runs["ce"]["before"]
    rows = [{"model": "teacher", "bits_per_byte": before["teacher_bits_per_byte"]}]
    rows.append({"model": "student before"} | {name: before[name] for name in HELD_OUT})
    for loss, run in runs.items():
        rows.append({"model": f"student after {loss}"} | {name: run["after"][name] for name in HELD_OUT})
    return {
        "tokens_captured": train["tokens"],
        "tokens_per_second": train["tokens"] / train["seconds"],
        "bytes_per_token": train["bytes_per_token"],
        "entries_per_row": train["entries_per_row"],
        "share_of_1_1_chunks": train["align_share_of_1_1_chunks"],
        "training_steps": runs["ce"]["steps"],
        "minutes": seconds / 60,
        "page": page,
        "held_out": rows,
    }


def show(found: Figures, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console

    from xtoken.schemas.ui.tables import shown

    Console().print(*shown(found), sep="\n")


if __name__ == "__main__":
    main()
