"""Time and memory of every loss, from given logits to their gradient, against an online trainer with whole rows.

    python -m benchmarks.losses                       # all losses; writes benchmarks/results/losses.json and .md
    python -m benchmarks.losses --only p-kl --profile # where one loss spends its time

Ours is what ``trainer.score.score_states`` does for a micro-batch: blocks, terms, backward, CE included. Dense is
``losses_dense.gradient``: one autograd pass. Both start from the same logits and end with the gradient by them.

Time: the median of five passes of each side after one, each begun when the machine is idle; passes during which other
processes were busy are taken again. The allocator is the system's, which gives large buffers back, so that every pass
of either side pays for fresh pages.

Memory: a process per side; the largest resident size during a pass less that before it, with logits, gradient and
inputs not counted. The allocator there returns what is freed at once, so that nothing hides in it.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.losses_dense import gradient, load_dense
from benchmarks.losses_inputs import MEASURED, POSITIONS, K, prepare
from benchmarks.machine import machine
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import score_states
from xtoken.trainer.student.head import Head

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
STUDENT, TEACHER = "llama3", "qwen3"
KD_WEIGHT, CE_WEIGHT = 1.0, 0.1  # the trainer's defaults
THREADS, PASSES = 2, 5
BUSY, TRIES, IDLE_TRIES = 0.05, 5, 120  # others' share of the machine; tries of a pass; half seconds to wait
FASTER, SMALLER = 5.0, 8.0  # what the project asks for
SAME = 1e-4  # relative: sums of 512 float32 cross-entropies, added block by block or at once
# The allocator maps every buffer of 64 kB or more by itself, so freeing it shrinks the process.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
Pass = Callable[[], tuple[float, float]]  # one pass from logits to gradient; returns the sums CE and KD


def main() -> None:
    """Parse the command line; a hidden one runs a single case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=MEASURED, action="append", help="this loss; may be repeated")
    parser.add_argument("--profile", action="store_true", help="show where our side spends its time, write nothing")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(_case(*asked.case)))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        with console.status("building W, capture, targets and logits"):
            prepare(Path(folder), *(_tokenizer(name) for name in (STUDENT, TEACHER)))
        names = asked.only or list(MEASURED)
        if asked.profile:
            for name in names:
                console.print(_run(folder, name, "profile", {})["profile"], markup=False)
            return
        found = {}
        for name in names:
            with console.status(name):
                found[name] = _compare(folder, name)
            console.print(name, _brief(found[name]))
    report = {"setup": _setup(), "losses": found}
    console.print(_table(report))
    if not asked.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "losses.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "losses.md").write_text(_markdown(report))


