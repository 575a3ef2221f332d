"""Conversations from end to end, between two chat models whose tokenizers and templates differ, both ways round.

    python -m benchmarks.chats WORK --models smollm2=FOLDER,qwen=FOLDER [--writer qwen] [--write]

The writer answers the prompts of chats_prompts.py twice over ("xtoken precompute --generate"), which makes
conversations of two turns. Each model is captured on them and the other aligned to it; the first of --models learns
from the second, by P-KL and by CE alone; its bits per byte before and after are those of "xtoken eval", its answers
those that the runs wrote. What the packages' templates share of the same conversations, and of those of the tests with
tools and reasoning, is counted pair by pair, without a model. Every step is a verb of xtoken. WORK stays; a command
that was done is not done again.
"""

import argparse
import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chats_prompts import prompts
from benchmarks.machine import machine, machine_line
from benchmarks.verbs import xtoken
from xtoken.pipeline.chats import (
    LEARNED,
    ChatModel,
    Conversation,
    Refused,
    from_json,
    open_chat_model,
    pair,
    shared_parts,
)
from xtoken.pipeline.store.inspect import bytes_per_token
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOSSES = ("p-kl", "h-kl", "gold", "alm", "byte-prefix")
ANSWER = ["--generate", "64", "--temperature", "0.7", "--seed", "0"]
SHORT = ["--max-tokens", "512"]
WAYS = {"p-kl": ["--loss", "p-kl", "--mix", "gradmag"], "ce": ["--loss", "ce"]}
STEP = ["--lr", "5e-5", "--warmup", "10", "--step-tokens", "1024", "--micro-tokens", "512", "--max-tokens", "512"]
STEP += ["--save-every", "50", "--keep", "1"]
TOOLS = ("thinking", "reasoning", "calls", "call")  # of the tests
LEARN = (*LEARNED, "thinking")
DAY = datetime(2026, 1, 1)
Figures = dict[str, Any]
_SHOWN = 4


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
    opened = {name: open_chat_model(folder, date=DAY) for name, folder in templates.items()}
    result["pairs"] = paired(opened, list(conversations(work / "chats.jsonl")))
    result["tools"] = paired(opened, of_the_tests())
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
    for turn in (1, 2):
        answers = answered(work, writer, f"turn-{turn}", rows)
        rows = [{**row, "messages": answers[row["id"]]} for row in rows if row["id"] in answers]
        if turn == 1:
            following = {f"c{at:03d}": message("user", then) for at, (_, _, then) in enumerate(asked)}
            rows = [{**row, "messages": [*row["messages"], following[row["id"]]]} for row in rows]
    for name, part in (("chats", rows[held_out:]), ("held-out", rows[:held_out])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return {"conversations": len(rows) - held_out, "held_out": held_out}


def message(role: str, content: str) -> dict[str, str]:
    """One of a conversation."""
    return {"role": role, "content": content}


def answered(work: Path, writer: str, name: str, rows: list[Figures]) -> dict[str, list[Figures]]:
    """The messages of each conversation with its answer."""
    corpus, out = work / f"{name}.jsonl", work / name
    corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    xtoken(["precompute", corpus, "--teacher", writer, "--id-field", "id", *ANSWER, *SHORT, "--out", out])
    messages = {}
    for batch in iter_capture(str(out), ["sample_id", "messages"]):
        for sample_id, text in zip(batch["sample_id"].to_pylist(), batch["messages"].to_pylist(), strict=True):
            said = json.loads(text)["messages"]  # earlier answers are marked as not to be taught there; here all are
            messages[sample_id.split("#")[0]] = [message(one["role"], one["content"]) for one in said]
    return messages


def conversations(path: Path) -> Iterator[Conversation]:
    """Of a file that this script wrote."""
    for line in path.read_text().splitlines():
        yield from_json(json.dumps({"messages": json.loads(line)["messages"]}))


def of_the_tests() -> list[Conversation]:
    """Conversations with tools and reasoning, which the tests of templates use."""
    spec = importlib.util.spec_from_file_location("talks", ROOT / "tests" / "talks.py")
    assert spec is not None
    assert spec.loader is not None
    talks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(talks)
    return [from_json(json.dumps({"messages": talks.TALKS[name]})) for name in TOOLS]


def paired(opened: dict[str, ChatModel], talks: list[Conversation]) -> list[Figures]:
    """What each ordered pair of templates shares of conversations."""
    return [
        {"teacher": one, "student": other, **_shared(opened[one], opened[other], talks)}
        for one, other in itertools.permutations(opened, 2)
    ]


def _shared(teacher: ChatModel, student: ChatModel, talks: list[Conversation]) -> Figures:
    """Counts: taught bytes; those in chunks, compared byte by byte; chunks; ends of answers; what is lost by reason."""
    found: Counter[str] = Counter()
    for talk in talks:
        try:
            theirs, mine = teacher.encode(talk, LEARN), student.encode(talk, LEARN)
        except Refused as refused:
            found[f"refused: {refused.reason}"] += 1
            continue
        shared, data = pair(theirs, mine), (theirs.text.encode(), mine.text.encode())
        found["conversations"] += 1
        found["taught_bytes"] += sum(span.byte_end - span.byte_start for span in theirs.spans if span.learn)
        for match in shared.matches:
            if match.taught:
                found["stops"] += match.teacher.kind == "stop"
                student_part, teacher_part = shared_parts(match, mine.ends, theirs.ends)
                found["chunks"] += len(np.intersect1d(student_part.ends, teacher_part.ends))
                if match.size and len(teacher_part.ends):
                    sides = ((theirs, teacher_part), (mine, student_part))
                    ends = [int(one.ends[part.first + len(part.ends) - 1]) for one, part in sides]
                    size = int(teacher_part.ends[-1])
                    same = data[0][ends[0] - size : ends[0]] == data[1][ends[1] - size : ends[1]]
                    found["same_bytes"] += size * same
                    found["other_bytes"] += size * (not same)
        found.update(f"lost {kind}: {reason}" for (kind, _, _), reason in shared.lost)
    return dict(found)


def way(work: Path, models: dict[str, str], teacher: str, student: str) -> Figures:
    """The capture of one model and its targets for the other."""
    capture, targets = work / f"capture-{teacher}", work / f"targets-{teacher}-{student}"
    words = ["precompute", work / "chats.jsonl", "--teacher", models[teacher], "--id-field", "id", *SHORT]
    xtoken([*words, "--out", capture])
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
        "align": {name: aligned[name] for name in ("chunks", "share_of_1_1_chunks", "conversations")},
        "bytes_per_token": sizes,
    }


