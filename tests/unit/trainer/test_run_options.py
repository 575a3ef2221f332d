"""What a run leaves and takes beside the loop itself: evaluations, trackers, adapters, kernels, streams."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer import loop
from xtoken.trainer.evaluate import EvalSample
from xtoken.trainer.loop import train
from xtoken.trainer.metrics import Metrics
from xtoken.trainer.run import begun_with

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7]]
# A line separator of Unicode in an id must not tear a line of JSON.
HELD_OUT = [
    EvalSample(np.array([3, 4, 5, 6], np.int32), 9, 2, "book/one\u2028#0", "book"),
    EvalSample(np.array([7, 8, 9], np.int32), 5, 1, "code/two#0", "code"),
]


@pytest.fixture
def configure(make_targets: Callable[..., str], student_dir: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    root = make_targets(LENGTHS)
    sizes = {"steps": 6, "step_tokens": 24, "micro_tokens": 14, "max_tokens": 32, "warmup": 2, "save_every": 5}
    base = {"targets": [root], "student": student_dir, "out": str(tmp_path / "run"), "device": "cpu", "lr": 1e-2}
    return lambda **options: TrainConfig.from_flat(**{**base, **sizes, **options})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_held_out_figures_rows_and_completions(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    config = configure(eval_every=2, completions=2, eval_targets=configure().data.targets[0])
    summary = train(config, student_info, HELD_OUT, Silent())
    root = Path(config.out)
    found = [(line["step"], line["eval"]) for line in lines_of(root / "metrics.jsonl") if "eval" in line]
    assert found == [(0, "before"), (2, "step"), (4, "step"), (6, "after")]
    assert summary["after"]["by_source"].keys() == {"book", "code"}
    assert sum(row["chunks"] for row in summary["after"]["by_category"].values()) == summary["after"]["chunks"]
    rows = lines_of(root / "held-out.jsonl")
    assert [(row["when"], row["id"]) for row in rows] == [
        (when, sample.id) for when in ("before", "after") for sample in HELD_OUT
    ]
    bits = sum(row["bits"] for row in rows if row["when"] == "after")
    assert bits / summary["after"]["bytes"] == pytest.approx(summary["after"]["bits_per_byte"])
    written = lines_of(root / "completions.jsonl")
    assert [row["when"] for row in written] == ["before"] * 2 + ["after"] * 2


def test_an_evaluation_that_a_kill_cost_is_made_on_resume(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of a step is there before the step is evaluated."""
    config, real = configure(eval_every=2, save_every=2, completions=0), loop.evaluate_run

    def killed(training: Any, held_out: Any, when: str, progress: Any) -> Any:
        if when == "step":
            raise KeyboardInterrupt
        return real(training, held_out, when, progress)

    monkeypatch.setattr(loop, "evaluate_run", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, student_info, HELD_OUT, Silent())
    assert [path.name for path in Path(config.out, "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.setattr(loop, "evaluate_run", real)
    train(config, student_info, HELD_OUT, Silent())
    found = [(line["step"], line["eval"]) for line in lines_of(Path(config.out, "metrics.jsonl")) if "eval" in line]
    assert found == [(0, "before"), (2, "step"), (4, "step"), (6, "after")]


def test_agreement_is_looked_at_every_tenth_step(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    config = configure(steps=21)
    train(config, student_info, [], Silent())
    found = {line["step"]: line.get("top1_agreement") for line in lines_of(Path(config.out, "metrics.jsonl"))}
    assert [step for step, share in found.items() if share is not None] == [10, 20]
    assert all(0 <= found[step] <= 1 for step in (10, 20))


def test_tensorboard_gets_the_figures(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = configure(tensorboard=True)
    train(config, student_info, HELD_OUT, Silent())
    events = accumulator.EventAccumulator(str(Path(config.out, "tensorboard")))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [line for line in lines_of(Path(config.out, "metrics.jsonl")) if "loss" in line]
    assert [step for step, _ in losses] == [line["step"] for line in expected]
    np.testing.assert_allclose([value for _, value in losses], [line["loss"] for line in expected], rtol=1e-6)
    assert "held_out/by_source/book/bits_per_byte" in events.Tags()["scalars"]


def test_adapters_train_and_resume(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, tmp_path: Path
) -> None:
    """Only adapters change and are saved; the merged model is the one that was measured; a restart changes nothing."""
    pytest.importorskip("peft")
    config = configure(lora=2, eval_targets=configure().data.targets[0])
    summary = train(config, student_info, [], Silent())
    kept = load_file(Path(config.out) / "checkpoints" / "step-000006" / "model.safetensors")
    assert kept
    assert all(".lora_" in name for name in kept)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (student_dir, summary["model"]))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("proj" in name for name in changed)
    assert (Path(summary["adapter"]) / "adapter_model.safetensors").exists()
    again = configure(lora=2, eval_targets=configure().data.targets[0], out=str(tmp_path / "again"), save_every=3)
    Path(config.out, "summary.json").unlink()
    assert train(config, student_info, [], Silent())["after"] == summary["after"], "from the last checkpoint"
    assert train(again, student_info, [], Silent())["after"] == summary["after"]


def test_adapters_and_a_whole_embedding_train_and_resume(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, tmp_path: Path
) -> None:
    """The embedding is the head before and after: one matrix in the checkpoint, in the model and in the adapter."""
    pytest.importorskip("peft")
    options: dict[str, Any] = {"lora": 2, "lora_embeddings": True, "freeze_steps": 2}
    config = configure(**options)
    summary = train(config, student_info, [], Silent())
    kept = load_file(Path(config.out) / "checkpoints" / "step-000006" / "model.safetensors")
    assert {name for name in kept if ".lora_" not in name} == {"model.embed_tokens.weight"}
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (student_dir, summary["model"]))
    assert before.keys() == after.keys()
    assert "lm_head.weight" not in after
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.embed_tokens.weight" in changed
    assert torch.equal(kept["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    adapter = load_file(Path(summary["adapter"]) / "adapter_model.safetensors")
    assert {name for name in adapter if ".lora_" not in name} == {"base_model.model.model.embed_tokens.weight"}
    again = configure(**options, out=str(tmp_path / "again"), save_every=3)
    assert train(again, student_info, [], Silent())["model"]
    theirs = load_file(tmp_path / "again" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], theirs[name]) for name in after)


def test_streams_belong_to_the_run(configure: Callable[..., TrainConfig], student_info: Any) -> None:
    config = configure(streams=2, steps=3)
    assert train(config, student_info, [], Silent())["steps"] == 3
    assert json.loads(Path(config.out, "run.json").read_text())["identity"]["streams"] == 2
    with pytest.raises(XtokenError, match="streams=2 there, 3 now"):
        train(configure(streams=3, steps=3), student_info, [], Silent())
    assert train(configure(steps=3), student_info, [], Silent())["steps"] == 3, "it goes on as it began"


@pytest.mark.parametrize(("loss", "said"), [("p-kl", "this is p-kl on cpu"), ("ce", "this is ce on cpu")])
def test_a_kernel_that_does_not_fit_is_refused(
    configure: Callable[..., TrainConfig], student_info: Any, loss: str, said: str
) -> None:
    with pytest.raises(XtokenError, match=f"--kernel liger computes --loss ce on CUDA, and {said}; use --kernel auto"):
        train(configure(kernel="liger", loss=[loss]), student_info, [], Silent())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": None}, "give --student ID or FOLDER, or --from-scratch config.json"),
        ({"from_scratch": "c.json"}, "not both"),
        ({"student": None, "from_scratch": "c.json"}, "has no tokenizer of its own"),
        ({"student": None, "from_scratch": "c.json", "tokenizer": "bytes", "lora": 4}, "--lora adapts trained weights"),
        ({"lora_alpha": 2.0}, "--lora-alpha goes with --lora"),
        ({"lora_embeddings": True}, "--lora-embeddings goes with --lora"),
        ({"lora": 2, "freeze_steps": 3}, "which --lora leaves as they are"),
        ({"learn_w": True, "parallel": "fsdp"}, "--learn-w goes with --parallel ddp"),
    ],
)
def test_options_that_contradict_each_other(
    configure: Callable[..., TrainConfig], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        configure(**options)


def test_only_the_first_rank_writes_metrics(tmp_path: Path) -> None:
    other = Metrics(tmp_path / "metrics.jsonl", writes=False)
    other.back_to(0, [])
    other.write({"step": 1})
    assert other.lines == [{"step": 1}]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_student_that_transformers_does_not_write_is_trained_and_written(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose config.json says that padding is -1: the run ends with a model, and says what it wrote instead."""
    path = Path(student_dir, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1}))
    Path(student_dir, "generation_config.json").unlink()
    summary = train(configure(), student_info, [], Silent())
    assert summary["notes"] == [
        f"the trained model will not have all settings of {student_dir}: config.json: pad_token_id -1 is written as "
        "none; generation_config.json: pad_token_id -1 is written as none"
    ]
    assert [record.message for record in caplog.records if record.name == "xtoken"] == summary["notes"]
    assert json.loads(Path(summary["model"], "config.json").read_text())["pad_token_id"] is None
    hidden = [path.name for path in Path(configure().out).iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]


def test_a_model_that_could_not_be_written_is_written_by_the_same_command(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is trained again, and of half a model nothing stays; nor where a finished run's model was deleted."""
    config = configure()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("xtoken.trainer.student.model.readable_like", full)
        with pytest.raises(XtokenError, match=r"model could not be written \(No space.*checkpoints; .*same command"):
            train(config, student_info, [], Silent())
    names = {path.name for path in Path(config.out).iterdir()}
    assert names == {".lock", "checkpoints", "metrics.jsonl", "run.json"}
    before = Path(config.out, "metrics.jsonl").read_bytes()
    summary = train(config, student_info, [], Silent())
    quiet = train(configure(out=str(tmp_path / "quiet")), student_info, [], Silent())
    wanted = load_file(Path(quiet["model"]) / "model.safetensors")
    for _ in range(2):
        found = load_file(Path(summary["model"]) / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert Path(config.out, "metrics.jsonl").read_bytes() == before
        shutil.rmtree(summary["model"])
        assert train(config, student_info, [], Silent())["model"] == summary["model"]


@pytest.mark.parametrize(("loss", "tau", "said"), [("uld", 2.0, True), ("p-kl", 2.0, False), ("uld", 1.0, False)])
def test_what_sorted_lists_lose_at_another_temperature_is_said(
    configure: Callable[..., TrainConfig],
    make_targets: Callable[..., str],
    student_info: Any,
    loss: str,
    tau: float,
    said: bool,
) -> None:
    root = make_targets(LENGTHS, name="hot", losses=(loss,), tau=tau)
    notes = train(configure(targets=[root], loss=[loss], steps=1), student_info, [], Silent()).get("notes", [])
    assert len(notes) == said
    assert all(f"of the teacher's probability, which {loss} takes for 0" in note for note in notes)


@pytest.mark.parametrize(
    ("loss", "lengths", "options", "said"),
    [
        ("p-kl", [[6, 5, 7]], {"ce_weight": 0}, True),
        ("strict", [[6, 5, 7]], {"ce_weight": 0}, True),
        ("p-kl", [[6, 5, 7]], {}, False),  # CE teaches them
        ("p-kl", [[1, 1, 1]], {"ce_weight": 0}, False),  # each token is the first of its chunk
        ("alm", [[6, 5, 7]], {"ce_weight": 0}, False),  # learns from all of a chunk
    ],
)
def test_tokens_that_nothing_teaches_are_named(
    configure: Callable[..., TrainConfig],
    make_targets: Callable[..., str],
    student_info: Any,
    loss: str,
    lengths: list[list[int]],
    options: dict[str, Any],
    said: bool,
) -> None:
    root = make_targets(lengths * 4, name="some", losses=(loss,))
    table = pq.read_table(Path(root, "data"))
    chunks, tokens = (sum(map(len, table[name].to_pylist())) for name in ("chunk_student_end", "student_ids"))
    config = configure(targets=[root], loss=[loss], steps=1, **options)
    notes = train(config, student_info, [], Silent()).get("notes", [])
    assert (
        notes
        == [
            f"{root}: {loss} teaches the first token of each chunk, {chunks / tokens:.0%} of the student's tokens, and "
            "with --ce-weight 0 nothing teaches the others; leave --ce-weight out, or take alm or byte-prefix"
        ]
        * said
    )


def test_a_run_out_of_memory_goes_on_in_smaller_passes(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change no loss, so the run is the same one."""
    quiet = configure(out=str(tmp_path / "quiet"))
    train(quiet, student_info, [], Silent())
    config, real, calls = configure(save_every=2), loop.run_step, []

    def full(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return real(*args, **options)

    monkeypatch.setattr(loop, "run_step", full)
    with pytest.raises(
        XtokenError, match=r"memory of cpu .* --micro-tokens 14 \(CUDA out of memory.*GiB\.\); .*same command"
    ):
        train(config, student_info, [], Silent())
    train(configure(micro_tokens=7, activation_checkpointing=True), student_info, [], Silent())
    losses = [[line["loss"] for line in lines_of(Path(one.out, "metrics.jsonl"))] for one in (quiet, config)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "device", "begun", "sizes"),
    [
        ({}, "cpu", None, (4096, 1024)),
        ({}, "cuda", None, (262_144, 16_384)),
        ({}, "mps", None, (4096, 1024)),
        ({"micro_tokens": 8192}, "cuda", None, (262_144, 8192)),
        ({"step_tokens": 512}, "cuda", None, (512, 16_384)),
        ({}, "cuda", {"step_tokens": 4096, "micro_tokens": 1024}, (4096, 1024)),
        ({}, "cpu", {"step_tokens": 262_144, "micro_tokens": 16_384}, (262_144, 16_384)),
        ({"micro_tokens": 64}, "cuda", {"step_tokens": 4096, "micro_tokens": 1024}, (4096, 64)),
        ({}, "cuda", {"step_tokens": 64}, (64, 16_384)),
    ],
)
def test_sizes_are_those_of_the_device_or_of_the_run(
    configure: Callable[..., TrainConfig], given: Any, device: str, begun: Any, sizes: tuple[int, int]
) -> None:
    config = configure(**{"step_tokens": None, "micro_tokens": None} | given)
    assert config.sized(device, begun).sizes == sizes
    assert config.sized(device, begun).sized("cpu") == config.sized(device, begun)


class Said(Silent):
    """A ``Progress`` that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_says_and_keeps_the_sizes_that_it_began_with(
    configure: Callable[..., TrainConfig], student_info: Any
) -> None:
    said = Said()
    left_out = configure(step_tokens=None, micro_tokens=None)
    root = Path(left_out.out)
    train(left_out, student_info, [], said)
    record = json.loads((root / "run.json").read_text())
    assert record["identity"]["step_tokens"] == record["config"]["step_tokens"] == 4096
    assert record["config"]["micro_tokens"] == 1024
    assert said.notes == ["--step-tokens 4096 --micro-tokens 1024"]
    # as if a GPU had begun it: the same command on a CPU goes on with the GPU's
    for part in ("identity", "config"):
        record[part] |= {
            name: size for name, size in (("step_tokens", 512), ("micro_tokens", 96)) if name in record[part]
        }
    (root / "run.json").write_text(json.dumps(record))
    train(left_out, student_info, [], said)
    assert said.notes[1:] == ["--step-tokens 512 --micro-tokens 96"]
    with pytest.raises(XtokenError, match="step_tokens=512 there, 4096 now"):
        train(configure(step_tokens=4096), student_info, [], said)


def test_a_start_that_failed_binds_no_sizes(configure: Callable[..., TrainConfig]) -> None:
    root = Path(configure().out)
    root.mkdir()
    (root / "run.json").write_text(json.dumps({"identity": {"loss": ["p-kl"]}, "config": {"step_tokens": 512}}))
    assert begun_with(str(root)) is None
    (root / "metrics.jsonl").write_text("{}\n")
    assert begun_with(str(root)) == {"step_tokens": 512}
    assert begun_with(str(root / "none")) is begun_with("s3://bucket/run") is None


def saved_as(config: TrainConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The trained weights, all of one dtype, which config.json names, and transformers loads them in."""
    from transformers import AutoModelForCausalLM

    folder = Path(config.out, "model")
    found = load_file(folder / "model.safetensors")
    assert {one.dtype for one in found.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype
    assert all(torch.equal(value, found[name]) for name, value in loaded.state_dict().items() if name in found)
    return found


@pytest.mark.parametrize("lora", [None, 2])
def test_a_model_is_saved_in_the_dtype_of_its_student(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str, tmp_path: Path, lora: int | None
) -> None:
    """Rounded once, from weights that trained in float32; another dtype has to be asked for."""
    if lora:
        pytest.importorskip("peft")
    settings = Path(student_dir, "config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "bfloat16"}))
    found = {}
    for name, dtype in (("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        config = configure(out=str(tmp_path / name), save_dtype=name, lora=lora)
        train(config, student_info, [], Silent())
        found[name] = saved_as(config, dtype)
    for name, exact in found["float32"].items():
        assert torch.equal(found["auto"][name], exact.bfloat16()), name
        assert torch.equal(found["float16"][name], exact.half()), name
    assert any(not torch.equal(found["auto"][name].float(), exact) for name, exact in found["float32"].items())
    kept = load_file(tmp_path / "auto" / "checkpoints" / "step-000006" / "model.safetensors")
    assert {one.dtype for one in kept.values()} == {torch.float32}, "a run goes on from all bits"
    with pytest.raises(XtokenError, match=r"save_dtype='auto' there, 'float32' now"):
        train(configure(out=str(tmp_path / "auto"), save_dtype="float32", lora=lora), student_info, [], Silent())


def test_a_student_that_names_no_dtype_is_saved_in_float32(
    configure: Callable[..., TrainConfig], student_info: Any, student_dir: str
) -> None:
    settings = Path(student_dir, "config.json")
    fields = json.loads(settings.read_text())
    del fields["dtype"]
    settings.write_text(json.dumps(fields))
    config = configure(steps=1)
    train(config, student_info, [], Silent())
    saved_as(config, torch.float32)
