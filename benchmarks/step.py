"""A whole training step: P-KL from stored targets against plain CE, and against a teacher that runs in every step.

    xtoken precompute TEXTS --teacher FOLDER --max-tokens 448 --out CAPTURE
    xtoken align CAPTURE --student FOLDER --for p-kl,h-kl,alm,byte-prefix --out TARGETS
    python -m benchmarks.step TARGETS CAPTURE --student FOLDER --teacher FOLDER

All steps are of the same student, the same AdamW and the same packed rows of text, and end with updated weights:

    plain        the model's own logits of all tokens and torch's cross_entropy: fine-tuning as everyone does it
    ce, p-kl ... what 'xtoken train --loss ...' does; CE (weight 0.1) included
    live-top-k   the teacher runs, its 64 most probable tokens of every row are taken, then p-kl as above
    live-whole   the teacher runs, its whole rows meet the student's, projected through all of W, by autograd

Steps take turns in one process; figures are medians of their times. Memory is the largest resident size of a process
of its own per step, model and optimizer included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine, machine_line
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.step import count_step, run_step
from xtoken.trainer.student.head import find_head
from xtoken.trainer.student.model import load_student

RESULTS = Path(__file__).parent / "results"
OURS = ("ce", "p-kl", "h-kl", "alm", "byte-prefix")
ALL = ("plain", *OURS, "live-top-k", "live-whole")
CE_WEIGHT, K, WINDOW = 0.1, 64, 512
CPU = torch.device("cpu")
Step = Callable[[], float]  # one step; returns KD, or CE where there is none


class Bench:
    """One student, one batch, and every way to take a step on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.targets = options, Targets(options.targets)
        self.model = load_student(options.student, CPU, trust_remote_code=False).train()
        self.student = Student(self.model, CPU, None, self.targets.manifest.student.size, find_head(self.model))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.losses = {name: self._loss(name) for name in OURS}
        self.batches = {name: self._batch(name) for name in OURS}
        self.tokens = self.batches["ce"].tokens

    def _loss(self, name: str) -> Loss:
        manifest = self.targets.manifest
        sizes = (manifest.student.size, manifest.teacher_tokenizer.size)
        return open_loss(name, LossSetup(self.targets.w, self.targets.vocab, *sizes, CPU, LossOptions()))

    def _batch(self, name: str) -> StepBatch:
        manifest, tokens = self.targets.manifest, self.options.tokens
        layout = Layout(context_token(manifest.student), WINDOW, manifest.student.size, (self.losses[name],))
        sizes = {"step_tokens": tokens, "micro_tokens": self.options.micro_tokens}
        with Loader(Sources([self.targets]), layout, seed=0, packing=True, **sizes) as loader:
            return loader.step()

    def step(self, name: str) -> Step:
        """The step called ``name``."""
        if name == "plain":
            return self._plain
        if name in OURS:
            return lambda: self._ours(name)
        live = Live(self)
        return live.top_k if name == "live-top-k" else live.whole

    def _ours(self, name: str) -> float:
        batch, ranks = self.batches[name], Ranks()
        mixing = Mixing("fixed", 1.0, CE_WEIGHT)
        objective = Objective(self.student, (self.losses[name],))
        figures = run_step(objective, batch, count_step(batch, ranks), mixing, ranks)
        self.update()
        return figures.ce if figures.kd is None else figures.kd

    def _plain(self) -> float:
        batch, total = self.batches["ce"], 0.0
        for micro in batch.micros:
            ids, positions = torch.from_numpy(micro.input_BL), torch.from_numpy(micro.position_BL)
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            rows = logits.flatten(0, 1)[torch.from_numpy(micro.place_P)]
            loss = torch.nn.functional.cross_entropy(rows, torch.from_numpy(micro.label_P), reduction="sum")
            (loss / batch.predicted).backward()
            total += float(loss.detach())
        self.update()
        return total / batch.predicted

    def update(self) -> None:
        """Clip and take the step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Live:
    """The same batch with its teacher in the loop: sample by sample, as its tokens are others."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.teacher = load_student(bench.options.teacher, CPU, trust_remote_code=False).eval()
        self.head = find_head(self.teacher)
        self.size = bench.targets.manifest.teacher_tokenizer.size
        wanted = set(bench.batches["p-kl"].sample_ids)
        self.ids = {
            row["sample_id"]: torch.tensor([self._context(), *row["teacher_ids"]])
            for batch in iter_capture(bench.options.capture, ["sample_id", "teacher_ids"])
            for row in batch.to_pylist()
            if row["sample_id"] in wanted
        }
        w = bench.targets.w
        size = (self.size, bench.targets.manifest.student.size)
        places = torch.tensor(np.stack([w.teacher_id, w.student_id]))
        self.wt_UV = torch.sparse_coo_tensor(places, torch.tensor(w.weight), size).coalesce().to_sparse_csr()
        self.rows = self._chunk_rows(wanted)
        taught = sum(len(micro.targets[0].first_C) for micro in bench.batches["p-kl"].micros)
        if taught != sum(map(len, self.rows.values())):  # the live teacher would read text that teaches nothing
            raise SystemExit(f"samples are longer than {WINDOW} student tokens; capture with a smaller --max-tokens")

    def _context(self) -> int:
        found = self.bench.targets.manifest.teacher_tokenizer.bos_id
        assert found is not None
        return found

    def _chunk_rows(self, wanted: set[str]) -> dict[str, Tensor]:
        """Per sample, the teacher's row of each chunk's first token; row j predicts token j."""
        found = {}
        for ref in self.bench.targets.groups:
            group = self.bench.targets.read(ref, ("chunk_teacher_end", "pkl_count"))
            for at, name in enumerate(group.sample_ids):
                if name in wanted:
                    ends, count = group.values("chunk_teacher_end", at), group.values("pkl_count", at)
                    starts = np.concatenate([[0], ends[:-1]])
                    found[name] = torch.tensor(starts[count > 0], dtype=torch.long)
        return found

    def _teacher_rows(self, name: str) -> Tensor:
        """[T, U] log-probabilities of every row."""
        ids = self.ids[name][None]
        with torch.no_grad():
            logits = self.teacher(input_ids=ids, use_cache=False).logits[0, :-1, : self.size]
            return logits.log_softmax(-1)

    def top_k(self) -> float:
        """Rows by the teacher, their largest entries, then the step from stored targets, which hold the same."""
        for name in self.ids:
            self._teacher_rows(name).topk(K, dim=-1)
        return self.bench._ours("p-kl")

    def whole(self) -> float:
        """Whole rows on both sides."""
        batch, total = self.bench.batches["p-kl"], 0.0
        chunks = batch.chunks[0]
        for micro in batch.micros:
            ids, positions = torch.from_numpy(micro.input_BL), torch.from_numpy(micro.position_BL)
            logits = self.bench.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            logp_PV = logits.flatten(0, 1)[torch.from_numpy(micro.place_P)].log_softmax(-1)
            ce = -logp_PV.gather(1, torch.from_numpy(micro.label_P)[:, None]).sum()
            targets, kd = micro.targets[0], logp_PV.new_zeros(())
            for number, name in enumerate(micro.sample_ids):
                first_C = torch.from_numpy(targets.first_C[targets.sample_C == number])
                target_CU = self._teacher_rows(name)[self.rows[name][: len(first_C)]]
                q_CU = (self.wt_UV @ logp_PV[first_C].exp().T).T
                terms = target_CU.exp() * (target_CU - q_CU.clamp(min=1e-10).log())
                kd = kd + terms.sum()
            (kd / chunks + CE_WEIGHT * ce / batch.predicted).backward()
            total += float(kd.detach())
        self.bench.update()
        return total / chunks