def trained(work: Path, models: dict[str, str], teacher: str, student: str, steps: int) -> Figures:
    """The student before and after, on conversations that it has not seen."""
    held_out = work / "held-out.jsonl"
    for name, how in WAYS.items():
        words = ["train", work / f"targets-{teacher}-{student}", "--student", models[student], *how]
        out = work / f"run-{student}-{name}"
        if not (out / "model").exists():
            xtoken([*words, "--out", out, *STEP, "--steps", str(steps), "--eval-text", held_out])
    measured = {"before": models[student]} | {name: str(work / f"run-{student}-{name}" / "model") for name in WAYS}
    figures = {
        name: xtoken(["eval", model, "--text", held_out, "--id-field", "id", *SHORT])
        for name, model in (measured | {"teacher": models[teacher]}).items()
    }
    lines = (work / f"run-{student}-p-kl" / "completions.jsonl").read_text().splitlines()
    return {"steps": steps, "eval": figures, "answers": [json.loads(line) for line in lines]}


def report(result: Figures) -> str:
    """Markdown."""
    held_out = result["held_out"]
    lines = ["# Conversations between two chat models", ""]
    lines += [f"`python -m benchmarks.chats WORK` on {machine_line()}. {result['writer']} answered the prompts of"]
    lines += [
        "chats_prompts.py twice over, at most 64 tokens each time; answers that were cut there are taught with an end."
    ]
    lines += [f"{result['conversations'] + held_out} conversations of two turns, {held_out} of them held out."]
    lines += ["Models are SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct in float32,"]
    lines += ["made from quantized GGUF files.", ""]
    lines += ["## What two templates share", "", *_pair_lines(result["pairs"]), ""]
    lines += [f"The same of {len(TOOLS)} conversations of the tests with reasoning and tool calls:", ""]
    lines += [*_tool_lines(result["tools"]), "", "## Both ways round", ""]
    names = "teacher", "student", "rows", "student tokens", "taught bytes with a chunk", "chunks", "of one token each"
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for one in result["ways"]:
        found = one["align"]
        share = found["conversations"]["share_of_taught_bytes"]
        lines.append(
            f"| {one['teacher']} | {one['student']} | {one['rows']:,} | {one['tokens']:,} | {share:.2%} | "
            f"{found['chunks']:,} | {found['share_of_1_1_chunks']:.1%} |"
        )
    return "\n".join([*lines, "", *_trained_lines(result)]) + "\n"


