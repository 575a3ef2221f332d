"""Branch rows, a prototype: exact probabilities of numerals that the teacher spells digit by digit.

    python -m benchmarks.lab.branches WORK [--steps 300] [--rate 2e-3] [--write]

A student whose tokenizer packs numerals has tokens, such as "201", that the teacher has none for. A capture's row knows
the teacher's P("2") there and nothing of what follows. Here the teacher is asked: where it gives digits at least
``AT_LEAST``, its most probable first and second digits are appended as branches of one tree, whose attention mask lets
a branch see the text before it and itself; so each costs a token. Their rows give the exact probability of every
student token of one to three digits that matters:

    P("20")  = P(2) P(0 | 2) P(no digit | 20)        the student writes "20" only where no third digit follows
    P("201") = P(2) P(0 | 2) P(1 | 20)

Students learn from tables of numbers by KL over tokens of equal bytes, everything else as one cell ("twins"), and by
the same with these probabilities in the place of the teacher's single digits ("branches"); nothing else differs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.lab.branch_tree import Numerals, Tree
from benchmarks.lab.compare import difference
from benchmarks.lab.numerals import measure
from benchmarks.lab.plan import Plan
from benchmarks.lab.work import MODELS, ROOT, STUDENT, Figures, Lab, bits_per_byte, judged
from benchmarks.machine import machine, machine_line
from benchmarks.verbs import xtoken
from tests.in_process import InProcess
from xtoken.pipeline.align import align
from xtoken.pipeline.align.losses import sparse_kl
from xtoken.pipeline.align.losses.base import Built, Source
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.ui.progress import Silent

KINDS = {"tables": 1}
AT_LEAST = 0.05  # mass of digits where branches are asked for
SEEDS = (0, 1, 2)
# Of the targets that each setting reads, and flags.
SETTINGS: dict[str, tuple[str, list[Any]]] = {
    "ce": ("plain", ["--loss", "ce"]),
    "gold alone": ("plain", ["--loss", "gold", "--ce-weight", 0]),
    "p-kl alone": ("plain", ["--loss", "p-kl", "--ce-weight", 0]),
    "byte-prefix alone": ("plain", ["--loss", "byte-prefix", "--ce-weight", 0]),
    "twins alone": ("twins", ["--loss", "sparse-kl", "--ce-weight", 0]),
    "branches alone": ("branches", ["--loss", "sparse-kl", "--ce-weight", 0]),
    "p-kl": ("plain", ["--loss", "p-kl", "--mix", "gradmag"]),
    "byte-prefix": ("plain", ["--loss", "byte-prefix", "--mix", "gradmag"]),
    "twins": ("twins", ["--loss", "sparse-kl", "--mix", "gradmag"]),
    "branches": ("branches", ["--loss", "sparse-kl", "--mix", "gradmag"]),
}
# What is printed with its interval: numerals, ours minus theirs.
PAIRS = (
    ("branches alone", "twins alone"),
    ("branches alone", "p-kl alone"),
    ("branches alone", "byte-prefix alone"),
    ("branches alone", "gold alone"),
    ("branches", "ce"),
    ("branches", "twins"),
    ("branches", "p-kl"),
    ("branches", "byte-prefix"),
)
Table = dict[tuple[str, int], Numerals]  # by sample and teacher token


def main() -> None:
    """Ask for branches, train with and without them, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lab = Lab(Plan.read(), options.work, options.threads)
    work: Path = options.work / "branches"
    work.mkdir(exist_ok=True)
    capture = work / "capture"
    if not (capture / "manifest.json").exists():
        whole = lab.capture("train", "smollm2-135m", {})
        xtoken(["share", "pull", whole, capture, "--where", "sample_id LIKE 'tables/%'"], options.threads)
    cost = make_targets(lab, work, capture, options.threads)
    rows = [trained(lab, work, options, name, seed) for seed in range(options.seeds) for name in SETTINGS]
    result = {"machine": machine(), "steps": options.steps, "rate": options.rate, "cost": cost, "rows": rows}
    text = table(result, lab.plan.words["test"])
    print(text)
    if options.write:
        results = ROOT / "benchmarks" / "results"
        (results / "lab-branches.json").write_text(json.dumps(result, indent=1) + "\n")
        (results / "lab-branches.md").write_text(text)