def _memory(name: str) -> int:
    """Largest resident bytes of a process that takes three such steps."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return int(done.stdout.split()[-1])


def _peak(bench: Bench, name: str) -> int:
    step = bench.step(name)
    step()  # the optimizer's state, and the teacher
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _times(bench: Bench, names: list[str], turns: int) -> dict[str, dict[str, Any]]:
    steps = {name: bench.step(name) for name in names}
    value = {name: step() for name, step in steps.items()}  # the first step pays for what is made once
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
        print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    return {
        name: {"seconds": statistics.median(seconds[name]), "all": seconds[name], "value": value[name]}
        for name in names
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets")
    parser.add_argument("capture")
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro-tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", default=",".join(ALL))
    parser.add_argument("--memory-of")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(options)
    if options.memory_of:
        print(_peak(bench, options.memory_of))
        return
    names = options.steps.split(",")
    found = _times(bench, names, options.turns)
    for name in names:
        found[name]["bytes"] = _memory(name)
    result = {"machine": machine(), "tokens": bench.tokens, "threads": options.threads, "steps": found}
    text = _table(result)
    print(text)
    if options.write:
        (RESULTS / "step.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "step.md").write_text(text)


def _table(result: dict[str, Any]) -> str:
    steps, tokens = result["steps"], result["tokens"]
    base = steps["plain"]
    lines = [
        "# A whole training step",
        "",
        f"{machine_line()}; {result['threads']} threads. SmolLM2-135M as student, Gemma-3-270m as teacher, {tokens}",
        "student tokens per step, float32; medians of turns; `python -m benchmarks.step` says what each is.",
        "",
        "| step | seconds | tokens/s | time / plain | memory MiB | memory / plain | first value (nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in steps.items():
        lines.append(
            f"| {name} | {one['seconds']:.3f} | {tokens / one['seconds']:.0f} | {one['seconds'] / base['seconds']:.2f} "
            f"| {one['bytes'] / 2**20:.0f} | {one['bytes'] / base['bytes']:.2f} | {one['value']:.3f} |"
        )
    if {"p-kl", "live-top-k", "live-whole"} <= steps.keys():
        ours = steps["p-kl"]["seconds"]
        ratios = {name: steps[name]["seconds"] / ours for name in ("live-top-k", "live-whole")}
        lines += [
            "",
            *(
                f"* {name} takes {ratio:.2f} times as long as p-kl from stored targets"
                for name, ratio in ratios.items()
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
