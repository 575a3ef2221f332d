"""Students trained from stored targets with every loss that the README recommends: what each is worth, honestly.

    python -m benchmarks.students WORK small     # a Llama of 5 million parameters from scratch, SmolLM2-135M teaches it
    python -m benchmarks.students WORK smollm2   # SmolLM2-135M, Gemma-3-270m teaches it

Texts: benchmarks/students_data.py, windows of 256 teacher tokens. Captures, targets and runs are left in WORK; one that
is there is not made again. CE alone, and P-KL, H-KL, ALM and byte-prefix with KD 1 and CE 0.1 (fixed) or with
CE + sg(CE/KD) KD (dynamic). The page is what 'xtoken report' makes of the runs.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line
from benchmarks.students_data import write_corpus
from benchmarks.verbs import xtoken

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
XTOKEN = Path(sys.executable).with_name("xtoken")
LOSSES = ("p-kl", "h-kl", "alm", "byte-prefix")
MODELS, TOKENIZERS = Path(".cache/models"), Path(".cache/tokenizers")


@dataclass(frozen=True)
class Sweep:
    """A student with its teacher; ``train`` are flags of every run, ``held_out`` takes every so many of those texts."""

    teacher: str
    tokenizer: str
    seeds: tuple[int, ...]
    train: dict[str, Any]
    jobs: int
    held_out: int = 1
    mixes: tuple[str, ...] = ("fixed", "dynamic")


SWEEPS = {
    "small": Sweep(
        teacher=str(MODELS / "smollm2-135m"),
        tokenizer=str(TOKENIZERS / "llama2"),
        seeds=(0, 1, 2),
        train={
            "from_scratch": "examples/configs/llama2-tokenizer-llama-5m.json",
            "tokenizer": str(TOKENIZERS / "llama2"),
            "steps": 200,
            "step_tokens": 512,
            "micro_tokens": 512,
            "lr": 2e-3,
            "warmup": 20,
            "eval_every": 100,
        },
        jobs=2,
    ),
    "smollm2": Sweep(
        teacher=str(MODELS / "gemma-3-270m"),
        tokenizer=str(MODELS / "smollm2-135m"),
        seeds=(0,),
        train={
            "student": str(MODELS / "smollm2-135m"),
            "steps": 200,
            "step_tokens": 256,
            "micro_tokens": 256,
            "lr": 2e-5,
            "warmup": 20,
        },
        jobs=2,
        held_out=3,  # a student of this size reads all of them for longer than it trains
    ),
}


def held_out(work: Path, name: str) -> Path:
    """Texts that the students of a sweep are judged by."""
    return work / "data" / f"held-out-{name}.jsonl"


def prepare(work: Path, name: str, sweep: Sweep) -> dict[str, Any]:
    """Texts, captures and targets; counts of the capture that trains."""
    write_corpus(work / "data")
    texts = {"train": work / "data" / "train.jsonl", "held-out": held_out(work, name)}
    lines = (work / "data" / "held-out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts["held-out"].write_text("".join(lines[:: sweep.held_out]), encoding="utf-8")
    found: dict[str, Any] = {}
    for kind, losses in (("train", ",".join(LOSSES)), ("held-out", "p-kl")):
        capture, targets = work / f"capture-{Path(sweep.teacher).name}-{kind}", work / f"targets-{name}-{kind}"
        if not (capture / "manifest.json").exists():
            words = ["precompute", str(texts[kind]), "--id-field", "id", "--teacher", sweep.teacher]
            xtoken(
                [*words, "--backend", "vllm", "--max-tokens", "256", "--shard-bytes", "60000", "--out", str(capture)], 2
            )
        words = ["align", str(capture), "--student", sweep.tokenizer, "--for", losses, "--out", str(targets)]
        found[kind] = xtoken(words, 2)
    return found


def train(work: Path, name: str, sweep: Sweep, job: tuple[str, str, int]) -> None:
    """One run."""
    loss, mix, seed = job
    out = work / name / f"{loss}-{mix}-{seed}"
    flags: dict[str, Any] = {
        **sweep.train,
        "loss": loss,
        "mix": mix,
        "seed": seed,
        "out": out,
        "max_tokens": 512,
        "eval_id_field": "id",
    }
    flags |= {"eval_text": held_out(work, name), "eval_targets": work / f"targets-{name}-held-out"}
    flags |= {"save_every": 100, "keep": 1, "decoders": 1, "device": "cpu"}
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    began = time.monotonic()
    xtoken(["train", str(work / f"targets-{name}-train"), *words], 2 // sweep.jobs)
    print(f"{out.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Prepare, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--seeds", type=int, default=None, help="only the first so many")
    parser.add_argument("--mixes", default=None, help="only these")
    parser.add_argument("--jobs", type=int, default=None)
    options = parser.parse_args()
    sweep, name = SWEEPS[options.sweep], options.sweep
    prepared = prepare(options.work, name, sweep)
    mixes = options.mixes.split(",") if options.mixes else sweep.mixes
    # one seed of everything before the next seed: what is cut short is still a comparison
    jobs = [
        job
        for seed in sweep.seeds[: options.seeds]
        for job in [("ce", "fixed", seed), *((loss, mix, seed) for mix in mixes for loss in LOSSES)]
    ]
    with ThreadPoolExecutor(options.jobs or sweep.jobs) as pool:
        list(pool.map(lambda job: train(options.work, name, sweep, job), jobs))
    write(options.work, name, prepared, jobs)


def write(work: Path, name: str, prepared: dict[str, Any], jobs: list[tuple[str, str, int]]) -> None:
    """The page, and its table in results/."""
    runs = [str(work / name / f"{loss}-{mix}-{seed}") for loss, mix, seed in jobs]
    page = xtoken(["report", *runs, "--out", str(work / f"{name}.html")], 2)
    for figures in prepared.values():
        figures.pop("out", None)  # a folder of this machine
    found = {"machine": machine(), "prepared": prepared, "results": page["results"]}
    (RESULTS / f"students-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in page["results"] for key in row))
    lines = [
        f"# {name}: students from stored targets",
        "",
        f"{machine_line()}. `python -m benchmarks.students WORK {name}`",
        "",
    ]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in page["results"]]
    (RESULTS / f"students-{name}.md").write_text("\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
