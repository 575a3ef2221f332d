"""Training loops of others on stored targets: the steps of xtoken's own objective."""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from xtoken import cli, open_capture, open_targets, targets_dataset
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import score
from xtoken.trainer.student.head import find_head

pytestmark = pytest.mark.engine
ROOT = Path(cli.__file__).resolve().parent
STEPS, SAMPLES = 4, 8


@pytest.fixture(scope="module")
def made(
    smollm2_dir: Path, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Rows of a real teacher, targets for another real tokenizer, and a small random student that has it."""
    folder = tmp_path_factory.mktemp("loops")
    made = {name: folder / name for name in ("capture", "targets", "student")}
    tokenizer = tokenizer_file("llama2").parent
    text = json.loads((ROOT / "examples" / "data" / "moby-dick-held-out.jsonl").read_text("utf-8").split("\n")[0])[
        "text"
    ]
    documents = [json.dumps({"text": text[at : at + 400]}) for at in range(0, 6000, 400)]
    (folder / "corpus.jsonl").write_text("\n".join(documents), encoding="utf-8")
    for words in (
        ["precompute", folder / "corpus.jsonl", "--teacher", smollm2_dir, "--max-tokens", 64, "--out", made["capture"]],
        ["align", made["capture"], "--student", tokenizer, "--for", "p-kl", "--out", made["targets"]],
    ):
        result = CliRunner().invoke(cli.app, [*map(str, words), "--quiet"])
        assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((made["targets"] / "manifest.json").read_text())["student"]["size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(made["student"])
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(made["student"])
    return made


@pytest.fixture(scope="module")
def wanted(made: dict[str, Path]) -> list[float]:
    """Losses of steps of eight samples: AdamW on the trainer's own objective, at the weights of ``--mix fixed``."""
    model = AutoModelForCausalLM.from_pretrained(made["student"], dtype=torch.float32).train()
    dataset = targets_dataset(str(made["targets"]), pack=True)
    found = Targets(str(made["targets"]))
    vocabulary, device = found.manifest.student.size, torch.device("cpu")
    setup = LossSetup(
        found.w.within(vocabulary), found.vocab, vocabulary, found.manifest.teacher_tokenizer.size, device
    )
    student = Student(model, device, None, vocabulary, find_head(model))
    objective = Objective(student, [open_loss("p-kl", setup)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), []
    for samples in islice(eights(dataset), STEPS):
        micro = dataset.collate(samples)["targets"].micro
        value, _ = score(objective, micro, [0.1 / len(micro.label_P), 1 / micro.targets[0].total])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def eights(dataset: Any) -> Iterator[list[Any]]:
    """Samples as a DataLoader gathers them, epoch after epoch."""
    while True:
        samples = list(dataset)
        yield from (samples[at : at + SAMPLES] for at in range(0, len(samples), SAMPLES))


@pytest.mark.parametrize("name", ["accelerate_loop", "transformers_trainer", "trl_sft"])
def test_a_loop_takes_the_steps_of_the_trainer(
    name: str, made: dict[str, Path], wanted: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "loops"))
    losses = import_module(name).train(str(made["targets"]), str(made["student"]), str(tmp_path / "out"), STEPS)
    # the loops take logits where the trainer takes states; Trainer's logs have four places
    assert losses == pytest.approx(wanted, rel=2e-4)
    assert len(set(losses)) == STEPS
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(made["student"])
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)


def test_what_is_stored_can_be_read_as_arrays(made: dict[str, Path]) -> None:
    capture, targets = open_capture(str(made["capture"])), open_targets(str(made["targets"]))
    assert len(capture) == len(targets) > 6
    for sample, target in zip(capture, targets, strict=True):
        assert sample.sample_id == target.sample_id
        assert sample.token_end[-1] == target.student_end[-1] == len((sample.text or "").encode())
        assert target.chunk_teacher_end[-1] == len(sample.token_ids)
        ids, logprob, tail = sample.row(0)
        assert len(ids) == len(logprob) <= 64
        assert abs(sum(2.718281828459045**logprob) + 2.718281828459045**tail - 1) < 0.05
        label = sample.token_ids[sample.row_of_token == 0][0]
        if label in ids:  # both are stored, rounded in two ways
            assert logprob[ids.tolist().index(label)] == pytest.approx(sample.label_logprob[0], abs=0.04)
