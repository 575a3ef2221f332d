"""Ctrl-C in the stages after capture, as a terminal does it: exit code, message, resume, same result."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xtoken import cli
from xtoken.schemas.ui.answer import Interrupted

ROOT = Path(cli.__file__).resolve().parent
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
STEPS = 12


def command(*words: object) -> list[str]:
    """An xtoken command line."""
    return [sys.executable, str(ROOT / "cli.py"), *(str(word) for word in words)]


def run(*words: object) -> None:
    """Run xtoken to its end."""
    done = subprocess.run(command(*words, "--quiet"), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def student(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that speaks SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, max_position_embeddings=1024, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def targets(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of a real text from the fake teacher: what is tested here is the plumbing."""
    folder = tmp_path_factory.mktemp("targets")
    fake = ["--teacher", student, "--backend", "fake", "--max-tokens", 256, "--k", 8]
    run("precompute", TEXT, *fake, "--out", folder / "capture")
    run("align", folder / "capture", "--student", student, "--out", folder / "targets")
    return folder / "targets"


def train_words(targets: Path, student: Path, out: Path) -> list[object]:
    """A short training run that saves after every step."""
    return [
        *("train", targets, "--student", student, "--out", out, "--steps", STEPS, "--warmup", 2),
        *("--step-tokens", 256, "--save-every", 1, "--lr", 1e-3),
    ]


def stopped(words: list[object], out: Path) -> subprocess.CompletedProcess[str]:
    """Start training, press Ctrl-C after its third checkpoint, wait."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / "step-000003").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def test_training_resumes_to_the_same_weights(targets: Path, student: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*train_words(targets, student, whole))
    words = train_words(targets, student, broken)
    done = stopped(words, broken)
    assert done.returncode == Interrupted.exit_code
    assert "the same command resumes" in done.stderr
    assert not (broken / "model").exists()
    run(*words)
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_ctrl_c_in_align_leaves_what_was_committed(targets: Path, student: Path, tmp_path: Path) -> None:
    fake = ["--teacher", student, "--backend", "fake", "--max-tokens", 64, "--k", 8, "--shard-bytes", 1]
    corpus = tmp_path / "many.jsonl"
    text = json.loads(TEXT.read_text(encoding="utf-8"))["text"]
    corpus.write_text("".join(json.dumps({"text": text[n : n + 500]}) + "\n" for n in range(0, 6000, 100)))
    run("precompute", corpus, *fake, "--out", tmp_path / "capture")
    words = ["align", tmp_path / "capture", "--student", student, "--out", tmp_path / "out"]
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    commits = tmp_path / "out" / "commits"
    deadline = time.monotonic() + 300
    while not list(commits.glob("*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == Interrupted.exit_code, error
    before = {path.name: path.stat().st_mtime_ns for path in commits.glob("*.json")}
    assert 0 < len(before) < 60
    run(*words)
    after = {path.name: path.stat().st_mtime_ns for path in commits.glob("*.json")}
    assert len(after) == 60
    assert {name: after[name] for name in before} == before
    run("verify", tmp_path / "out")
