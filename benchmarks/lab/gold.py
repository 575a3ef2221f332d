"""Side by side with TRL's GOLD trainer, whose teacher runs in every step: seconds per step, memory, held-out bits.

    python3 -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0
    python -m benchmarks.lab.gold WORK --python trl/bin/python --rate 2e-3 [--steps 200] [--write]

Same student (10 million parameters, the same random weights), teacher (SmolLM2-135M), texts, steps, learning rate and
schedule, AdamW, machine; one run at a time. TRL is unmodified, in an environment of its own, trains off-policy
(lmbda 0) and learns every token but the first word of a text, which is its prompt. xtoken's rows are captured once,
which is timed too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.compare import difference
from benchmarks.lab.plan import Plan
from benchmarks.lab.texts import JUDGE, OTHER
from benchmarks.lab.work import MODELS, ROOT, STUDENT, Figures, Lab, bits_per_byte, judged
from benchmarks.machine import machine, machine_line
from benchmarks.verbs import xtoken

PIECE = 700  # characters of a text at most, so that none is cut at a window
SAMPLES = 4  # texts of a step
WARMUP = 20
OURS = {
    "ce": ["--loss", "ce"],
    "gold alone": ["--loss", "gold", "--ce-weight", 0],
    "p-kl alone": ["--loss", "p-kl", "--ce-weight", 0],
    "p-kl": ["--loss", "p-kl", "--mix", "gradmag"],
}
# As GOLD's documentation sets it up for models of different tokenizers.
_ULD = {"use_uld_loss": True, "uld_use_hybrid_loss": True}
THEIRS = {"TRL GOLD": _ULD, "TRL GOLD and CE": {**_ULD, "uld_crossentropy_weight": 1.0}}


def main() -> None:
    """Train both, judge both by ``xtoken eval``, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of an environment that has trl")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join([*OURS, *THEIRS]), help="settings, by commas")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    bench = SideBySide(options)
    rows = [bench.ours(name) if name in OURS else bench.theirs(name) for name in options.only.split(",")]
    result = {"machine": machine(), "rate": options.rate, "steps": options.steps, **bench.once(), "rows": rows}
    text = table(result, bench.lab.plan.words["test"])
    print(text)
    if options.write:
        results = ROOT / "benchmarks" / "results"
        (results / "lab-gold.json").write_text(json.dumps(result, indent=1) + "\n")
        (results / "lab-gold.md").write_text(text)


