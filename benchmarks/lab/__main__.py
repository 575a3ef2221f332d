"""Carry out the plan: python -m benchmarks.lab WORK [EXPERIMENT ...]

python -m benchmarks.lab --plan                    # what there is, with hours
python -m benchmarks.lab WORK rates uncommon       # these, in this order; what was run is not run again, here or in
                                                   # the committed results
python -m benchmarks.lab WORK --write              # the tables of what is there, into benchmarks/results
"""

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.lab.pictures import draw_claims, draw_numerals
from benchmarks.lab.plan import Plan
from benchmarks.lab.results import restore
from benchmarks.lab.tables import numeral_curves, report
from benchmarks.lab.work import ROOT, Lab
from benchmarks.machine import machine, machine_line


def main() -> None:
    """Print the plan, run experiments, or write tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("experiments", nargs="*", help="names of the plan; left out: all")
    parser.add_argument("--plan", action="store_true", help="print the experiments with their hours, run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--hours", type=float, default=1000.0, help="begin no run after this long")
    parser.add_argument("--write", action="store_true", help="run nothing, write the tables of what is there")
    parser.add_argument("--afresh", action="store_true", help="run again what results/lab.json holds")
    options = parser.parse_args()
    plan = Plan.read()
    if options.plan or options.work is None:
        print(plan.table())
        return
    lab, began = Lab(plan, options.work, options.threads), time.monotonic()
    results = ROOT / "benchmarks" / "results"
    if not options.afresh and (restored := restore(lab, results / "lab.json")):
        print(f"{restored} runs are taken from {results / 'lab.json'}; --afresh runs them again", file=sys.stderr)
    if unknown := [name for name in options.experiments if name not in plan.experiments]:
        parser.error(f"no experiment {unknown[0]!r} in the plan; it has {', '.join(plan.experiments)}")
    for name in [] if options.write else options.experiments or plan.experiments:
        if not lab.carry_out(name, options.jobs, began + options.hours * 3600):
            print("the time is over; the same command goes on", file=sys.stderr)
            return
    result, text = report(lab, machine_line())
    print(text)
    if options.write:
        runs = ",\n".join(json.dumps(run) for run in result.pop("runs"))
        head = json.dumps({"machine": machine(), **result}, indent=1).removesuffix("\n}")
        (results / "lab.json").write_text(f'{head},\n "runs": [\n{runs}\n ]\n}}\n')
        (results / "lab.md").write_text(text)
        if any(row["verdict"] != "not run" for row in result["claims"]):
            draw_claims(result["claims"], results / "lab-claims.svg")
        curves = numeral_curves(lab)
        if any(len(points) > 1 for points in curves.values()):
            draw_numerals(curves, results / "lab-numerals.svg")


if __name__ == "__main__":
    main()
