"""One rank and two, DDP and FSDP2, on gloo: the same steps, the same curve, the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import toys

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
# Sums of gradients in another order: float32 rounding, which eight steps of AdamW at 1e-2 spread over the weights.
CURVE, WEIGHTS = 1e-5, 1e-4
HELD_OUT = [1500, 900, 1400]  # tokens: three forward passes, so that one of two ranks is idle in the last
LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7], [20, 2, 8, 6]]
ONE: tuple[str, ...] = ()
# embedding and head in full beside adapters, and alone at first
FULL = {"lora_embeddings": True, "freeze_steps": 3}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``job(name, poison, breaks, **options)``: write a job's file (see ``train_ranks``)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, toy = tmp_path_factory.mktemp("ranks"), toys()
    targets = toy.write_targets(folder / "targets", toy.Pair(), LENGTHS, losses=("p-kl",))
    held_out = toy.write_targets(folder / "held-out", toy.Pair(), LENGTHS[:3], losses=("p-kl",))
    chats = {"losses": ("p-kl",), "step": 1 / 64, "chat": toy.CHAT}
    toy.write_targets(folder / "chats", toy.Pair(), [[*LENGTHS[0], 1], *LENGTHS[1:]], **chats)
    toy.write_targets(folder / "held-out-chats", toy.Pair(), LENGTHS[:3], **chats)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=toy.V + 8, attention_dropout=0.1, tie_word_embeddings=True, **sizes)
    )
    model.save_pretrained(folder / "student")
    base = {
        "targets": [targets],
        "student": str(folder / "student"),
        "tokenizer": "bytes",
        "device": "cpu",
        "steps": STEPS,
        "step_tokens": 60,
        "micro_tokens": 24,
        "max_tokens": 24,
        "warmup": 2,
        "lr": 1e-2,
        "streams": 2,
        "save_every": 4,
        "mix": "dynamic",
        "decoders": 1,
        "betas": [0.9, 0.95],
        "eval_targets": str(held_out),
        "completions": 0,
    }

    def write(
        name: str, poison: int = 0, chats: bool = False, breaks: tuple[int, str] | None = None, **options: Any
    ) -> Path:
        of = {"targets": [str(folder / "chats")], "eval_targets": str(folder / "held-out-chats")} if chats else {}
        config = base | of | {"out": str(folder / name)} | options
        path = folder / f"{name}.json"
        answer = str(folder / f"{name}.answer")
        texts = [[3 + at * at % 17 for at in range(length)] for length in HELD_OUT]
        tokenizer = json.loads(toy.STUDENT.model_dump_json())
        one = {"config": config, "tokenizer": tokenizer, "held_out": texts, "answer": answer}
        path.write_text(json.dumps(one | {"poison": poison, "breaks": breaks}))
        return path

    return write


def begin(path: Path, ranks: tuple[str, ...]) -> "subprocess.Popen[str]":
    command = [sys.executable, *ranks, str(ROOT / "tests" / "integration" / "train_ranks.py"), str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(path: Path, ranks: tuple[str, ...]) -> Path:
    """Run a job to its end; its folder."""
    process = begin(path, ranks)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-20000:]
    return Path(json.loads(path.read_text())["config"]["out"])


def curve(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def same_held_out(one: Path, other: Path) -> None:
    """What ranks measured together, before and after."""
    first, second = (json.loads((out / "summary.json").read_text()) for out in (one, other))
    for when in ("before", "after"):
        figures, theirs = first[when], second[when]
        assert figures["chunks"] == theirs["chunks"] > 0
        assert figures["bytes"] == theirs["bytes"] == sum(HELD_OUT)
        for name in ("bits_per_byte", "kl", "teacher_bits_per_byte"):
            assert theirs[name] == pytest.approx(figures[name], rel=WEIGHTS), name


def same_curve(one: Path, other: Path) -> float:
    """All counts are equal and all figures near; the largest relative difference of one."""
    first, second = curve(one), curve(other)
    assert [line["step"] for line in first] == [line["step"] for line in second] == list(range(1, STEPS + 1))
    apart = 0.0
    for line, twin in zip(first, second, strict=True):
        for name in ("tokens", "predicted", "chunks", "cut_tokens", "padding", "lr"):
            assert line[name] == twin[name], name
        for name in ("loss", "kd", "ce", "bits_per_byte", "grad_norm"):
            assert twin[name] == pytest.approx(line[name], rel=CURVE), name
            apart = max(apart, abs(twin[name] / line[name] - 1))
    weights, theirs = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert weights.keys() == theirs.keys()
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=WEIGHTS, atol=WEIGHTS)
    return apart


def test_two_ranks_learn_conversations_as_one(job: Callable[..., Path]) -> None:
    """Each reads its own, with another share of taught tokens; of one conversation nothing is taught."""
    one, two = run(job("talk", chats=True), ONE), run(job("talk-ddp", chats=True), TWO)
    same_curve(one, two)
    same_held_out(one, two)
    for name in ("taught", "untaught_samples"):
        values = [line[name] for line in curve(one)]
        assert values == [line[name] for line in curve(two)]
        assert len(set(values)) > 1


@pytest.fixture(scope="module")
def alone(job: Callable[..., Path]) -> Path:
    """The run of one rank."""
    return run(job("alone"), ONE)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one(
    job: Callable[..., Path], alone: Path, parallel: str, figure: Callable[[str], None]
) -> None:
    other = run(job(parallel, parallel=parallel), TWO)
    apart = same_curve(alone, other)
    same_held_out(alone, other)
    figure(f"{parallel} of two ranks against one, {STEPS} steps: figures differ by at most {apart:.1e}")


def test_ranks_measure_the_gradients_of_the_whole_step(job: Callable[..., Path]) -> None:
    options = {"mix": "gradmag", "gradmag_every": 3, "ce_weight": 0.5}
    alone = run(job("gradmag", **options), ONE)
    for parallel in ("ddp", "fsdp"):
        other = run(job(f"gradmag-{parallel}", parallel=parallel, **options), TWO)
        same_curve(alone, other)
        weighed = 0
        for line, twin in zip(curve(alone), curve(other), strict=True):
            assert line.keys() == twin.keys()
            for name in ("ce_weight", "kd_weight", "ce_gradient", "kd_gradient"):
                assert (name in line) or name.endswith("gradient")
                assert twin.get(name, 0) == pytest.approx(line.get(name, 0), rel=CURVE), name
            weighed += line["kd_weight"] != 1
        assert weighed == STEPS, "the first step is measured in a pass of its own"


@pytest.mark.parametrize(("parallel", "more"), [("fsdp", {}), ("fsdp", FULL), ("ddp", FULL)])
def test_adapters_and_recomputed_activations_take_the_steps_of_one(
    job: Callable[..., Path], parallel: str, more: dict[str, Any]
) -> None:
    options = {"lora": 4, "activation_checkpointing": True, **more}
    name = f"adapted-{parallel}-{len(more)}"
    one, two = run(job(f"{name}-one", **options), ONE), run(job(name, parallel=parallel, **options), TWO)
    same_curve(one, two)
    weights, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, two))
    assert weights.keys() == theirs.keys()
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=WEIGHTS, atol=WEIGHTS)


def test_ranks_go_back_together(job: Callable[..., Path]) -> None:
    """The sixth batch has no loss: the run goes back to step 4 and leaves the batch out."""
    one, two = (
        run(job(name, poison=6, rollback=1, parallel="fsdp"), ranks) for name, ranks in (("back", ONE), ("back-2", TWO))
    )
    same_curve(one, two)
    for out in (one, two):
        (event,) = (
            line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "event" in line
        )
        assert (event["event"], event["step"], event["from_step"], event["left_out"]) == ("rollback", 4, 6, 6)
    worst, theirs = (json.loads((out / "diagnosis.json").read_text()) for out in (one, two))
    assert sorted(row["id"] for row in worst["samples"]) == sorted(row["id"] for row in theirs["samples"])


def test_a_run_goes_on_with_another_number_of_ranks(job: Callable[..., Path], alone: Path) -> None:
    """SIGTERM ends a run of one rank; two go on from its checkpoint, sharded."""
    path = job("preempted", parallel="fsdp", save_every=100)
    process, metrics = begin(path, ONE), Path(json.loads(path.read_text())["config"]["out"], "metrics.jsonl")
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):  # perhaps one is of held-out data
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-20000:]
    assert json.loads(path.with_suffix(".answer").read_text()).get("preempted", STEPS) >= 1
    same_curve(alone, run(path, TWO))


def test_streams_that_ranks_cannot_share_are_refused(job: Callable[..., Path]) -> None:
    process = begin(job("three", streams=3), TWO)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "3 streams cannot be dealt to 2 ranks evenly" in said


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_an_error_on_one_rank_ends_all_soon(job: Callable[..., Path], backend: str) -> None:
    """The other waits in a collective. NCCL's way out is taken on gloo: no rank leaves its group, and all end."""
    process = begin(job(f"broken-{backend}", breaks=(3, backend)), TWO)
    began = time.monotonic()
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "this rank is broken" in said, "the error is told, with its traceback"
    assert time.monotonic() - began < 240, "not after half an hour"