class SideBySide:
    """What both sides start from, and a run of either; a run that was done is not done again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lab = Lab(Plan.read(), options.work, options.threads)
        self.work: Path = options.work / "gold"
        self.work.mkdir(exist_ok=True)
        self.texts, self.student = self.work / "pieces.jsonl", self.work / "student"
        if not self.texts.exists():
            pieces = _pieces(options.work / "texts" / "train.jsonl", options.steps * SAMPLES)
            self.texts.write_text("".join(json.dumps(piece) + "\n" for piece in pieces), encoding="utf-8")
        if not (self.student / "config.json").exists():
            _random_student(self.lab.tokenizer("packed-8k"), self.student)

    def once(self) -> Figures:
        """Seconds that capturing and aligning took, and tokens."""
        kept = self.work / "once.json"
        if not kept.exists():
            capture, targets, seconds = self.work / "capture", self.work / "targets", []
            teacher = MODELS / "smollm2-135m"
            words = [
                ["precompute", self.texts, "--id-field", "id", "--teacher", teacher, "--max-tokens", 512],
                ["align", capture, "--student", self.student, "--for", "p-kl,gold"],
            ]
            for verb, out in zip(words, (capture, targets), strict=True):
                began = time.monotonic()
                summary = xtoken([*verb, "--out", out], self.options.threads)
                seconds.append(time.monotonic() - began)
            times = {"capture_seconds": seconds[0], "align_seconds": seconds[1]}
            kept.write_text(json.dumps({**times, "targets": summary}))
        found: Figures = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def ours(self, name: str) -> Figures:
        """A run of xtoken."""
        self.once()
        out = self.work / name.replace(" ", "-")
        tokens = _student_tokens(self.texts, self.student)
        words = ["train", self.work / "targets", "--student", self.student, *OURS[name], "--steps", self.options.steps]
        words += ["--step-tokens", round(tokens / self.options.steps), "--micro-tokens", 2048, "--max-tokens", 512]
        words += ["--lr", self.options.rate, "--warmup", WARMUP, "--completions", 0, "--save-every", 1000, "--out", out]

        def seconds() -> list[float]:
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return [row["seconds"] for row in map(json.loads, lines) if "seconds" in row]

        return self._judged(name, out, [sys.executable, "-m", "xtoken", *map(str, words), "--quiet"], seconds)

    def theirs(self, name: str) -> Figures:
        """A run of TRL."""
        out = self.work / name.replace(" ", "-")
        out.mkdir(exist_ok=True)
        asked = {
            "student": str(self.student.resolve()),
            "teacher": str((MODELS / "smollm2-135m").resolve()),
            "texts": str(self.texts),
            "out": str(out),
            "rate": self.options.rate,
            "steps": self.options.steps,
            "samples": SAMPLES,
            "seed": 0,
            "warmup": WARMUP,
            "loss": THEIRS[name],
        }
        (out / "settings.json").write_text(json.dumps(asked))
        script = Path(__file__).with_name("gold_trl.py")

        def seconds() -> list[float]:
            found: list[float] = json.loads((out / "steps.json").read_text(encoding="utf-8"))["seconds"]
            return found

        command = [str(self.options.python), str(script), str(out / "settings.json")]
        row = self._judged(name, out, command, seconds)
        return row | {"versions": json.loads((out / "steps.json").read_text(encoding="utf-8"))["versions"]}

    def _judged(self, name: str, out: Path, command: Sequence[str], seconds: Any) -> Figures:
        kept = self.work / f"{name.replace(' ', '-')}.json"
        if not kept.exists():
            whole, peak = _run(command, self.options.threads)
            text = self.lab.work / "texts" / "judge.jsonl"
            by_document = out / "documents.jsonl"
            words = ["eval", out / "model", "--text", text, "--id-field", "id", "--out", by_document]
            xtoken(words, self.options.threads)
            steps = seconds()
            row = {
                "setting": name,
                "seconds_per_step": statistics.median(steps[5:] or steps),
                "whole_seconds": whole,
                "peak_mib": peak,
                "documents": judged(by_document),
            }
            kept.write_text(json.dumps(row))
        found: Figures = json.loads(kept.read_text(encoding="utf-8"))
        return found


def table(result: Figures, test: Mapping[str, Any]) -> str:
    """Markdown."""
    rows = result["rows"]
    lines = ["# Beside TRL's GOLD trainer", ""]
    versions = next((row["versions"] for row in rows if "versions" in row), {})
    theirs = ", ".join(f"{name} {found}" for name, found in versions.items())
    capture, align = (f"{result[name]:.0f} s" for name in ("capture_seconds", "align_seconds"))
    lines += [f"`python -m benchmarks.lab.gold WORK --python PYTHON --rate {result['rate']:g}` on {machine_line()}."]
    lines += [f"TRL's environment: {theirs}. Same student of 10 million parameters, teacher SmolLM2-135M,"]
    lines += [f"{result['steps']} steps of {SAMPLES} texts, one seed. xtoken's teacher ran once:"]
    lines += [f"capture {capture}, align {align}.", ""]
    names = (
        "",
        "seconds per step",
        "MiB at the peak",
        "held-out: bits/byte",
        "other: bits/byte",
        "held-out, less TRL GOLD",
    )
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    base = next((row for row in rows if row["setting"] == "TRL GOLD"), None)
    for row in rows:
        figures = [f"{bits_per_byte(row['documents'], kinds):.3f}" for kinds in (JUDGE, OTHER)]
        versus = "" if base is None or row is base else _versus(row, base, test)
        cells = [row["setting"], f"{row['seconds_per_step']:.2f}", f"{row['peak_mib']:.0f}", *figures, versus]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _versus(row: Figures, base: Figures, test: Mapping[str, Any]) -> str:
    names = sorted(name for name in base["documents"] if name.split("/")[0] in JUDGE)
    kinds = sorted({name.split("/")[0] for name in names})
    bits = [np.array([[one["documents"][name][0] for name in names]]) for one in (row, base)]
    size_D = np.array([base["documents"][name][1] for name in names], np.float64)
    kind_D = np.array([kinds.index(name.split("/")[0]) for name in names])
    found = difference(bits[0], bits[1], size_D, kind_D, **test)
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _pieces(texts: Path, wanted: int) -> list[dict[str, str]]:
    """Prompt and completion: the first word of a piece of text, and what follows it; every so many pieces of all."""
    pieces = []
    for row in map(json.loads, texts.read_text(encoding="utf-8").splitlines()):
        for at in range(0, len(row["text"]), PIECE):
            text = row["text"][at : at + PIECE].strip()
            word, space, rest = text.partition(" ")
            if word and rest.strip():
                pieces.append({"id": f"{row['id']}/{at}", "text": text, "prompt": word, "completion": space + rest})
    if len(pieces) < wanted:
        raise SystemExit(f"{texts} has {len(pieces)} pieces of text, {wanted} are wanted: ask for fewer --steps")
    return pieces[:: len(pieces) // wanted][:wanted]


def _random_student(tokenizer: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import PreTrainedTokenizerFast as Tokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(STUDENT / "student-10m.json"))
    model.save_pretrained(out)
    Tokenizer(tokenizer_file=str(tokenizer / "tokenizer.json"), eos_token="</s>").save_pretrained(out)


def _student_tokens(texts: Path, student: Path) -> int:
    from transformers import PreTrainedTokenizerFast as Tokenizer

    tokenizer: Any = Tokenizer(tokenizer_file=str(student / "tokenizer.json"))
    return sum(len(tokenizer(json.loads(line)["text"]).input_ids) for line in texts.read_text("utf-8").splitlines())


def _run(command: Sequence[str], threads: int) -> tuple[float, float]:
    """A process; seconds and MiB at its peak."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - began, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
