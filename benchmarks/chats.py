"""Conversations from end to end, between two chat models whose tokenizers and templates differ, both ways round.

    python -m benchmarks.chats WORK --models smollm2=FOLDER,qwen=FOLDER [--writer qwen] [--write]

The writer answers the prompts of chats_prompts.py twice over ("xtoken precompute --generate"), which makes
conversations of two turns. Each model is captured on them and the other aligned to it; the first of --models learns
from the second, its bits per byte and its answers before and after are those of "xtoken eval" and "xtoken report". What
the packages' templates share of the same conversations is counted pair by pair, without a model. Every step is a verb
of xtoken. WORK stays; a command that was done is not done again.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.chats_prompts import prompts
from benchmarks.machine import machine, machine_line
from xtoken.pipeline.chats import ChatModel, Conversation, Refused, as_written, from_json, open_chat_model, pair
from xtoken.pipeline.store.inspect import bytes_per_token
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOSSES = ("p-kl", "h-kl", "gold", "alm", "byte-prefix")
ANSWER = ["--generate", "64", "--temperature", "0.7", "--seed", "0"]
SHORT = ["--max-tokens", "512"]
STEP = ["--loss", "p-kl", "--mix", "gradmag", "--lr", "5e-5", "--warmup", "10", "--step-tokens", "1024"]
STEP += ["--micro-tokens", "512", "--max-tokens", "512", "--save-every", "50", "--keep", "1"]
DAY = datetime(2026, 1, 1)
Figures = dict[str, Any]


def main() -> None:
    """Write conversations, capture, align, train, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", required=True, help="student=FOLDER,teacher=FOLDER")
    parser.add_argument("--templates", default="", help="NAME=FOLDER by commas: further templates to pair")
    parser.add_argument("--writer", help="name of the model that answers; left out: the teacher")
    parser.add_argument("--conversations", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    models = dict(one.split("=") for one in options.models.split(","))
    student, teacher = models
    writer = options.writer or teacher
    kept = write(work, models[writer], options.conversations, options.held_out)
    result: Figures = {"machine": machine(), "writer": writer, "student": student, "teacher": teacher, **kept}
    templates = models | dict(one.split("=") for one in options.templates.split(",") if one)
    result["pairs"] = paired(work / "chats.jsonl", templates)
    result["ways"] = [way(work, models, one, other) for one, other in ((teacher, student), (student, teacher))]
    result["trained"] = trained(work, models, teacher, student, options.steps)
    text = report(result)
    print(text)
    if options.write:
        (RESULTS / "chats.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "chats.md").write_text(text)


def write(work: Path, writer: str, count: int, held_out: int) -> Figures:
    """``chats.jsonl`` and ``held-out.jsonl``: what the writer answers to each prompt, and then to the next."""
    asked = list(itertools.islice(prompts(), count))
    rows = [
        {"id": f"c{at:03d}", "messages": [*([message("system", system)] if system else []), message("user", first)]}
        for at, (system, first, _) in enumerate(asked)
    ]
    seconds = 0.0
    for turn in (1, 2):
        took, answers = answered(work, writer, f"turn-{turn}", rows)
        seconds += took
        rows = [{**row, "messages": answers[row["id"]]} for row in rows if row["id"] in answers]
        if turn == 1:
            following = {f"c{at:03d}": message("user", then) for at, (_, _, then) in enumerate(asked)}
            rows = [{**row, "messages": [*row["messages"], following[row["id"]]]} for row in rows]
    for name, part in (("chats", rows[held_out:]), ("held-out", rows[:held_out])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return {"conversations": len(rows) - held_out, "held_out": held_out, "seconds_writing": seconds}


def message(role: str, content: str) -> dict[str, str]:
    """One of a conversation."""
    return {"role": role, "content": content}


def answered(work: Path, writer: str, name: str, rows: list[Figures]) -> tuple[float, dict[str, list[Figures]]]:
    """Seconds, and the messages of each conversation with its answer."""
    corpus, out = work / f"{name}.jsonl", work / name
    corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = xtoken(["precompute", corpus, "--teacher", writer, "--id-field", "id", *ANSWER, *SHORT, "--out", out])
    messages = {}
    for batch in iter_capture(str(out), ["sample_id", "messages"]):
        for sample_id, text in zip(batch["sample_id"].to_pylist(), batch["messages"].to_pylist(), strict=True):
            said = json.loads(text)["messages"]  # earlier answers are marked as not to be taught there; here all are
            messages[sample_id.split("#")[0]] = [message(one["role"], one["content"]) for one in said]
    return found["seconds"], messages


def conversations(path: Path) -> Iterator[Conversation]:
    """Of a file that this script wrote."""
    for line in path.read_text().splitlines():
        yield from_json(json.dumps({"messages": json.loads(line)["messages"]}))


def paired(path: Path, templates: dict[str, str]) -> list[Figures]:
    """What each ordered pair of templates shares of the conversations."""
    opened = {name: open_chat_model(folder, date=DAY) for name, folder in templates.items()}
    talks = list(conversations(path))
    return [
        {"teacher": one, "student": other, **_shared(opened[one], opened[other], talks)}
        for one, other in itertools.permutations(opened, 2)
    ]


def _shared(teacher: ChatModel, student: ChatModel, talks: list[Conversation]) -> Figures:
    found: Counter[str] = Counter()
    for talk in talks:
        try:
            theirs = teacher.encode(talk)
            mine = student.encode(as_written(talk, theirs))
        except Refused as refused:
            found[f"refused: {refused.reason}"] += 1
            continue
        shared, data = pair(theirs, mine), (theirs.text.encode(), mine.text.encode())
        found["conversations"] += 1
        found["taught_bytes"] += sum(span.byte_end - span.byte_start for span in theirs.spans if span.learn)
        for match in shared.matches:
            one, other = match.teacher, match.student
            if match.taught:
                same = data[0][one.byte_start : one.byte_end] == data[1][other.byte_start : other.byte_end]
                found["same_bytes"] += (one.byte_end - one.byte_start) * same
                found["stops"] += one.kind == "stop"
        found.update(f"lost {kind}: {reason}" for (kind, _, _), reason in shared.lost)
    return dict(found)


def way(work: Path, models: dict[str, str], teacher: str, student: str) -> Figures:
    """The capture of one model and its targets for the other."""
    capture, targets = work / f"capture-{teacher}", work / f"targets-{teacher}-{student}"
    words = ["precompute", work / "chats.jsonl", "--teacher", models[teacher], "--id-field", "id", *SHORT]
    captured = xtoken([*words, "--out", capture])
    words = ["align", capture, "--student", models[student], "--for", ",".join(LOSSES), "--out", targets]
    aligned = xtoken(words)
    tokens = sum(part.tokens for part in read_manifest(str(targets), TargetManifest).parts)
    rows = sum(part.rows for part in read_manifest(str(capture), CaptureManifest).parts)
    sizes = bytes_per_token(str(targets), read_manifest(str(targets), TargetManifest))
    return {
        "teacher": teacher,
        "student": student,
        "rows": rows,
        "tokens": tokens,
        "capture": captured,
        "align": aligned,
        "bytes_per_token": sizes,
    }


def trained(work: Path, models: dict[str, str], teacher: str, student: str, steps: int) -> Figures:
    """The student before and after, on conversations that it has not seen."""
    out, held_out = work / f"run-{student}", work / "held-out.jsonl"
    words = ["train", work / f"targets-{teacher}-{student}", "--student", models[student], "--out", out]
    run = xtoken([*words, *STEP, "--steps", str(steps), "--eval-text", held_out])
    figures = {
        name: xtoken(["eval", model, "--text", held_out, "--id-field", "id", *SHORT])
        for name, model in (("before", models[student]), ("after", out / "model"), ("teacher", models[teacher]))
    }
    return {"run": run, "eval": figures}


def report(result: Figures) -> str:
    """Markdown."""
    lines = ["# Conversations between two chat models", ""]
    written = result["conversations"] + result["held_out"]
    lines += [f"`python -m benchmarks.chats WORK` on {machine_line()}. {result['writer']} answered the prompts of"]
    lines += [f"chats_prompts.py twice over, at most 64 tokens each time, which gave {written} conversations of two turns"]
    lines += [f"({result['held_out']} of them held out), in {result['seconds_writing']:.0f} s on a machine that was busy.", ""]
    lines += ["## What two templates share", ""]
    lines += [f"Of {result['conversations']} conversations, without a model. Equal: taught bytes that stand in a span of"]
    lines += ["both renderings, byte for byte.", ""]
    lines += ["| teacher's template | student's | conversations | taught bytes | equal | ends of answers met | lost |"]
    lines += ["|---" * 7 + "|"]
    for one in result["pairs"]:
        lost = ", ".join(f"{name.removeprefix('lost ')} {count}" for name, count in one.items() if name[:4] in _LOST)
        cells = (one["conversations"], one["taught_bytes"], one["same_bytes"], one["stops"])
        lines.append(f"| {one['teacher']} | {one['student']} | {' | '.join(f'{c:,}' for c in cells)} | {lost or 'none'} |")
    lines += ["", "## Both ways round", ""]
    lines += ["| teacher | student | rows | student tokens | taught bytes with a chunk | chunks | of one token each |"]
    lines += ["|---" * 7 + "|"]
    for one in result["ways"]:
        found = one["align"]
        share = found["conversations"]["share_of_taught_bytes"]
        lines.append(
            f"| {one['teacher']} | {one['student']} | {one['rows']:,} | {one['tokens']:,} | {share:.2%} | "
            f"{found['chunks']:,} | {found['share_of_1_1_chunks']:.1%} |"
        )
    lines += ["", *_trained_lines(result["trained"])]
    return "\n".join(lines) + "\n"


_LOST = ("lost", "refu")


def _trained_lines(trained: Figures) -> list[str]:
    lines = ["## A student learns", "", "On conversations held out, bits per byte of taught bytes, and of the end of an answer bits per token.", ""]
    lines += ["| | all taught bytes | answers | end of an answer |", "|---|---|---|---|"]
    for name, found in trained["eval"].items():
        kinds = found["by_kind"]
        cells = found["bits_per_byte"], kinds["assistant"]["bits_per_byte"], kinds["stop"]["bits_per_token"]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return [*lines, ""]


def xtoken(words: list[Any]) -> Figures:
    """What a verb says with --json; done once, its answer is kept beside what it wrote."""
    began = time.monotonic()
    command = [sys.executable, "-m", "xtoken", *map(str, words), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, env={**os.environ})
    print(f"{words[0]}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found: Figures = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
