"""The committed results of the lab: what of each run is kept, and how another machine goes on from it.

Runs take hours and their folders gigabytes, so results/lab.json holds what every table and claim is computed from:
bits of each document (two decimals), bits per numeral over training, and KL of the next byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.plan import Run
from benchmarks.lab.work import Documents, Figures, Lab

_KEPT = ("run", "experiment", "setting", "variant", "rate", "seed", "steps", "minutes")


def every_run(lab: Lab) -> list[Run]:
    """Of all experiments, each once."""
    return list({run: None for name in lab.plan.experiments for run in lab.plan.runs(name)})


def compact(lab: Lab) -> Figures:
    """What is known of every run; the sizes of documents stand once, since all runs are judged by the same."""
    runs = list({found["run"]: found for run in every_run(lab) if (found := lab.done(run))}.values())
    names = list(runs[0]["documents"]) if runs else []
    assert all(list(run["documents"]) == names for run in runs)
    counts: dict[str, float] = {}
    rows = []
    for run in runs:
        row = {key: run[key] for key in _KEPT} | {"bits": _sums(run["documents"], names, 2)}
        if numerals := lab.numerals(run):
            counts = {name: count for name, (_, count) in next(iter(numerals.values())).items()}
            row["numerals"] = {step: _sums(documents, list(counts), 2) for step, documents in numerals.items()}
        if next_byte := lab.measured(run, "next-byte"):
            row["next-byte"] = {name: [round(nats, 5), count] for name, (nats, count) in next_byte.items()}
        rows.append(row)
    found: Figures = {"documents": {name: runs[0]["documents"][name][1] for name in names}, "numerals": counts}
    found["untrained"] = {name: _sums(one, names, 2) for name, one in lab.untrained().items()}
    return {**found, "runs": rows}


def _sums(documents: Documents, names: Sequence[str], decimals: int) -> list[float]:
    return [round(documents[name][0], decimals) for name in names]


def restore(lab: Lab, results: Path) -> int:
    """Take runs from committed results, so that they are not run again; how many.

    A run of which a claim needs more than the results hold is left out: its folder is gone, so it is run again.

    Raises:
        SystemExit: they were judged by other documents than this WORK has.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    sizes = found["documents"]
    if runs := [run for run in found["runs"] if not lab.figures(run["run"]).exists()]:
        lab.check_judge(sizes, results)
    restored = 0
    for run in runs:
        numerals = {
            step: {name: [bits, count] for (name, count), bits in zip(found["numerals"].items(), sums, strict=True)}
            for step, sums in run.get("numerals", {}).items()
        }
        asked = lab.asked(run["run"])
        if ("numerals" in asked and not numerals) or ("next-byte" in asked and "next-byte" not in run):
            continue
        documents = {name: [bits, size] for (name, size), bits in zip(sizes.items(), run["bits"], strict=True)}
        if numerals:
            lab.keep(run["run"], numerals, "numerals")
        if "next-byte" in run:
            lab.keep(run["run"], run["next-byte"], "next-byte")
        # last: whoever finds it takes the run for done
        lab.keep(run["run"], {**{key: run[key] for key in _KEPT}, "documents": documents})
        restored += 1
    for name, sums in found.get("untrained", {}).items():
        lab.keep_untrained(name, {one: [bits, size] for (one, size), bits in zip(sizes.items(), sums, strict=True)})
    return restored
