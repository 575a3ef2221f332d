"""How close is the gradient from a store to the gradient from the teacher's whole rows, and for how many bytes?

Teacher Gemma-3-270m, student SmolLM2-135M; for the forward KL, which needs one tokenizer, SmolLM2-135M teaches itself
without its last six layers. Rows go through the product's codec, target kernels and losses; the reference is the same
loss written densely on whole rows.

    python -m benchmarks.corpus corpus.jsonl
    python -m benchmarks.fidelity corpus.jsonl                     # writes results/fidelity.{json,md,png}
    python -m benchmarks.fidelity corpus.jsonl --rows gemma.npz --same-rows smollm2.npz

The .npz files are raw rows (``benchmarks.rows``) from which bytes are counted; what is not given is made first, in 15
minutes each. Half an hour on two idle cores, 6 GB.

Shapes: C chunks, V student vocabulary, H hidden.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.every_loss import shorten
from benchmarks.fidelity_bytes import Raw, bytes_per_token
from benchmarks.fidelity_gradients import (
    Pair,
    Window,
    body_gradient,
    gradient,
    load_pair,
    open_losses,
    read_window,
    targets,
    whole_gradient,
)
from benchmarks.fidelity_report import averaged, draw_figure, report
from benchmarks.fidelity_rows import DEFAULT, DRAWN, DROPPED, FLOORED, SETTINGS, TAILED, TOPK, Rows, Setting, all_rows
from benchmarks.machine import machine
from xtoken.pipeline.corpus import Corpus, Document
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.trainer.losses.base import Loss

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / ".cache" / "models"
TEACHER, STUDENT = MODELS / "gemma-3-270m", MODELS / "smollm2-135m"
SOME = [*TOPK, *FLOORED, *DROPPED, *DRAWN, *TAILED[:3]]
# settings of each loss
PLAN = {"p-kl": SETTINGS, "byte-prefix": SOME, "sparse-kl": SOME}
BELOW = [DEFAULT, Setting("topk", 128), Setting("systematic", draws=50), Setting("systematic", draws=200)]
Case = tuple[Setting, int]


@dataclass
class Sums:
    """A batch's gradient as it grows.

    Attributes:
        head_VH: by the output matrix. hidden: by the last hidden states, [C, H] of each window.
        value: the loss. chunks: how many it is the sum of.
    """

    head_VH: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    value: float = 0.0
    chunks: int = 0

    def add(self, pair: Pair, window: Window, grad_CV: Tensor, value: float) -> None:
        """One more window."""
        self.head_VH.addmm_(grad_CV.T, window.hidden_CH)
        self.hidden.append(grad_CV @ pair.head_VH)
        self.value, self.chunks = self.value + value, self.chunks + len(grad_CV)


class Reference:
    """The whole rows' side of one loss.

    Attributes:
        stages: its sums at every stage. entropy: sum of the entropies of the targets there.
        below: the gradient of all parameters at the first stage, of P-KL.
    """

    def __init__(self, pair: Pair) -> None:
        self.stages: dict[int, Sums] = {}
        self.entropy: dict[int, float] = {}
        self.below: Tensor | None = None
        self._sums, self._entropy = Sums(torch.zeros_like(pair.head_VH)), 0.0

    def add(self, pair: Pair, window: Window, loss: str, number: int, stops: tuple[int, int]) -> None:
        """Window ``number``, from 1."""
        grad_CV, value, entropy = whole_gradient(pair, loss, window)
        sums = self._sums
        sums.add(pair, window, grad_CV, value)
        self._entropy += entropy
        if loss == "p-kl" and number <= stops[0]:
            body_gradient(pair, window, sums.hidden[-1])
        if number in stops:
            self.stages[number] = Sums(sums.head_VH.clone(), list(sums.hidden), sums.value, sums.chunks)
            self.entropy[number] = self._entropy
        if loss == "p-kl" and number == stops[0]:
            self.below = parameters(pair, sums.head_VH)


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two gradients, from the chord: a cosine near 1 has no digits left for small ones."""
    chord = float((a / a.norm() - b / b.norm()).norm())
    return math.degrees(2 * math.asin(min(1.0, chord / 2)))


