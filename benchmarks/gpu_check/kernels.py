"""Triton's kernels for rows of teachers: whether they read as torch does, and how long each takes."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.inputs import Figures, on_gpu

# Rows, columns and entries that are timed; those of Qwen3 under the default codec.
TIMED = {True: (1024, 151_936, 64), False: (2, 700, 5)}
TESTED = {True: ((3001, 20), (40_000, 64), (151_936, 64)), False: ((700, 5),)}
TURNS = {True: 9, False: 1}
SAMPLES = 50


def kernels(_: Path) -> Figures:
    """The self-test on made rows; milliseconds of 1,024 rows by kernels, by torch, and of one read of the logits."""
    from xtoken.pipeline.teachers.draws import Sampler
    from xtoken.pipeline.teachers.fast_rows import difference
    from xtoken.pipeline.teachers.logit_rows import RowReader
    from xtoken.pipeline.teachers.row_kernels import KernelScan
    from xtoken.pipeline.teachers.sliced_rows import SlicedReader

    device = torch.device("cuda" if on_gpu() else "cpu")
    for width, k in TESTED[on_gpu()]:
        if fault := difference(KernelScan, device, width, k):
            raise AssertionError(f"kernels read otherwise than torch: {fault}")
    rows, width, k = TIMED[on_gpu()]
    logits_NU = torch.randn(rows, width, device=device) * 3
    target_N = torch.randint(0, width, (rows,), device=device)
    uniform_N = np.random.default_rng(0).random(rows)
    space_P = torch.arange(0, width, 3, device=device)
    found: Figures = {"ms, one read": milliseconds(lambda: logits_NU.amax(dim=1))}
    asked_for = {"top k": (), "two temperatures": ((0.5, 2.0),), "samples": ((), Sampler(SAMPLES, 0, width))}
    for name, more in asked_for.items():
        asked = RowReader(k, space_P, *more)
        by_kernels = SlicedReader(asked, KernelScan, width)
        found[f"ms, {name}, kernels"] = milliseconds(lambda r=by_kernels: r.figures(logits_NU, target_N, uniform_N))
        # torch's reader overwrites what it reads, which is log-probabilities from the second turn on
        found[f"ms, {name}, torch"] = milliseconds(lambda r=asked: r.figures(logits_NU, target_N, uniform_N))
    return found


def milliseconds(work: Callable[[], Any]) -> float:
    """Median time of a call, after one that compiles; on a GPU until it is done."""
    seconds = []
    for _ in range(1 + TURNS[on_gpu()]):
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds[1:])


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
