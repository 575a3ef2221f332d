"""What do rows of an imported DistillKit set teach, beside a capture of as many bytes?

    python -m benchmarks.imports            # writes results/imports.{json,md}

SmolLM2-135M teaches itself without its last six layers, by forward KL, over windows of examples/data. Its whole rows
are written as DistillKit writes those of its Qwen3-235B set (128 entries: the steps of 32 as float32, those of 96 as a
parabola), and imported by the product; they are also captured by the product's codec. Each is compared with the same
loss from whole rows, as ``benchmarks.fidelity`` does. Bytes are those that say the row: of the set, its two columns
before Parquet; of captures, the codec's columns as they lie in the file. Three minutes.

Shapes: C chunks, here tokens with a row; U = V vocabulary; R rows of all windows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.every_loss import shorten
from benchmarks.fidelity import MODELS, RESULTS, ROOT, Sums, choose, compare
from benchmarks.fidelity_bytes import ROWS, Raw, bytes_per_token
from benchmarks.fidelity_gradients import (
    Pair,
    Window,
    gradient,
    load_pair,
    open_losses,
    read_window,
    targets,
    whole_gradient,
)
from benchmarks.fidelity_rows import DEFAULT, Setting, kept_rows
from benchmarks.machine import machine, machine_line
from tests.distillkit_sets import QWEN3, Document, sampled, top, write
from xtoken import open_capture
from xtoken.pipeline.align.kernels_rows import normalised
from xtoken.pipeline.align.rows import Rows
from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.imports.compression import Compression
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.store.codes import codes_by_use
from xtoken.pipeline.store.inspect import column_bytes
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.logit_rows import top_k
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.ui.progress import Silent

MODEL = MODELS / "smollm2-135m"
LOSS = "sparse-kl"
MOST_K = 255
REPORT = """# An imported set beside a capture

SmolLM2-135M teaches itself without its last six layers, by forward KL, over {rows:,} rows in {windows} windows of
examples/data. Its rows as DistillKit's Qwen3-235B set has them (head of 32 float32, terms 0, 1, 2, delta, k 128) and
imported, beside captures of the same rows. Angle, in degrees, and ratio of norms: of the gradient by the student's
output matrix to the one from whole rows; hidden: by its last hidden states. KL: the loss, nats per token; from whole
rows it is {whole_kl:.4f}, and from entries and REST a lower bound. Bytes per token: what says the row.

| stored | entries | bytes of the set | bytes of the capture | angle | angle, hidden | norm | KL | KL, off by |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{table}

* The set spends {head[set_bytes]} bytes on a token. Its head of 32 entries is exact and turns the gradient by
  {head[angle]:.2f} degrees, as a capture of 32 entries does ({same[angle]:.2f}, for {same[bytes]:.0f} bytes). A capture
  of at most as many bytes as the set keeps {large[entries]:.0f} entries: {large[angle]:.2f} degrees.
* With `--entries all` the polynomial's 96 entries count, too, which are approximate (mean error of a row's 128 entries,
  nats: {error}): {all[angle]:.2f} degrees.

{line}; {seconds:.0f} s.
"""
SAME_ENTRIES = Setting("topk", 32)


def read_windows(pair: Pair, count: int) -> list[Window]:
    """Windows of 256 tokens, evenly from the demo's texts."""
    documents = list(Corpus(CorpusConfig(corpus=str(ROOT / "examples" / "data"), id_field="id")).documents())
    return [read_window(pair, document, 1) for document in choose(documents, count)]


def document_of(window: Window) -> Document:
    """A window as a row of a set: ids, and the row behind each of them but the last, which no set has."""
    ids = window.student_P.numpy()[-len(window.logprob_CU) - 1 :]
    nothing = torch.zeros(1, window.logprob_CU.shape[1])
    return Document(ids, torch.cat([window.logprob_CU, nothing]).numpy())


def imported(windows: Sequence[Window], folder: Path, entries: str) -> tuple[list[Rows], float]:
    """Rows of each window as a capture of the imported set has them, and bytes per token of the capture's columns."""
    out = folder / f"capture-{entries}"
    given = {"format": "distillkit", "paths": [str(folder / "set")], "tokenizer": str(MODEL), "out": str(out)}
    import_dataset(ImportConfig.from_flat(**given, entries=entries, k=MOST_K, min_p=0.0), Silent())
    rows, sizes = [], dict[str, int]()
    for sample, window in zip(open_capture(str(out)), windows, strict=True):
        assert len(sample.tail_logprob) == len(window.logprob_CU), "a row for every token but the first"
        logprob_K, rest_R = normalised(sample.offsets, sample.entry_logprob, sample.tail_logprob)
        rows.append(Rows.of(sample.offsets, sample.entry_ids, logprob_K, rest_R))
    for path in sorted((out / "data").glob("*.parquet")):
        with path.open("rb") as file:
            sizes = {name: sizes.get(name, 0) + size for name, size in column_bytes(file, str(path)).items()}
    return rows, sum(sizes[name] for name in ROWS["topk"]) / sum(len(one.rest) for one in rows)


def heads(windows: Sequence[Window]) -> list[TeacherRows]:
    """The first 255 entries of each window's rows, as an engine gives them."""
    found = []
    for window in windows:
        top_RK, ids_RK = top_k(window.logprob_CU, MOST_K)
        nothing = np.zeros(len(ids_RK), np.float32)
        found.append(TeacherRows(ids_RK.int().numpy(), top_RK.numpy(), nothing, nothing.astype(np.int32)))
    return found


