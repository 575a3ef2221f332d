"""Rounds: the student writes, the teacher scores what it wrote, the student learns; again from what it has become.

python examples/rounds.py prompts.jsonl --student STUDENT --teacher TEACHER --out rounds [--rounds 2]

prompts.jsonl has conversations that end with the user, as any corpus of conversations. Each round is four commands,
printed as they run; a round that was done is not done again, and a killed one goes on where it was.

This is not on-policy distillation with fresh answers in every step: the answers of a round are those of the student as
it was when the round began.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import xtoken


def run(*words: object) -> None:
    """A verb, shown before it runs."""
    said = [str(word) for word in words]
    print("$ xtoken", *said, flush=True)
    subprocess.run([sys.executable, "-m", "xtoken", *said, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def write_answers(capture: Path, out: Path) -> int:
    """The conversations of a capture as a corpus, answers included; how many there are."""
    found = [json.dumps(sample.conversation) for sample in xtoken.open_capture(str(capture))]
    out.write_text("\n".join(found) + "\n", encoding="utf-8")
    return len(found)


def one_round(folder: Path, prompts: Path, student: str, teacher: str, options: argparse.Namespace, seed: int) -> Path:
    """The student after the round."""
    folder.mkdir(parents=True, exist_ok=True)
    written, scored, targets, trained = (folder / name for name in ("written", "scored", "targets", "run"))
    template = {
        name: ["--template", path] if path else [] for name, path in vars(options).items() if "template" in name
    }
    limits = ["--max-tokens", options.max_tokens]
    write = ["--generate", options.tokens, "--temperature", options.temperature, "--samples", options.samples]
    # the student's own rows are not needed: one entry of each is the least there is
    run("precompute", prompts, "--teacher", student, *template["student_template"], *write, "--seed", seed, *limits,
        "--k", 1, "--out", written)  # fmt: skip
    answers = folder / "answers.jsonl"
    if not (scored / "manifest.json").exists():
        print(f"{write_answers(written, answers)} answers in {answers}", flush=True)
    # the last turn alone was written by the student
    run("precompute", answers, "--teacher", teacher, *template["teacher_template"], "--turns", "last", *limits,
        "--backend", options.backend, "--out", scored)  # fmt: skip
    run("align", scored, "--student", student, *template["student_template"], "--for", options.loss, "--out", targets)
    # reverse KL: what the student writes and the teacher would not is what it unlearns
    learn = [
        *limits,
        "--loss",
        options.loss,
        "--kl",
        "reverse",
        "--ce-weight",
        0,
        "--steps",
        options.steps,
        "--lr",
        options.lr,
    ]
    run("train", targets, "--student", student, *template["student_template"], *learn,
        "--step-tokens", options.step_tokens, "--out", trained)  # fmt: skip
    return trained / "model"


def main(words: Sequence[str] | None = None) -> list[Path]:
    """The student after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--student", required=True, help="writes and learns")
    parser.add_argument("--teacher", required=True, help="scores")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--student-template", help="chat template, where the student has none of its own")
    parser.add_argument("--teacher-template", help="chat template, where the teacher has none of its own")
    parser.add_argument("--backend", default="hf", help="of the teacher")
    parser.add_argument("--tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--samples", type=int, default=1, help="answers to a prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--loss", default="p-kl", choices=["p-kl", "sparse-kl", "strict"])
    parser.add_argument("--steps", type=int, default=200, help="of each round")
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=2e-5)
    options = parser.parse_args(words)
    students = [options.student]
    for number in range(options.rounds):
        folder = options.out / f"round-{number + 1}"
        students.append(one_round(folder, options.prompts, str(students[-1]), options.teacher, options, number))
        print(f"round {number + 1}: {students[-1]}", flush=True)
    return students[1:]


if __name__ == "__main__":
    main()