def make_targets(lab: Lab, work: Path, capture: Path, threads: int) -> Figures:
    """Targets of three kinds in WORK; what branches cost."""
    kept, tokenizer = work / "cost.json", lab.tokenizer("packed-8k")
    if not (work / "plain" / "manifest.json").exists():
        words = ["align", capture, "--student", tokenizer, "--for", "p-kl,gold,byte-prefix", "--out", work / "plain"]
        xtoken(words, threads)
    if not kept.exists():
        torch.set_num_threads(threads)
        asked, cost = ask(capture, MODELS / "smollm2-135m")
        by_bytes = load_tokenizer(str(tokenizer)).table.by_bytes
        ids = {data.decode(): token for data, token in by_bytes.items() if data.isdigit()}
        for name, branches in (("twins", {}), ("branches", asked)):
            config = AlignConfig(
                capture=str(capture), student=str(tokenizer), losses=["sparse-kl"], out=str(work / name)
            )
            with mock.patch.object(sparse_kl, "Builder", _builder(branches, ids)):
                align(config, Silent(), executor=InProcess())
        kept.write_text(json.dumps(cost))
    found: Figures = json.loads(kept.read_text(encoding="utf-8"))
    return found


@torch.inference_mode()
def ask(capture: Path, model_dir: Path) -> tuple[Table, Figures]:
    """The teacher's probabilities of numerals wherever it gives digits much, and what that cost."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa").eval()
    by_bytes = load_tokenizer(str(model_dir)).table.by_bytes
    digits_10 = torch.tensor([by_bytes[b"%d" % digit] for digit in range(10)])
    found: Table = {}
    tokens = branches = places = 0
    began, plain = time.monotonic(), 0.0
    for batch in iter_capture(str(capture), ["sample_id", "teacher_ids"]):
        for sample, ids in zip(batch["sample_id"].to_pylist(), batch["teacher_ids"].to_pylist(), strict=True):
            start = time.monotonic()
            output = model(torch.tensor([ids]), use_cache=True)
            plain += time.monotonic() - start
            digit_T10 = output.logits[0].float().softmax(-1)[:, digits_10]
            at = (digit_T10.sum(-1) >= AT_LEAST).nonzero()[:, 0].tolist()
            tokens, places = tokens + len(ids), places + len(at)
            if at:
                tree = Tree(model, output.past_key_values, len(ids), digits_10)
                for place, numerals in zip(at, tree.numerals(at, digit_T10[at]), strict=True):
                    found[sample, place + 1] = numerals
                branches += tree.nodes
    seconds = time.monotonic() - began
    return found, {
        "tokens": tokens,
        "places": places,
        "branches": branches,
        "plain_seconds": plain,
        "branch_seconds": seconds - plain,
        "numerals": sum(map(len, found.values())),
    }


def _builder(branches: Table, ids: dict[str, int]) -> type[sparse_kl.Builder]:
    """Align's builder of sparse-kl, for a student of other tokens: those of equal bytes, and what branches say."""

    class Builder(sparse_kl.Builder):
        def refuse(self, *_: Any) -> None:
            """Not for two tokenizers elsewhere."""

        def columns(self, source: Source) -> Built:
            count_C, ids_K, logprob_K, _, _ = source.split(source.maps.twin_U)
            known_C = _places(source)
            stop_C = np.cumsum(count_C)
            counts, all_ids, all_log, rests = [], [], [], []
            replaced = 0
            for chunk, (stop, count) in enumerate(zip(stop_C, count_C, strict=True)):
                own, log = ids_K[stop - count : stop], logprob_K[stop - count : stop].astype(np.float64)
                numerals = branches.get(known_C[chunk])
                if numerals is not None:
                    kept = ~np.isin(own, list(ids.values()))
                    more = [ids[name] for name in numerals]
                    own = np.concatenate([own[kept], np.array(more, np.int32)])
                    log = np.concatenate([log[kept], np.log([*numerals.values()])])
                    replaced += 1
                elif not source.one_to_one[chunk]:
                    own, log = own[:0], log[:0]
                order = np.lexsort((own, -log.astype(np.float32)))
                counts.append(len(own))
                all_ids.append(own[order])
                all_log.append(log[order])
                rest = 1 - np.exp(log).sum()
                rests.append(np.log(rest) if rest > 1e-7 else -np.inf)
            columns = {
                "skl_count": np.array(counts, np.int32),
                "skl_ids": np.concatenate([np.zeros(0, np.int32), *all_ids]).astype(np.int32),
                "skl_logprob": np.concatenate([np.zeros(0), *all_log]).astype(np.float32),
                "skl_rest_logprob": np.where(np.array(counts) > 0, rests, 0).astype(np.float32),
            }
            return columns, {"branch_chunks": replaced}

    return Builder


