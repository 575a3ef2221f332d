"""A DistillKit set with rows of a real teacher, imported, aligned to another tokenizer and trained from."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.distillkit_sets import QWEN3, Document, packed, sampled, write
from xtoken import cli, open_capture

pytestmark = pytest.mark.engine
ROOT = Path(cli.__file__).resolve().parent
TOKENS = 160
FIRST, SECOND = 5.0, 1.3  # the shift wins by ten times; ranks agree within 1.3 (a small teacher, hard text)


@pytest.fixture(scope="module")
def documents(smollm2_dir: Path) -> list[Document]:
    """Pages of this repository, scored by SmolLM2 alone: every other one ends."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    made = []
    for number, path in enumerate(sorted((ROOT / "docs").glob("*.md"))[:8]):
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"][:TOKENS]
        ids += [tokenizer.eos_token_id] if number % 2 else []
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        made.append(Document(np.array(ids), rows.numpy()))
    return made


def run(*words: Any, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*map(str, words), "--quiet", "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def llama_student(tokenizer: Path, folder: Path) -> Path:
    """A random student with Llama 2's tokenizer."""
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), max_position_embeddings=256, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer.parent / name).read_bytes())
    return folder


def packed_set(documents: Sequence[Document], size: int) -> list[dict[str, Any]]:
    return [packed(documents[start : start + 3], QWEN3, size) for start in range(0, len(documents), 3)]


def test_import_align_train(
    documents: list[Document], smollm2_dir: Path, tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    size = documents[0].logprob.shape[1]
    write(tmp_path / "set" / "rows.parquet", [sampled(one, QWEN3, size) for one in documents], QWEN3, size)
    capture, targets = tmp_path / "capture", tmp_path / "targets"
    words = ["import", "distillkit", tmp_path / "set", "--tokenizer", smollm2_dir]
    found = run(*words, "--license", "corpus=mit,outputs=apache-2.0", "--out", capture)
    shifts = found["stored_probability_by_shift"]
    assert shifts.pop("+0") > FIRST * max(shifts.values())
    for one in found["calibration"]:
        assert max(one["share"], one["mass"]) < SECOND * min(one["share"], one["mass"])
    assert found["texts_with_the_same_ids"] == 1.0
    assert (found["tail_mass"], found["samples"]) == ("exact", len(documents))
    for sample, document in zip(open_capture(str(capture)), documents, strict=True):
        ids, logprob, rest = sample.row(20)
        np.testing.assert_allclose(logprob, document.logprob[20][ids], atol=1 / 64 + 1e-4)
        assert np.exp(logprob).sum() + np.exp(rest) == pytest.approx(1, abs=1 / 32)
    student = llama_student(tokenizer_file("llama2"), tmp_path / "student")
    run("align", capture, "--student", student, "--for", "p-kl", "--out", targets)
    run("verify", capture)
    run("verify", targets)
    steps = ["--steps", "3", "--step-tokens", "256", "--max-tokens", "256", "--device", "cpu"]
    run("train", targets, "--student", student, "--loss", "p-kl", "--out", tmp_path / "run", *steps)
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(one["loss"]) for one in losses if "loss" in one)
    measured = run("eval", tmp_path / "run" / "model", "--targets", targets, "--max-tokens", "256", "--device", "cpu")
    assert np.isfinite(measured["agreement"]["kl"] if "agreement" in measured else measured["kl"])
    assert "teacher_bits_per_byte" not in json.dumps(measured), "only the likely labels are known"
    refused = run("align", capture, "--student", student, "--for", "alm", "--out", tmp_path / "other", code=2)
    assert "of the labels do not have a log-probability" in refused["error"]


def test_packed_rows_are_the_same_documents_without_what_packing_lost(
    documents: list[Document], smollm2_dir: Path, tmp_path: Path
) -> None:
    size = documents[0].logprob.shape[1]
    write(tmp_path / "set" / "rows.parquet", packed_set(documents, size), QWEN3, size, group=1)
    run("import", "distillkit", tmp_path / "set", "--tokenizer", smollm2_dir, "--out", tmp_path / "capture")
    found = list(open_capture(str(tmp_path / "capture")))
    assert [one.token_ids.tolist() for one in found] == [one.ids[:-1].tolist() for one in documents]
    assert {one.sample_id.split(":")[0] for one in found} == {"rows.parquet"}
