"""Every loss trains a real student for 20 steps from stored rows: does its own term fall, and what else moves?

Teacher Gemma-3-270m, student SmolLM2-135M, prose. ``sparse-kl`` needs a teacher with the student's tokenizer: there
SmolLM2-135M teaches itself with its last six layers removed. Only the distillation term is trained on (no CE).

    python -m benchmarks.every_loss            # writes benchmarks/results/every_loss.{json,md}
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line
from xtoken.schemas.losses import LOSSES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS, TEXTS = ROOT / ".cache" / "models", ROOT / "examples" / "data"
STEPS, ENDS = 20, 5  # the first and last five steps are compared: each sees other text
SPARSE, MINED = "sparse-kl", "mined"  # the last goes through a W of its own, so it has a folder of its own


def xtoken(*words: object) -> dict[str, Any]:
    """Run a verb with --json in a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def prepare(work: Path, losses: list[str]) -> None:
    """Captures of both teachers over the same text, targets for all losses, and the shortened student."""
    student = MODELS / "smollm2-135m"
    for name in ("gemma-3-270m", "smollm2-135m"):
        for part, text, limit in (("train", "moby-dick.jsonl", 3), ("held-out", "moby-dick-held-out.jsonl", 1)):
            options = ["--id-field", "id", "--max-tokens", 128, "--limit", limit]
            xtoken("precompute", TEXTS / text, "--teacher", MODELS / name, "--out", work / name / part, *options)
            served = [SPARSE, "p-kl"] if name == student.name else (losses if part == "train" else ["p-kl"])
            options = ["--student", student, "--out", work / name / f"{part}.targets", "--for", ",".join(served)]
            xtoken("align", work / name / part, *options)
    options = ["--student", student, "--out", work / "gemma-3-270m" / f"{MINED}.targets", "--for", MINED]
    xtoken("align", work / "gemma-3-270m" / "train", *options)
    shorten(student, work / "shortened")


def shorten(student: Path, out: Path) -> None:
    """The student without its last six layers, as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(student)
    model.model.layers = model.model.layers[:-6]
    model.config.num_hidden_layers -= 6
    model.config.layer_types = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(student).save_pretrained(out)


def measure(work: Path, loss: str) -> dict[str, Any]:
    """One run: the loss's own term over its first and last steps, and the held-out figures."""
    teacher = "smollm2-135m" if loss == SPARSE else "gemma-3-270m"
    student = work / "shortened" if loss == SPARSE else MODELS / "smollm2-135m"
    words = ["--student", student, "--out", work / f"run-{loss}", "--loss", loss, "--steps", STEPS, "--warmup", 3]
    words += ["--step-tokens", 512, "--micro-tokens", 512, "--max-tokens", 128, "--lr", 5e-5, "--ce-weight", 0]
    words += ["--eval-targets", work / teacher / "held-out.targets", "--tokenizer", MODELS / "smollm2-135m"]
    figures = xtoken("train", work / teacher / f"{MINED if loss == MINED else 'train'}.targets", *words)
    lines = [json.loads(line) for line in (work / f"run-{loss}" / "metrics.jsonl").read_text().splitlines()]
    own = [line.get("kd", line["ce"]) for line in lines if "loss" in line]
    return {
        "loss": loss,
        "first_steps": sum(own[:ENDS]) / ENDS,
        "last_steps": sum(own[-ENDS:]) / ENDS,
        "kl_before": figures["before"]["kl"],
        "kl_after": figures["after"]["kl"],
        "top1_before": figures["before"]["top1_agreement"],
        "top1_after": figures["after"]["top1_agreement"],
        "tokens_per_s": figures["tokens"] / figures["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [value if isinstance(value, str) else f"{value:.4g}" for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all losses and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, [loss for loss in LOSSES if loss not in (SPARSE, MINED)])
        rows = [measure(work, loss) for loss in LOSSES]
    failed = [row["loss"] for row in rows if row["last_steps"] >= row["first_steps"]]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "every_loss.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    text = [
        "# Every loss, 20 steps",
        __doc__.split("\n\n")[1].strip() if __doc__ else "",
        f"First and last steps: the loss's own term in its own unit, mean of {ENDS} steps of 512 tokens. KL (P-KL, "
        "nats per chunk) and top-1 agreement are measured on held-out text.",
        table(rows),
        machine_line(),
    ]
    (RESULTS / "every_loss.md").write_text("\n\n".join(text) + "\n")
    sys.stdout.write("\n\n".join(text) + "\n")
    if failed:
        raise SystemExit(f"did not fall: {', '.join(failed)}")


if __name__ == "__main__":
    main()
