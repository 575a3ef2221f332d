"""What a student gives to numerals that its teacher has no token for: bits per numeral, over a run's checkpoints.

A numeral token is one of the student's of two or three digits. The teacher splits digits, so that each of them is
uncommon: only text, or a loss that reads several of the teacher's tokens, can teach it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# here, since two threads at once cannot import them
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

WINDOW = 512


def measure(run: Path, texts: Path, kinds: tuple[str, ...] = ("docs", "tables")) -> dict[str, dict[str, list[float]]]:
    """Bits and number of numeral tokens of each held-out document, by step and document.

    Args:
        run: folder of a finished run whose checkpoints were kept.
        texts: JSON lines of documents.
        kinds: of documents that count.
    """
    tokenizer: Any = Tokenizer(tokenizer_file=str(run / "model" / "tokenizer.json"))
    numerals = [token for word, token in tokenizer.get_vocab().items() if word.isdigit() and len(word) > 1]
    is_numeral = torch.zeros(len(tokenizer), dtype=torch.bool)
    is_numeral[numerals] = True
    documents = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    ids = {
        row["id"]: torch.tensor(tokenizer(row["text"]).input_ids[:WINDOW])
        for row in documents
        if row["id"].split("/")[0] in kinds
    }
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run / "model"))
    found = {}
    for step, weights in _checkpoints(run):
        model.load_state_dict(load_file(weights), strict=False)
        model.tie_weights()
        found[step] = {name: _document(model, one, is_numeral) for name, one in ids.items()}
    return found


def _checkpoints(run: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted((run / "checkpoints").iterdir()):
        yield str(int(folder.name.removeprefix("step-"))), folder / "model.safetensors"


@torch.inference_mode()
def _document(model: Any, ids_T: torch.Tensor, is_numeral: torch.Tensor) -> list[float]:
    logits_TV = model.eval()(ids_T[None, :-1]).logits[0].float()
    bits_T = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="none") / torch.log(torch.tensor(2.0))
    chosen_T = is_numeral[ids_T[1:]]
    return [float(bits_T[chosen_T].sum()), int(chosen_T.sum())]
