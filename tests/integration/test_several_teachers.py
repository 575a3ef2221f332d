"""Several real teachers in one run, a learned W, and a student that reads bytes: through the command line."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from xtoken import cli

TEXT = Path(cli.__file__).resolve().parent / "examples" / "data" / "moby-dick-held-out.jsonl"


def xtoken(*words: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output + repr(result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def folder(gemma3_dir: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures of Gemma (four documents) and of SmolLM2 itself (three of them)."""
    out = tmp_path_factory.mktemp("teachers")
    text = json.loads(TEXT.read_text(encoding="utf-8"))["text"]
    lines = [json.dumps({"id": f"p{n}", "text": text[300 * n : 300 * (n + 1)].strip()}) for n in range(4)]
    (out / "prose.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = [out / "prose.jsonl", "--id-field", "id"]
    xtoken("precompute", *corpus, "--teacher", gemma3_dir, "--out", out / "gemma")
    xtoken("precompute", *corpus, "--teacher", smollm2_dir, "--out", out / "smol", "--limit", 3, "--temperatures", 2)
    return out


@pytest.mark.engine
def test_a_same_tokenizer_teacher_beside_another(folder: Path, smollm2_dir: Path) -> None:
    """SmolLM2 teaches itself: its term is nearly 0 before the first step, Gemma's is not; W is learned beside."""
    xtoken("align", folder / "gemma", "--student", smollm2_dir, "--out", folder / "gemma.t", "--for", "p-kl")
    words = ["--student", smollm2_dir, "--out", folder / "smol.t", "--for", "sparse-kl", "--tau", 2]
    xtoken("align", folder / "smol", *words)
    targets = f"{folder / 'gemma.t'},{folder / 'smol.t'}"
    words = ["--student", smollm2_dir, "--loss", "p-kl,sparse-kl", "--weights", "3,1", "--weighting", "entropy"]
    words += ["--learn-w", "--steps", 1, "--step-tokens", 4000, "--micro-tokens", 1024, "--out", folder / "run"]
    figures = xtoken("train", targets, *words)
    assert [(row["loss"], row["samples"]) for row in figures["teachers"]] == [("p-kl", 4), ("sparse-kl", 3)]
    assert (figures["samples"], figures["samples_of_all_teachers"]) == (4, 3)
    first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["teacher_samples"] == [4, 3]
    gemma, smol = first["teacher_kd"]
    # As a teacher SmolLM2 sees nothing before a sample, as a student eos: near 0, times tau squared, not 0.
    assert 0 <= smol < 0.05
    assert gemma > 0.2
    (learned,) = figures["learned_w"]
    assert xtoken("inspect", learned)["kind"] == "projection"
    before, after = (pq.read_table(Path(root) / "w.parquet") for root in (folder / "gemma.t", learned))
    assert before["teacher_id"].equals(after["teacher_id"])
    assert not before["weight"].equals(after["weight"])
    words = ["--student", smollm2_dir, "--w", learned, "--out", folder / "again.t", "--for", "p-kl"]
    xtoken("align", folder / "gemma", *words)


@pytest.mark.engine
def test_a_student_of_bytes_learns_by_alm_and_byte_prefix(folder: Path, tmp_path: Path) -> None:
    """A tiny random model over 256 bytes: any pair has chunk likelihoods, and every token has a first byte."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from xtoken.pipeline.tokens import load_tokenizer

    torch.manual_seed(1)
    size = load_tokenizer("bytes").table.size
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=512, **shape)).save_pretrained(tmp_path / "m")
    xtoken("align", folder / "gemma", "--student", "bytes", "--out", tmp_path / "t", "--for", "alm,byte-prefix")
    for loss, options in (("alm", ["--debias", "outcome,merge"]), ("byte-prefix", [])):
        words = [
            "--student",
            tmp_path / "m",
            "--tokenizer",
            "bytes",
            "--out",
            tmp_path / loss,
            "--loss",
            loss,
            *options,
        ]
        words += ["--steps", 30, "--step-tokens", 600, "--max-tokens", 512, "--lr", 1e-2, "--ce-weight", 0]
        xtoken("train", tmp_path / "t", *words)
        kd = [json.loads(line)["kd"] for line in (tmp_path / loss / "metrics.jsonl").read_text().splitlines()]
        assert sum(kd[-3:]) < 0.8 * sum(kd[:3]), loss


@pytest.mark.engine
def test_what_cannot_be_served_is_refused(folder: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    words = ["--student", smollm2_dir, "--out", tmp_path / "t"]
    other = xtoken("align", folder / "gemma", *words, "--for", "sparse-kl", code=2)
    assert "p-kl" in other["error"]
    hot = xtoken("align", folder / "gemma", *words, "--for", "h-kl", "--tau", 2, code=2)
    assert "--temperatures 2" in hot["error"]
    xtoken("align", folder / "gemma", *words, "--for", "p-kl", "--tau", 2)
    words = ["--student", smollm2_dir, "--out", tmp_path / "run"]
    unknown = xtoken("train", tmp_path / "t", *words, code=2)
    assert "--rest drop" in unknown["error"]
    missing = xtoken("train", tmp_path / "t", *words, "--loss", "alm", code=2)
    assert "--for p-kl,alm" in missing["error"]
    cold = xtoken("align", folder / "gemma", "--student", smollm2_dir, "--out", tmp_path / "x", "--tau", 0, code=2)
    assert "tau" in cold["error"]
