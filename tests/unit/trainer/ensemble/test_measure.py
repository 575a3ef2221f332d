"""xtoken eval --combine bytes: two small models of different tokenizers, against sums made by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_bpe import write_bpe
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.pipeline.tokens.canonical import Canonical
from xtoken.trainer.ensemble.covers import END, Covers, SortedTokens
from xtoken.trainer.ensemble.next_token import NextToken
from xtoken.trainer.student.model import load_student

TEXTS = ["the hat", "that hé"]
MERGES = {"one": ["t h", "h e", "th e", "a t", "Ġ h"], "two": ["a t", "h at", "Ġ hat", "Ã ©", "t hat"]}


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Tiny Llamas with heads that are padded, each with a BPE of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"bos_token_id": None, "eos_token_id": 0}
    for seed, (name, merges) in enumerate(MERGES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=300, max_position_embeddings=1024, initializer_range=0.3, **sizes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        write_bpe(tmp_path / name, merges)
    return [str(tmp_path / name) for name in MERGES]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["eval", "--combine", "bytes", "--device", "cpu", "--json", *words])


def test_bits_of_the_mean_and_of_each(models: list[str], text: str) -> None:
    figures = json.loads(run(",".join(models), "--text", text).stdout)
    size = sum(len(one.encode()) for one in TEXTS)
    bits, alone, tokens = 0.0, [0.0, 0.0], [0.0, 0.0]
    for one in TEXTS:
        rows = []
        for at, folder in enumerate(models):
            tokenizer = load_tokenizer(folder)
            size_V = tokenizer.table.size
            score = NextToken(load_student(folder, torch.device("cpu"), False).eval(), 0, size_V)
            spelling = Canonical(tokenizer)
            tokens_M = SortedTokens(spelling.token_bytes, size_V)
            covers, p = Covers(spelling, tokens_M, score, (0, 1), floor=0), []
            for symbol in [*one.encode(), END]:
                p.append(covers.next().p[symbol])
                if symbol != END:
                    covers.take(symbol)
            rows.append(p)
            alone[at] -= float(np.log2(p).sum())
            tokens[at] += score.nats(tokenizer.token_ids([one])[0], (0, 1)) / math.log(2)
        bits -= float(np.log2(np.mean(rows, axis=0)).sum())
    assert figures["bytes"] == size
    assert figures["bits_per_byte"] == pytest.approx(bits / size, rel=1e-3)
    assert figures["bits_per_byte"] < sum(alone) / 2 / size
    for at, row in enumerate(figures["models"]):
        assert row["model"] == models[at]
        assert row["bits_per_byte"] == pytest.approx(alone[at] / size, rel=1e-3)
        assert row["token_bits_per_byte"] == pytest.approx(tokens[at] / size, rel=1e-5)
        assert row["bits_per_byte"] < row["token_bits_per_byte"]
        assert 0 < row["lost"] < 0.5
        assert row["undecided"] <= 1e-3
        assert row["passes_per_byte"] > 0
        assert row["seconds_per_byte"] > 0


def test_equal_models_are_one_and_the_bytes_are_bounded(models: list[str], text: str) -> None:
    figures = json.loads(run(f"{models[0]},{models[0]}", "--text", text, "--max-bytes", "5").stdout)
    assert figures["bytes"] == 5
    assert [row["bits_per_byte"] for row in figures["models"]] == pytest.approx([figures["bits_per_byte"]] * 2)


def test_a_model_of_bytes_without_a_first_token(models: list[str], text: str) -> None:
    result = run(",".join(models), "--tokenizer", "bytes", "--text", text)
    assert result.exit_code == 2
    assert "has neither BOS nor EOS to put in front of a text" in json.loads(result.stdout)["error"]


def test_a_model_too_short_for_a_window(models: list[str], text: str) -> None:
    config = Path(models[1]) / "config.json"
    config.write_text(config.read_text().replace("1024", "100"))
    result = run(",".join(models), "--text", text)
    assert result.exit_code == 2
    assert "is longer than the context of" in json.loads(result.stdout)["error"]


def test_an_empty_text(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    assert run(",".join(models), "--text", str(tmp_path / "none.jsonl")).exit_code == 2


def test_the_cache_is_left_as_it_was(models: list[str]) -> None:
    """Two tokens tried behind the same ones get what they get alone."""
    score = NextToken(load_student(models[0], torch.device("cpu"), False).eval(), 0, 260)
    _, cache = score((), None)
    _, after = score((70,), cache)
    for ids in ((70, 71), (70, 72)):
        cached, _ = score(ids, after)
        whole, _ = score(ids, None)
        np.testing.assert_allclose(cached, whole, atol=1e-5)
    assert -score.nats((70, 71)) == pytest.approx(score((), None)[0][70] + score((70,), None)[0][71], abs=1e-5)


def test_a_class_of_another_kind_reads_everything_again(models: list[str]) -> None:
    """What it keeps beside its cache would be lost with a copy."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.read = inner, []

        def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
            assert past_key_values is None
            self.read.append(input_ids.shape[1])
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    model = load_student(models[0], torch.device("cpu"), False).eval()
    wrapped, plain = NextToken(Wrapper(model), 0, 260), NextToken(model, 0, 260)
    (_, cache), (_, none) = plain((70,), None), wrapped((70,), None)
    assert none is None
    np.testing.assert_allclose(wrapped((70, 71), none)[0], plain((70, 71), cache)[0], atol=1e-5)
    assert wrapped.model.read == [2, 3]


def test_by_tokens_on_the_command_line(models: list[str], text: str) -> None:
    """Two equal models are one; other tokenizers are refused before a model is loaded."""
    words = ["eval", "--device", "cpu", "--json", "--text", text]
    alone = json.loads(CliRunner().invoke(cli.app, [*words, models[0]]).stdout)
    twice = CliRunner().invoke(cli.app, [*words, f"{models[0]},{models[0]}", "--combine", "prob"])
    assert json.loads(twice.stdout)["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    Path(models[1], "model.safetensors").unlink()
    mixed = CliRunner().invoke(cli.app, [*words, ",".join(models), "--combine", "logit"])
    assert mixed.exit_code == 2
    assert "have different tokenizers" in json.loads(mixed.stdout)["error"]
    unsaid = CliRunner().invoke(cli.app, [*words, ",".join(models)])
    assert unsaid.exit_code == 2
    assert "2 models are named; join them by --combine" in unsaid.output