def _places(source: Source) -> list[tuple[str, int]]:
    """Sample and teacher token of each chunk's beginning."""
    names, places = source.batch["sample_id"].to_pylist(), []
    for sample in source.samples:
        begins = np.concatenate([[0], sample.chunks.teacher_end[:-1]])
        places += [(names[sample.at], int(begin)) for begin in begins]
    return places


def trained(lab: Lab, work: Path, options: argparse.Namespace, name: str, seed: int) -> Figures:
    """A run of a setting, and what it gives to numerals."""
    run = f"{name.replace(' ', '-')}-{seed}"
    kept, out = work / f"{run}.json", work / "runs" / run
    if not kept.exists():
        targets, flags = SETTINGS[name]
        words = ["train", work / targets, "--from-scratch", STUDENT / "student-10m.json", "--tokenizer"]
        words += [lab.tokenizer("packed-8k"), *flags, "--steps", options.steps, "--step-tokens", 1024, "--seed", seed]
        words += ["--lr", options.rate, "--warmup", 20, "--max-tokens", 512, "--micro-tokens", 1024, "--out", out]
        words += ["--eval-text", lab.work / "texts" / "judge.jsonl", "--eval-id-field", "id", "--completions", 0]
        xtoken([*words, "--save-every", options.steps, "--keep", 1], options.threads)
        steps = measure(out, lab.work / "texts" / "held-out.jsonl", ("tables",))
        documents = judged(out / "held-out.jsonl")
        row = {"setting": name, "seed": seed, "numerals": steps[max(steps, key=int)], "documents": documents}
        kept.write_text(json.dumps(row))
    found: Figures = json.loads(kept.read_text(encoding="utf-8"))
    return found


def table(result: Figures, test: dict[str, Any]) -> str:
    """Markdown."""
    cost, rows = result["cost"], result["rows"]
    each = cost["branches"] / cost["tokens"]
    lines = ["# Branch rows, a prototype", "", f"`python -m benchmarks.lab.branches WORK` on {machine_line()}."]
    lines += [f"Tables of numbers, {cost['tokens']:,} teacher tokens: at {cost['places']:,} places the teacher"]
    lines += [f"gives digits {AT_LEAST:g} or more. {cost['branches']:,} branches, {each:.2f} per token, took"]
    lines += [f"{cost['branch_seconds'] / cost['plain_seconds']:.2f} of the time of the plain passes;"]
    lines += [f"{cost['numerals'] / cost['tokens']:.1f} numerals per token would be stored.", ""]
    lines += [
        "| setting | seeds | bits per numeral of two or three digits | tables: bits per byte |",
        "|---|---|---|---|",
    ]
    found: dict[str, list[Figures]] = {}
    for row in rows:
        found.setdefault(row["setting"], []).append(row)
    for name, group in found.items():
        per = np.mean([_sum(row["numerals"], 0) / _sum(row["numerals"], 1) for row in group])
        bits = np.mean([bits_per_byte(row["documents"], KINDS) for row in group])
        lines.append(f"| {name} | {len(group)} | {per:.3f} | {bits:.3f} |")
    lines += ["", "| ours | theirs | bits per numeral, difference | interval | |", "|---|---|---|---|---|"]
    for ours, theirs in PAIRS:
        sides = [sorted(found.get(name, []), key=lambda row: row["seed"]) for name in (ours, theirs)]
        if all(sides):
            names = sorted(name for name, (_, count) in sides[0][0]["numerals"].items() if count)
            bits = [np.array([[row["numerals"][name][0] for name in names] for row in side]) for side in sides]
            size_D: NDArray[np.float64] = np.array([sides[0][0]["numerals"][name][1] for name in names], np.float64)
            one = difference(*bits, size_D, np.zeros(len(names), np.int64), **test)
            verdict = "better" if one.high < 0 else "worse" if one.low > 0 else "too small to tell"
            lines.append(f"| {ours} | {theirs} | {one.value:+.3f} | {one.low:+.3f} to {one.high:+.3f} | {verdict} |")
    return "\n".join(lines) + "\n"


def _sum(numerals: dict[str, list[float]], column: int) -> float:
    return sum(one[column] for one in numerals.values())


if __name__ == "__main__":
    main()
