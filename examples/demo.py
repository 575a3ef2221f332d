"""A model moves to another tokenizer: capture it, transplant it, and train the transplant with CE and from the capture.

    make demo                              # prepares the model, then runs this
    python examples/demo.py --steps 30     # again; what is done already is not done twice

The tokenizer is trained here, on the text that the model is to be used with. Each other step is a command of xtoken,
shown before it runs; its figures are what ``--json`` prints.
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
MODEL = "smollm2-135m"
VOCABULARY = 8192
TEXTS = {"train": "moby-dick", "same": "moby-dick-held-out", "other": "other-kinds"}
HELD_OUT = ("same", "other")
# The text alone; and the text with the model's own distributions, at equal gradients.
RUNS = {"ce": ["--loss", "ce"], "byte-prefix": ["--loss", "byte-prefix", "--mix", "gradmag"]}
RATE = "1e-4"
LABELS = {"ce": "trained on the text: CE", "byte-prefix": "distilled: byte-prefix and CE"}
Figures = dict[str, Any]


def main() -> None:
    asked = arguments()
    if asked.model.startswith(models()) and not Path(asked.model).is_dir():
        raise SystemExit(f"error: {asked.model} does not exist: 'make demo' prepares it")
    began = time.monotonic()
    tokenizer = train_tokenizer(Path(asked.out) / "tokenizer")
    transplant, targets = f"{asked.out}/transplant", f"{asked.out}/targets"
    if not Path(transplant).is_dir():
        xtoken(asked, "transplant", asked.model, "--tokenizer", tokenizer, "--out", transplant)
    captured = {kind: capture(asked, kind, transplant) for kind in TEXTS}
    measured = {"transplant, untrained": measure(asked, transplant)}
    for loss in RUNS:
        trained = train(asked, loss, transplant, f"{targets}-train")
        measured[LABELS[loss]] = measure(asked, trained["model"])
    page = xtoken(asked, "report", *(run_of(asked, loss) for loss in RUNS), "--out", f"{asked.out}/report.html")
    show(figures(page["page"], captured["train"], measured, asked.steps, time.monotonic() - began), as_json=asked.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo-run", help="folder for everything the demo writes; a rerun resumes")
    parser.add_argument("--model", default=f"{models()}/{MODEL}", help="by default the one of 'make demo'")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="neither commands nor progress")
    asked = parser.parse_args()
    if asked.steps < 1:
        parser.error(f"argument --steps: {asked.steps} is no number of steps; give at least 1")
    if not asked.out:
        parser.error("argument --out: an empty path; is a variable unset?")
    return asked


def models() -> str:
    return os.path.relpath(ROOT / ".cache" / "models")


def text(kind: str) -> str:
    return f"{os.path.relpath(ROOT / 'examples' / 'data')}/{TEXTS[kind]}.jsonl"


def train_tokenizer(folder: Path) -> str:
    """A byte-level BPE of the training text, with a token that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not (folder / "tokenizer_config.json").exists():  # the last file that is written
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        lines = Path(text("train")).read_text(encoding="utf-8").splitlines()
        backend.train_from_iterator([json.loads(line)["text"] for line in lines], trainer)
        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}\n')
    return str(folder)


def capture(asked: argparse.Namespace, kind: str, transplant: str) -> Figures:
    """A capture of the model over a text, aligned with the new tokenizer; figures of the capture."""
    folder, targets = f"{asked.out}/capture-{kind}", f"{asked.out}/targets-{kind}"
    words = ["precompute", text(kind), "--id-field", "id", "--teacher", asked.model, "--out", folder]
    found = xtoken(asked, *words, "--max-tokens", "256", "--shard-bytes", str(1 << 15))
    losses = ",".join(loss for loss in RUNS if loss != "ce") if kind == "train" else "p-kl"
    xtoken(asked, "align", folder, "--student", transplant, "--for", losses, "--out", targets)
    return found


def run_of(asked: argparse.Namespace, loss: str) -> str:
    """A run of another number of steps is another run."""
    return f"{asked.out}/run-{loss}-{asked.steps}"


def train(asked: argparse.Namespace, loss: str, transplant: str, targets: str) -> Figures:
    words = ["train", targets, "--student", transplant, "--out", run_of(asked, loss), *RUNS[loss]]
    sizes = ["--step-tokens", "512", "--micro-tokens", "512", "--max-tokens", "256"]
    return xtoken(asked, *words, "--lr", RATE, "--steps", str(asked.steps), *sizes)


def measure(asked: argparse.Namespace, model: str) -> dict[str, Figures]:
    """Figures of a model on each kind of held-out text."""
    return {
        kind: xtoken(
            *(asked, "eval", model, "--text", text(kind), "--id-field", "id"),
            *("--targets", f"{asked.out}/targets-{kind}", "--max-tokens", "256"),
        )
        for kind in HELD_OUT
    }


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


def figures(page: str, train: Figures, measured: dict[str, dict[str, Figures]], steps: int, seconds: float) -> Figures:
    """What the demo shows at its end: a row for each model, on a chapter of the book and on text of another kind."""
    first = next(iter(measured.values()))
    rows: list[Figures] = [
        {"model": "the original"} | {kind: first[kind]["teacher_bits_per_byte"] for kind in HELD_OUT}
    ]
    for model, of in measured.items():
        row: Figures = {"model": model}
        for kind in HELD_OUT:
            row |= {kind: of[kind]["bits_per_byte"], f"{kind}_kl": of[kind]["kl"]}
        rows.append(row)
    return {
        "tokens_captured": train["tokens"],
        "tokens_per_second": train["tokens"] / train["seconds"],
        "bytes_per_token": train["bytes_per_token"],
        "entries_per_row": train["entries_per_row"],
        "training_steps": steps,
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
    print("Bits per byte of held-out text. same: a chapter of the book; other: code, a licence, a README.")
    print("kl: to the original's next tokens, nats per chunk of text.")


if __name__ == "__main__":
    main()