def raw_of(found: Sequence[TeacherRows], windows: Sequence[Window], size: int) -> Raw:
    """All rows, for counting bytes; codes by use of the windows' own tokens."""
    ids, logprob = (np.concatenate([getattr(one, name) for one in found]) for name in ("ids", "logprob"))
    nothing = np.zeros(len(ids), np.float32)
    head = TeacherRows(ids, logprob, nothing, nothing.astype(np.int32))
    rows_N = np.array([len(one.ids) for one in found], np.int32)
    codes = codes_by_use([window.student_P.numpy() for window in windows], size)
    return Raw(head, np.zeros((len(ids), 1), np.int32), rows_N, codes, size)


def as_large(raw: Raw, bytes_: float) -> Setting:
    """The top-k capture with the most entries that takes no more bytes."""
    low, high = 1, MOST_K
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_per_token(raw, Setting("topk", middle))["bytes"] <= bytes_:
            low = middle
        else:
            high = middle - 1
    return Setting("topk", low)


def sums(pair: Pair, windows: Sequence[Window], made: Callable[[Window, int], tuple[Tensor, float]]) -> Sums:
    """The gradient of all windows together."""
    found = Sums(torch.zeros_like(pair.head_VH))
    for number, window in enumerate(windows):
        found.add(pair, window, *made(window, number))
    return found


def entry_errors(windows: Sequence[Window], config: dict[str, Any], size: int) -> dict[str, float]:
    """How far log-probabilities of the set's entries are off, in nats: of each row the mean, over all rows."""
    how = Compression.model_validate({"d": size, **config})
    errors: list[NDArray[np.float64]] = []
    for window in windows:
        document = document_of(window)
        data = np.array(sampled(document, config, size)["compressed_logprobs"], np.uint8)
        errors.append(np.abs(how.values(data) - top(document.logprob[:-1], config["k"])[1]).mean(axis=1))
    error_R = np.concatenate(errors)
    return {"median": float(np.median(error_R)), "90 %": float(np.quantile(error_R, 0.9)), "max": float(error_R.max())}


def measure(count: int, folder: Path) -> dict[str, Any]:
    """All figures."""
    began = time.monotonic()
    shorten(MODEL, folder / "shortened")
    pair = load_pair(MODEL, folder / "shortened", MODEL)
    windows, size = read_windows(pair, count), pair.teacher_tokens.table.size
    write(folder / "set" / "train.parquet", [sampled(document_of(one), QWEN3, size) for one in windows], QWEN3, size)
    how = Compression.model_validate({"d": size, **QWEN3})
    set_bytes = how.value_bytes + how.index_bytes
    found = heads(windows)
    raw = raw_of(found, windows, size)
    stored: list[tuple[dict[str, Any], list[Rows]]] = []
    for entries in ("head", "all"):
        rows, bytes_ = imported(windows, folder, entries)
        kept = sum(len(one.ids) for one in rows) / sum(len(one.rest) for one in rows)
        label = f"imported set, --entries {entries}"
        stored.append(({"label": label, "set_bytes": set_bytes, "bytes": bytes_, "entries": kept}, rows))
    for setting in (SAME_ENTRIES, DEFAULT, as_large(raw, set_bytes)):
        rows = [kept_rows(one, setting, size) for one in found]
        figures = {"label": f"capture: {setting.label}", "set_bytes": None, **bytes_per_token(raw, setting)}
        stored.append((figures, rows))
    whole = sums(pair, windows, lambda window, _: whole_gradient(pair, LOSS, window)[:2])
    loss, made = open_losses(pair, (LOSS,))[LOSS, False], []
    for figures, rows in stored:
        ours = sums(pair, windows, lambda window, at, rows=rows: gradient(loss, window, targets(pair, LOSS, rows[at])))
        made.append({**figures, **compare(ours, whole, ours.value), "kl": ours.value / ours.chunks})
        print(f"{made[-1]['label']}: {made[-1]['angle']:.2f} degrees ({time.monotonic() - began:.0f} s)", flush=True)
    errors = entry_errors(windows, QWEN3, size)
    chunks = {"rows": whole.chunks, "windows": count, "whole_kl": whole.value / whole.chunks}
    return {**chunks, "config": QWEN3, "entry_error": errors, "settings": made, "seconds": time.monotonic() - began}


def report(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    return REPORT.format(
        **found,
        table="\n".join(map(_line, found["settings"])),
        error=", ".join(f"{name} {value:.3f}" for name, value in found["entry_error"].items()),
        **dict(zip(("head", "all", "same", "default", "large"), found["settings"], strict=True)),
        line=machine_line(),
    )


def _line(one: dict[str, Any]) -> str:
    cells = [one["label"], f"{one['entries']:.1f}", _number(one["set_bytes"]), f"{one['bytes']:.1f}"]
    cells += [f"{one['angle']:.2f}", f"{one['hidden_angle']:.2f}", f"{one['norm']:.3f}", f"{one['kl']:.4f}"]
    return f"| {' | '.join(cells)} | {100 * one['value_error']:+.1f} % |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=12, help="of 256 tokens")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"machine": machine(), **measure(asked.windows, Path(folder))}
    (RESULTS / "imports.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "imports.md").write_text(report(found))


if __name__ == "__main__":
    main()
