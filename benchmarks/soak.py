"""Kill -9 of workers, drivers and raylets at random moments: what is lost, what is left, and do the bytes agree?

A capture of real text by the fake engine, three workers; whatever ends with an error is started again with the same
settings. Each capture is compared with one that was left alone, file by file. The test of the same name does ten kills.

    python -m benchmarks.soak --kills 60 --minutes 7      # writes benchmarks/results/soak.{json,md}
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOKENIZER = ROOT / ".cache" / "models" / "smollm2-135m" / "tokenizer.json"
KINDS = ("worker", "driver", "raylet")
EVENTS = ("part", "late", "died", "lost", "failed", "overdue")
sys.path.append(str(ROOT / "tests" / "integration"))


def soak(kills: int, seconds: float, seed: int) -> dict[str, Any]:
    """Counters by executor, half of the kills and of the time each; AssertionError where a byte differs."""
    from fault_runs import Run, documents, settings, write_corpus
    from fault_soak import Soak, machines

    with tempfile.TemporaryDirectory(prefix="xtoken-soak-") as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus.jsonl", documents())
        undisturbed = settings(corpus, TOKENIZER, folder / "undisturbed")
        Run(undisturbed, folder).finish()
        found = {"local": vars(Soak(undisturbed, folder / "local", seed).run(kills // 2, seconds / 2))}
        with machines() as nodes:
            found["ray"] = vars(Soak(undisturbed, folder / "ray", seed, nodes).run(kills - kills // 2, seconds / 2))
    return found


def report(found: dict[str, Any], seed: int) -> str:
    """The figures as Markdown."""
    total: Counter[str] = Counter()
    for one in found.values():
        total.update(one["kills"])
    kills = f"{sum(total.values())} x kill -9 ({', '.join(f'{total[kind]} {kind}s' for kind in KINDS)})"
    lines = [
        "# Soak",
        "",
        f"{kills}, seed {seed}. Every capture ended with the bytes, records and manifest of one that was left alone: "
        "no sample twice, none missing, no torn file, no temporary file.",
        "",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
        *(_row(f"{kind}s killed", [one["kills"].get(kind, 0) for one in found.values()]) for kind in KINDS),
        _row("shards that the killed had begun and not committed", [one["in_flight"] for one in found.values()]),
        _row("captures brought to their end", [one["runs"] for one in found.values()]),
        _row("drivers started on what another had left", [one["resumes"] for one in found.values()]),
        _row("runs with a shard killed three times, run again", [one["set_aside"] for one in found.values()]),
        _row("temporary files after drivers were killed, all cleaned", [one["orphans"] for one in found.values()]),
        *(_row(f"events: {kind}", [one["events"].get(kind, 0) for one in found.values()]) for kind in EVENTS),
        _row("seconds", [round(one["seconds"]) for one in found.values()]),
        "",
        f"{machine_line()}. Raylets are processes of this machine. Command: `python -m benchmarks.soak`.",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, values: list[int]) -> str:
    return f"| {name} | " + " | ".join(str(value) for value in values) + " |"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    found = soak(chosen.kills, 60 * chosen.minutes, chosen.seed)
    text = report(found, chosen.seed)
    (chosen.out / "soak.md").write_text(text)
    (chosen.out / "soak.json").write_text(
        json.dumps({"machine": machine(), "seed": chosen.seed, **found}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
