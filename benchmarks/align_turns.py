"""Several ways to do the same work, timed in turn in one process: A B C A B C, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Figures = dict[str, Any]
Work = Callable[[], Any]


def in_turn(works: Mapping[str, Work], tokens: int, turns: int) -> tuple[Figures, dict[str, Any]]:
    """Do every work once unmeasured, which also gives its result, then ``turns`` times in turn.

    Args:
        works: each does the same and returns its result, which is not kept while others are timed.
        tokens: what seconds are divided by.
        turns: measured passes.

    Returns:
        Microseconds per token by name: medians of CPU time (all threads) and of wall clock; and the results.
    """
    results = {name: work() for name, work in works.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    figures = {}
    for name, pairs in taken.items():
        cpus, walls = np.array(pairs).T * 1e6 / tokens
        figures[name] = {
            "cpu": statistics.median(cpus.tolist()),
            "wall": statistics.median(walls.tolist()),
            "least_cpu": float(cpus.min()),
        }
    return figures, results


def best(figures: Figures, start: str, by: str = "wall") -> str:
    """The fastest of the works whose name starts so."""
    return min((name for name in figures if name.startswith(start)), key=lambda name: figures[name][by])


def lines_of(figures: Figures, against: str, digits: int = 3) -> list[str]:
    """Markdown: a row for each work, and how many times as much CPU it takes as ``against``."""
    least = figures[against]["cpu"]
    rows = [
        f"| {name} | {one['cpu']:.{digits}f} | {one['wall']:.{digits}f} | {one['cpu'] / least:.2f} |"
        for name, one in figures.items()
    ]
    return ["| | CPU | wall clock | CPU, times |", "|---|---|---|---|", *rows, ""]
