"""Rounds: the student writes, another model scores, the student learns, twice.

The teacher is a real model; the student is a random one, which writes as fast as a test has time for.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from xtoken import cli, open_capture

pytestmark = pytest.mark.engine
ROOT = Path(cli.__file__).resolve().parent
TEMPLATE = ROOT / "tests" / "golden" / "captures" / "zephyr.jinja"
PROMPTS = ["Name three colours.", "How many legs has a spider?"]


@pytest.fixture
def student(smollm2_dir: Path, tmp_path: Path) -> Path:
    """Has SmolLM2's tokenizer, and its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_two_rounds(student: Path, smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = importlib.import_module("xtoken.examples.rounds")
    verbs: list[str] = []

    def run(*words: Any) -> None:  # in this process, which has all libraries in memory
        verbs.append(str(words[0]))
        result = CliRunner().invoke(cli.app, [*map(str, words), "--quiet"])
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(rounds, "run", run)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": one}]}) for one in PROMPTS))
    words = [str(prompts), "--student", str(student), "--teacher", str(smollm2_dir), "--out", str(tmp_path / "rounds")]
    words += ["--teacher-template", str(TEMPLATE), "--tokens", "8", "--samples", "2", "--max-tokens", "96"]
    words += ["--steps", "2", "--step-tokens", "64"]
    first, second = rounds.main(words)
    assert verbs == ["precompute", "precompute", "align", "train"] * 2
    for number, writer in ((1, str(student)), (2, str(first))):
        folder = tmp_path / "rounds" / f"round-{number}"
        written, scored = (open_capture(str(folder / name)) for name in ("written", "scored"))
        assert written.manifest["teacher"]["model"] == writer
        assert scored.manifest["teacher"]["model"] == str(smollm2_dir)
        answers = [sample.conversation["messages"][-1]["content"] for sample in written if sample.conversation]
        assert 2 <= len(answers) <= 4, "a random model also writes what is no text"
        # the teacher scores what the student wrote, and nothing else
        for sample, answer in zip(scored, answers, strict=True):
            taught = [span for span in sample.spans if span.learn and span.kind == "assistant"]
            text = (sample.text or "").encode()
            assert b"".join(text[span.byte_start : span.byte_end] for span in taught).decode().strip() == answer.strip()
    weights = [path / "model.safetensors" for path in (student, first, second)]
    assert len({path.read_bytes() for path in weights}) == 3
    assert rounds.main(words) == [first, second]  # nothing is done again
