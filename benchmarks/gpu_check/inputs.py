"""What the checks work on: random models of real sizes, a tokenizer of their vocabulary, a capture and targets."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sizes import MODELS, Shape
from xtoken import cli

Figures = dict[str, Any]
ROOT = Path(cli.__file__).resolve().parent
TEXT = ROOT / "examples" / "data" / "moby-dick.jsonl"
SIZES = {
    True: {"student": MODELS["Llama-3.2-1B"], "teacher": MODELS["Qwen3-0.6B"]},
    False: {"student": Shape(2, 128, 256, 2, 1, 64, 1_024), "teacher": Shape(2, 128, 256, 2, 1, 64, 1_280)},
}
PEAKED = 6.0  # random logits as far apart as a real model's, so that a row keeps some twenty entries
TRAINED = 900  # tokens that are learned from the text, of any vocabulary
TOKENS = {True: 60_000, False: 3_000}  # of the capture


def on_gpu() -> bool:
    """Whether there is a GPU that torch can use."""
    return torch.cuda.is_available()


def model(work: Path, role: str) -> Path:
    """A folder with a random model of a role, made once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / role
    if not (folder / "config.json").exists():
        shape = SIZES[on_gpu()][role]
        torch.manual_seed(len(role))
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            head_dim=shape.head,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        with torch.device("cuda" if on_gpu() else "cpu"):
            made: Any = LlamaForCausalLM(config)
        with torch.no_grad():
            made.get_input_embeddings().weight.mul_(PEAKED)
        made.to(torch.bfloat16 if on_gpu() else torch.float32).save_pretrained(folder)
        tokenizer(folder, shape.vocabulary, len(role))
    return folder


def tokenizer(folder: Path, vocabulary: int, seed: int) -> None:
    """A byte-level BPE with merges of the text; the rest of the vocabulary are words that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    wanted = min(vocabulary, TRAINED + 40 * seed)  # so that two roles cut the text differently
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((json.loads(line)["text"] for line in TEXT.open(encoding="utf-8")), trainer)
    data = json.loads(backend.to_str())
    known = data["model"]["vocab"]
    known |= {f"zq{number}": number for number in range(len(known), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def verb(*words: object) -> dict[str, Any]:
    """A verb of xtoken in this process; its figures."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.app([*map(str, words), "--json", "--quiet"], standalone_mode=False)
    found: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def corpus(work: Path) -> Path:
    """About ``TOKENS`` of text."""
    path, left = work / "corpus.jsonl", TOKENS[on_gpu()] * 3
    if not path.exists():
        with path.open("w", encoding="utf-8") as file:
            for row in map(json.loads, TEXT.open(encoding="utf-8")):
                for at in range(0, len(row["text"]), 2_000):
                    piece = row["text"][at : at + min(2_000, left)]
                    left -= len(piece)
                    if piece.strip():
                        file.write(json.dumps({"text": piece}) + "\n")
    return path


def captured(work: Path, name: str, *flags: object) -> tuple[Path, dict[str, Any]]:
    """A capture of the teacher, made once, and its figures."""
    out, kept = work / name, work / f"{name}.json"
    if not kept.exists():
        words = ["precompute", corpus(work), "--teacher", model(work, "teacher"), "--max-tokens", 1024, *flags]
        kept.write_text(json.dumps(verb(*words, "--out", out)))
    figures: dict[str, Any] = json.loads(kept.read_text())
    return out, figures


def targets(work: Path) -> Path:
    """Targets of the student from the capture by transformers, made once."""
    out = work / "targets"
    if not (out / "manifest.json").exists():
        capture, _ = captured(work, "capture-hf")
        verb("align", capture, "--student", model(work, "student"), "--for", "p-kl,alm,byte-prefix", "--out", out)
    return out