def compare(found: Sums, whole: Sums, value: float) -> dict[str, float]:
    """Figures of one setting, seed and stage; ``value`` is its loss."""
    hidden, whole_hidden = torch.cat(found.hidden), torch.cat(whole.hidden)
    return {
        "angle": angle(found.head_VH, whole.head_VH),
        "norm": float(found.head_VH.norm() / whole.head_VH.norm()),
        "hidden_angle": angle(hidden, whole_hidden),
        "hidden_norm": float(hidden.norm() / whole_hidden.norm()),
        "value_error": value / whole.value - 1,
    }


def stages(count: int) -> tuple[int, int]:
    """Windows after which figures are taken: a quarter of them, and all."""
    return max(1, count // 4), count


def take_windows(
    pair: Pair, documents: list[Document], counts: dict[str, int]
) -> tuple[list[Window], dict[Case, list[Rows]], dict[str, Reference]]:
    """Windows without their whole rows, each setting's rows of each, and the reference of each loss."""
    wanted = [setting for setting in SETTINGS if any(setting in PLAN[loss] for loss in counts)]
    kept, rows, references = [], [], {loss: Reference(pair) for loss in counts}
    for number, document in enumerate(documents[: max(counts.values())], start=1):
        window = read_window(pair, document, 1)
        rows.append(all_rows(window.logprob_CU, wanted, 1000 * number))
        for loss, count in counts.items():
            if number <= count:
                references[loss].add(pair, window, loss, number, stages(count))
        kept.append(Window(**{**vars(window), "logprob_CU": torch.zeros(0)}))
        print(f"{window.name}: {len(window.student_P)} tokens, {len(window.first_C)} chunks", flush=True)
    return kept, {key: [found[key] for found in rows] for key in rows[0]}, references


def parameters(pair: Pair, head_VH: Tensor) -> Tensor:
    """The student's whole gradient in one vector, the output matrix being tied to the embedding; then none is left."""
    tied = pair.student.get_input_embeddings().weight
    tied.grad = head_VH.clone() if tied.grad is None else tied.grad + head_VH
    found = torch.cat([p.grad.flatten() for p in pair.student.parameters() if p.grad is not None])
    pair.student.zero_grad()
    return found


def own_entropy(columns: dict[str, Any]) -> float:
    """Sum of the entropies of targets without REST."""
    (name,) = {"pkl_logprob", "prefix_logprob", "skl_logprob"} & set(columns)
    logp = columns[name].astype(np.float64)
    return float(-(np.exp(logp) * logp).sum())


def measure(
    pair: Pair,
    loss: Loss,
    name: str,
    case: Case,
    windows: list[Window],
    rows: list[Rows],
    reference: Reference,
) -> list[dict[str, Any]]:
    """Figures of one setting and seed at every stage."""
    (setting, seed), stops = case, stages(len(windows))
    below = name == "p-kl" and setting in BELOW and seed == 0
    drawn = bool(setting.draws or setting.per_mass)
    sums, entropy, found = Sums(torch.zeros_like(pair.head_VH)), 0.0, []
    for number, (window, row) in enumerate(zip(windows, rows, strict=False), start=1):
        columns = targets(pair, name, row)
        sums.add(pair, window, *gradient(loss, window, columns))
        entropy += own_entropy(columns) if drawn else 0.0
        if below and number <= stops[0]:
            body_gradient(pair, window, sums.hidden[-1])
        if number in stops:
            # draws say the cross-entropy; the entropy beside it is the row's own, which their codec stores
            value = sums.value + (entropy - reference.entropy[number] if drawn else 0.0)
            figures = compare(sums, reference.stages[number], value)
            if below and number == stops[0] and reference.below is not None:
                figures["all_angle"] = angle(parameters(pair, sums.head_VH), reference.below)
            where = {"loss": name, **vars(setting), "label": setting.label, "seed": seed, "chunks": sums.chunks}
            found.append(where | figures)
    return found


def run_pair(pair: Pair, documents: list[Document], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """All settings of the losses that a pair serves."""
    windows, rows, references = take_windows(pair, documents, counts)
    opened, began = open_losses(pair, tuple(counts)), time.monotonic()
    for name, count in counts.items():
        for case, made in rows.items():
            if case[0] not in PLAN[name]:
                continue
            loss = opened[name, case[0].family == "drop"]
            found = measure(pair, loss, name, case, windows[:count], made, references[name])
            print(f"{name} {case[0].family} {case[0].label}: {found[-1]['angle']:.2f}", end="", flush=True)
            print(f" ({time.monotonic() - began:.0f} s)", flush=True)
            yield from found


def choose(documents: list[Document], count: int) -> list[Document]:
    """Documents evenly from the corpus, so ordered that the first few are, too."""
    order = sorted(range(count), key=lambda i: i * 0.618 % 1)
    return [documents[(2 * i + 1) * len(documents) // (2 * count)] for i in order]


def gradients(corpus: str, count: int) -> Iterator[dict[str, Any]]:
    """Figures of all losses; P-KL over so many windows, the others over half as many."""
    documents = choose(list(Corpus(CorpusConfig(corpus=corpus, id_field="id")).documents()), count)
    half = -(-count // 2)
    yield from run_pair(load_pair(TEACHER, STUDENT, STUDENT), documents, {"p-kl": count, "byte-prefix": half})
    with tempfile.TemporaryDirectory() as folder:
        shorten(STUDENT, Path(folder) / "shortened")
        pair = load_pair(STUDENT, Path(folder) / "shortened", STUDENT)
    yield from run_pair(pair, documents, {"sparse-kl": half})


def rows_file(given: str | None, corpus: str, teacher: Path, folder: Path) -> Path:
    """The raw rows, made unless they are given."""
    if given is not None:
        return Path(given)
    out = folder / f"{teacher.name}.npz"
    subprocess.run([sys.executable, "-m", "benchmarks.rows", corpus, str(teacher), str(out)], cwd=ROOT, check=True)
    return out


def sizes(path: Path, teacher: Path, settings: list[Setting]) -> dict[tuple[str, str], dict[str, float]]:
    """Bytes per token and entries of each setting, by family and label."""
    raw = Raw.load(path, load_tokenizer(str(teacher)).table.size)
    return {(setting.family, setting.label): bytes_per_token(raw, setting) for setting in settings}


def main() -> None:
    """Count bytes, measure gradients, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--rows", help="raw rows of the teacher")
    parser.add_argument("--same-rows", help="raw rows of the student")
    parser.add_argument("--windows", type=int, default=8, help="of 256 teacher tokens, for P-KL; half for the others")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        cross = sizes(rows_file(asked.rows, asked.corpus, TEACHER, Path(folder)), TEACHER, SETTINGS)
        same = sizes(rows_file(asked.same_rows, asked.corpus, STUDENT, Path(folder)), STUDENT, SOME)
    rows = [row | (same if row["loss"] == "sparse-kl" else cross)[row["family"], row["label"]]
            for row in gradients(asked.corpus, asked.windows)]  # fmt: skip
    write(rows, asked.windows)


def write(rows: list[dict[str, Any]], windows: int) -> None:
    """The results of all settings and seeds."""
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": machine(), "windows": windows, "rows": rows}
    (RESULTS / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "fidelity.md").write_text(report(averaged(rows), windows))
    draw_figure(averaged(rows), RESULTS / "fidelity.png")


if __name__ == "__main__":
    main()
