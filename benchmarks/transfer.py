"""A model moved to another tokenizer: what the text alone (CE) and distillation from the model itself bring back.

    python -m benchmarks.transfer WORK                      # every setting at every learning rate
    python -m benchmarks.transfer WORK --settings ce,alm:1e-4      # one of them at one rate
    python -m benchmarks.transfer OTHER --tokenizer bytes --name transfer-bytes --step-tokens 1024
    python -m benchmarks.transfer WORK --settings ce --rates 1e-4 --steps 20   # a look

SmolLM2-135M goes to a byte-level BPE that is trained here on the text it is to be trained with (or to --tokenizer). The
model is captured once; every run trains the same transplant on the same targets, tokens and steps. Figures are those
of "xtoken eval" on a chapter of the same book and on text of another kind: code, a licence, a README. Every model
answers a prompt, greedily, as transformers loads it. WORK stays; a command that was done is not done again.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line
from benchmarks.verbs import xtoken
from examples.demo import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path("examples/data")
MODEL = Path(".cache/models/smollm2-135m")
TEXTS = {"train": "moby-dick", "same": "moby-dick-held-out", "other": "other-kinds"}
SETTINGS = {
    "ce": ["--loss", "ce"],
    "byte-prefix": ["--loss", "byte-prefix", "--ce-weight", "0"],
    "byte-prefix+ce": ["--loss", "byte-prefix", "--mix", "gradmag"],
    "p-kl": ["--loss", "p-kl", "--ce-weight", "0"],
    "h-kl": ["--loss", "h-kl", "--ce-weight", "0"],
    "alm": ["--loss", "alm", "--mix", "gradmag", "--ce-weight", "0"],
    "alm+ce": ["--loss", "alm", "--mix", "gradmag"],
    "alm-tau5+ce": ["--loss", "alm", "--alm-tau", "5", "--mix", "gradmag"],
}
STEP = ["--micro-tokens", "512", "--max-tokens", "256", "--warmup", "10", "--save-every", "100"]
PROMPT = "The captain looked at the sea, and said"


def main() -> None:
    """Prepare, train, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", help="folder of the new tokenizer; left out: trained on the text")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="NAME or NAME:RATE, by commas")
    parser.add_argument("--rates", default="5e-5,1e-4,2e-4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--name", default="transfer", help="of the files in benchmarks/results")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = options.tokenizer or train_tokenizer(work / "tokenizer")
    counts = prepare(work, tokenizer)
    asked = [one.partition(":") for one in options.settings.split(",")]
    jobs = [(name, one) for name, _, rate in asked for one in (rate or options.rates).split(",")]
    threads = max(1, (os.cpu_count() or 2) // options.jobs)
    rows = [{"model": "transplant", **measured(work, work / "transplant", threads)}]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows += pool.map(lambda job: trained(work, options, threads, *job), jobs)
    result = {"machine": machine(), "tokenizer": str(options.tokenizer), "steps": options.steps}
    result |= {"step_tokens": options.step_tokens, "counts": counts, "rows": rows}
    text = table(result)
    print(text)
    if options.write:
        (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{options.name}.md").write_text(text)


def prepare(work: Path, tokenizer: str) -> dict[str, Any]:
    """Captures of the model, its transplant, targets; counts of the training targets."""
    transplant = work / "transplant"
    if not (transplant / "config.json").exists():
        xtoken(["transplant", str(MODEL), "--tokenizer", tokenizer, "--out", str(transplant)])
    found: dict[str, Any] = {}
    for kind, name in TEXTS.items():
        capture, targets = work / f"capture-{kind}", work / f"targets-{kind}"
        if not (capture / "manifest.json").exists():
            words = ["precompute", str(DATA / f"{name}.jsonl"), "--id-field", "id", "--teacher", str(MODEL)]
            xtoken([*words, "--max-tokens", "256", "--shard-bytes", str(1 << 15), "--out", str(capture)])
        losses = "p-kl,h-kl,alm,byte-prefix" if kind == "train" else "p-kl"
        words = ["align", str(capture), "--student", str(transplant), "--for", losses, "--out", str(targets)]
        found[kind] = xtoken(words)
    return found


def trained(work: Path, options: argparse.Namespace, threads: int, name: str, rate: str) -> dict[str, Any]:
    """One run and its figures, which stay beside its folder."""
    out, began = work / "runs" / f"{name}-{rate}-{options.steps}", time.monotonic()
    kept = out.with_name(f"{out.name}.json")
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text())
        return row
    words = ["train", str(work / "targets-train"), "--student", str(work / "transplant"), "--out", str(out)]
    schedule = ["--lr", rate, "--steps", str(options.steps), "--step-tokens", str(options.step_tokens)]
    schedule += ["--keep", "1", "--completions", "0"]
    summary = xtoken([*words, *SETTINGS[name], *STEP, *schedule], threads)
    found = measured(work, out / "model", threads)
    print(f"{out.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    row = {"model": name, "rate": rate, "tokens": summary["tokens"], "seconds": summary["seconds"], **found}
    kept.write_text(json.dumps(row))
    return row


def measured(work: Path, model: Path, threads: int) -> dict[str, Any]:
    """Bits per byte, KL and agreement with the original, and the original's bits per byte, by kind of text."""
    kept = model.with_name(f"{model.name}-figures.json")
    if not kept.exists():
        found = {}
        for kind in ("same", "other"):
            text = ["--text", str(DATA / f"{TEXTS[kind]}.jsonl"), "--id-field", "id"]
            words = ["eval", str(model), *text, "--targets", str(work / f"targets-{kind}"), "--max-tokens", "256"]
            found[kind] = xtoken(words, threads)
        kept.write_text(json.dumps(found))
    whole = json.loads(kept.read_text())
    names = ("bits_per_byte", "kl", "top1_agreement", "teacher_bits_per_byte")
    figures = {kind: {name: whole[kind][name] for name in names} for kind in whole}
    return {"answer": answer(model), **figures}


def answer(model: Path) -> str:
    """What the model writes behind ``PROMPT``: 60 tokens, the most probable one each time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    written = loaded.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def table(result: dict[str, Any]) -> str:
    """The results as Markdown, the best of each column of runs in bold."""
    rows, original = result["rows"], result["rows"][0]
    own = result["tokenizer"] == "None"
    new = "a byte-level BPE of 8,192 tokens, trained on the training text" if own else Path(result["tokenizer"]).name
    lines = [
        "# A model moved to another tokenizer",
        "",
        f"{machine_line()}.",
        f"SmolLM2-135M to {new}, `--init fvt`; one seed.",
        f"{result['steps']} steps of {result['step_tokens']} tokens of Moby Dick.",
        "same: a held-out chapter. other: code, a licence, a README. KL and top-1 to the original, per chunk.",
        "",
        "| model | rate | same: bits/byte | KL | top-1 | other: bits/byte | KL | top-1 |",
        "|---|---|---|---|---|---|---|---|",
        f"| original | | {original['same']['teacher_bits_per_byte']:.3f} | | | "
        f"{original['other']['teacher_bits_per_byte']:.3f} | | |",
    ]
    best = {
        (kind, name): (max if name == "top1_agreement" else min)(row[kind][name] for row in rows)
        for kind in ("same", "other")
        for name in ("bits_per_byte", "kl", "top1_agreement")
    }
    for row in rows:
        cells = []
        for kind, name in best:
            value = row[kind][name]
            cells.append(f"**{value:.3f}**" if value == best[kind, name] else f"{value:.3f}")
        lines.append(f"| {row['model']} | {row.get('rate', '')} | {' | '.join(cells)} |")
    lines += ["", f"Behind *{PROMPT}*, greedily, after training:", ""]
    lines += [
        f"- {row['model']} {row.get('rate', '')}: `{json.dumps(row['answer'], ensure_ascii=False)}`" for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