def _tokenizer(name: str) -> Path:
    """A real tokenizer.json, by examples/demo_models.py (other packages also install a top-level ``examples``)."""
    spec = importlib.util.spec_from_file_location("xtoken_demo_models", ROOT / "examples" / "demo_models.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return Path(module.prepare_tokenizer(name)) / "tokenizer.json"


def _compare(folder: str, name: str) -> dict[str, Any]:
    found = _run(folder, name, "time", {})
    for side in ("ours", "dense"):
        found[side] |= _run(folder, name, side, RETURN_MEMORY)
    ours, dense = found["ours"], found["dense"]
    assert abs(ours["ce"] - dense["ce"]) < SAME * dense["ce"], "the sides do not compute the same"
    ratios = {"time_ratio": dense["seconds"] / ours["seconds"], "memory_ratio": dense["bytes"] / ours["bytes"]}
    return {**found, **ratios}


def _run(folder: str, name: str, what: str, allocator: dict[str, str]) -> dict[str, Any]:
    """``_case`` in a process of its own."""
    threads = {"OMP_NUM_THREADS": str(THREADS), "NUMBA_NUM_THREADS": str(THREADS)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.losses", "--case", folder, name, what]
    environment = {**os.environ, **threads, **allocator}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _case(folder: str, name: str, what: str) -> dict[str, Any]:
    """``time`` of both sides, memory of ``ours`` or ``dense``, or the ``profile`` of ours."""
    torch.set_num_threads(THREADS)
    root = Path(folder)
    inputs = root / ("same" if name == "sparse-kl" else "cross")
    logits_PV = torch.from_numpy(np.load(root / "student.npy"))
    micro, losses = _lesson(inputs, name, logits_PV.shape[1])
    chunks = len(micro.targets[0].first_C)
    factors = (CE_WEIGHT / POSITIONS, KD_WEIGHT / max(1, chunks))
    ours, dense = _ours(logits_PV, micro, losses, factors), _dense(inputs, name, logits_PV, micro, factors)
    if what == "profile":
        return {"profile": _profiled(ours)}
    if what != "time":
        return {"bytes": _peak(ours) if what == "ours" else _peak(dense) - logits_PV.nbytes}
    found: dict[str, Any] = {"chunks": chunks}
    for side, run in (("ours", ours), ("dense", dense)):
        ce, kd = run()
        passes = [_undisturbed(run) for _ in range(PASSES)]
        seconds = [took for took, _ in passes]
        found[side] = {"ce": ce / POSITIONS, "kd": kd * factors[1], "seconds": statistics.median(seconds)}
        found[side] |= {"all_seconds": seconds, "others_busy": max(busy for _, busy in passes)}
    return found


def _lesson(inputs: Path, name: str, vocabulary: int) -> tuple[Micro, tuple[Loss, ...]]:
    """The micro-batch and the loss, made as the training loop makes them."""
    targets = Targets(str(inputs / "targets"))
    setup = LossSetup(
        targets.w.within(vocabulary),
        targets.vocab,
        vocabulary,
        targets.manifest.teacher_tokenizer.size,
        torch.device("cpu"),
        LossOptions(),
    )
    losses = (open_loss(name, setup),)
    layout = Layout(context_token(targets.manifest.student), POSITIONS, vocabulary, losses)
    (micro,) = Loader(Sources([targets]), layout, step_tokens=POSITIONS, micro_tokens=POSITIONS, seed=0).step().micros
    assert len(micro.label_P) == POSITIONS
    return micro, losses


def _ours(logits_PV: Tensor, micro: Micro, losses: tuple[Loss, ...], factors: tuple[float, float]) -> Pass:
    head = Head(model=None, fusable=False, positions=False)
    student = Student(None, torch.device("cpu"), None, logits_PV.shape[1], head)
    objective = Objective(student, losses)
    leaf_PV = logits_PV.clone().requires_grad_()

    def run() -> tuple[float, float]:
        leaf_PV.grad = None
        value, sums = score_states(objective, micro, leaf_PV, factors)
        value.backward()
        return float(sums[0]), float(sums[1])

    return run


def _dense(inputs: Path, name: str, logits_PV: Tensor, micro: Micro, factors: tuple[float, float]) -> Pass:
    dense = load_dense(inputs, name, micro)

    def run() -> tuple[float, float]:
        _, ce, kd = gradient(dense, name, logits_PV, factors)
        return ce, kd

    return run


def _undisturbed(run: Pass) -> tuple[float, float]:
    """Seconds of a pass, and the share of the machine that others used meanwhile; the best of a few tries."""
    tries: list[tuple[float, float]] = []
    while len(tries) < TRIES and (not tries or tries[-1][1] > BUSY):
        _wait_until_idle()
        tries.append(_timed(run))
    return min(tries, key=lambda one: one[1])


def _wait_until_idle() -> None:
    for _ in range(IDLE_TRIES):
        others = _others(lambda: time.sleep(0.5))
        if others < BUSY:
            return


def _timed(run: Pass) -> tuple[float, float]:
    began = time.perf_counter()
    others = _others(run)
    return time.perf_counter() - began, others


def _others(what: Callable[[], object]) -> float:
    """Share of the machine's time that was neither idle nor this process's while ``what`` ran."""
    wall, cpu, busy = time.perf_counter(), time.process_time(), _busy_seconds()
    what()
    wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, _busy_seconds() - busy
    return max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """CPU seconds of all processes since the start of the machine."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _peak(run: Pass) -> int:
    """Bytes by which the process grew at most in the second pass."""
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _profiled(run: Pass) -> str:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


def _setup() -> dict[str, Any]:
    sizes = {"positions": POSITIONS, "kept": K, "student": STUDENT, "teacher": TEACHER}
    weights = {"kd_weight": KD_WEIGHT, "ce_weight": CE_WEIGHT}
    return {**machine(), "threads": THREADS, "passes": PASSES, **sizes, **weights}


def _brief(found: dict[str, Any]) -> str:
    return f"{found['time_ratio']:.1f} times less time, {found['memory_ratio']:.1f} times less memory"


def _rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, found in report["losses"].items():
        ours, dense = found["ours"], found["dense"]
        times = [f"{side['seconds'] * 1e3:,.0f}" for side in (ours, dense)] + [f"{found['time_ratio']:.1f}"]
        sizes = [f"{side['bytes'] / 2**20:,.0f}" for side in (ours, dense)] + [f"{found['memory_ratio']:.1f}"]
        meets = found["time_ratio"] >= FASTER and found["memory_ratio"] >= SMALLER
        rows.append([name, *times, *sizes, "-" if name == "ce" else "yes" if meets else "no"])
    return rows


HEADER = ["loss", "ours ms", "dense ms", "ratio", "ours MiB", "dense MiB", "ratio", f"{FASTER:g}x and {SMALLER:g}x"]


def _table(report: dict[str, Any]) -> Table:
    table = Table(*HEADER)
    for row in _rows(report):
        table.add_row(*row)
    return table


def _markdown(report: dict[str, Any]) -> str:
    lines = [" | ".join(row) for row in [HEADER, ["---", *["---:"] * 6, "---"], *_rows(report)]]
    setup = report["setup"]
    return (
        "# Losses: time and peak extra memory, stored rows against whole rows\n\n"
        + "".join(f"| {line} |\n" for line in lines)
        + f"\n{setup['positions']} positions, student {setup['student']}, teacher {setup['teacher']}, {setup['kept']} "
        f"entries kept per row; from given logits to their gradient, CE (weight {setup['ce_weight']:g}) included. "
        f"{setup['cpu']}, {setup['threads']} threads, median of {setup['passes']}; torch {setup['torch']}, "
        f"Python {setup['python']}. Extra memory leaves out logits, gradient and inputs. CE alone has nothing to be "
        "compared with: its dense side is the same computation in one block.\n\n"
        "Written by `python -m benchmarks.losses`.\n"
    )


if __name__ == "__main__":
    main()