def _pair_lines(pairs: list[Figures]) -> list[str]:
    """Shares of taught bytes, a row for each teacher's template."""
    total = {name: sum(one.get(name, 0) for one in pairs) for name in ("same_bytes", "other_bytes", "chunks", "stops")}
    talks = max(one["conversations"] for one in pairs)
    lines = [f"{talks} conversations in {len(pairs)} ordered pairs of templates, without a model: {total['chunks']:,}"]
    lines += [f"chunks of {total['same_bytes']:,} taught bytes, {total['other_bytes']} of which differ between the two"]
    lines += [f"renderings; {total['stops']:,} ends of answers meet. The teacher's taught bytes in chunks:", ""]
    names = list(dict.fromkeys(one["teacher"] for one in pairs))
    lines += [f"| teacher's template | {' | '.join(f'student {name}' for name in names)} |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    share = {(one["teacher"], one["student"]): one["same_bytes"] / one["taught_bytes"] for one in pairs}
    for teacher in names:
        cells = [f"{share[teacher, name]:.2%}" if name != teacher else "" for name in names]
        lines.append(f"| {teacher} | {' | '.join(cells)} |")
    return lines


def _tool_lines(pairs: list[Figures]) -> list[str]:
    """What each pair of templates loses of reasoning and calls, those of the same figures together."""
    lines = ["| student's template | teacher's | taught bytes in chunks | what the student has not |", "|---" * 4 + "|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for one in pairs:
        share = f"{one.get('same_bytes', 0) / one['taught_bytes']:.1%}" if one.get("taught_bytes") else "none"
        lost = [f"{name.removeprefix('lost ')} {count}" for name, count in one.items() if name[:4] in ("lost", "refu")]
        rows.setdefault((one["student"], share, ", ".join(sorted(lost)) or "nothing"), []).append(one["teacher"])
    for (student, share, lost), names in sorted(rows.items()):
        lines.append(f"| {student} | {', '.join(names)} | {share} | {lost} |")
    return lines


def _trained_lines(result: Figures) -> list[str]:
    """What the student says of conversations that it has not seen, in figures and in words."""
    trained = result["trained"]
    lines = ["## A student learns", ""]
    lines += [
        f"{result['student']} from {result['teacher']}, {trained['steps']} steps of some 1,024 tokens. One seed and"
    ]
    lines += [
        "one rate: it shows that conversations train, not which loss is better. Bits per byte of the answers held"
    ]
    lines += ["out, which the teacher wrote, and bits per token of their ends.", ""]
    lines += ["| | answers | end of an answer |", "|---|---|---|"]
    for name, found in trained["eval"].items():
        kinds = found["by_kind"]
        cells = kinds["assistant"]["bits_per_byte"], kinds["stop"]["bits_per_token"]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    lines += ["", "Answers to questions held out, first before and then after (p-kl):", ""]
    for one in trained["answers"][: 2 * _SHOWN]:
        question = one["prompt"].rsplit("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        lines.append(f"* {one['when']}: *{' '.join(question.split())}* {' '.join(one['completion'].split())[:300]}")
    return [*lines, ""]


if __name__ == "__main__":
    main()
