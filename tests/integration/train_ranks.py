"""One rank of a training run, as torchrun starts it: reads a job (config, tokenizer, held_out, answer) from a file.

The first rank writes what ``train`` returned to ``answer``. With ``poison``, the step of this number has no loss. With
``breaks``, the second rank raises in the step of this number, and leaves its group as one of this backend does. With
``second``, the second rank has these options in place of the first's. With ``weights``, each rank writes those that it
begins with to this folder, whole. With ``outlines`` false, all ranks read the student themselves.
"""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer import loop, opening, ranks
from xtoken.trainer.evaluate import EvalSample
from xtoken.trainer.step import Figures


def poison(at: int) -> None:
    """Call number ``at`` of ``run_step`` on this rank gives a CE of NaN."""
    real, calls = loop.run_step, 0

    def poisoned(*args: Any, **options: Any) -> Figures:
        nonlocal calls
        calls += 1
        figures = real(*args, **options)
        return replace(figures, ce=math.nan) if calls == at else figures

    loop.run_step = poisoned


def break_second(at: int, backend: str) -> None:
    """Call number ``at`` of ``run_step`` raises on the second rank."""
    real, calls, decide = loop.run_step, 0, ranks.abrupt_exit

    def broken(*args: Any, **options: Any) -> Figures:
        nonlocal calls
        calls += 1
        if calls == at and os.environ.get("RANK") == "1":
            raise RuntimeError("this rank is broken")
        return real(*args, **options)

    loop.run_step = broken
    ranks.abrupt_exit = lambda _, error: decide(backend, error)


def keep_weights(folder: str) -> None:
    """Write what a run begins with."""
    real, rank = loop.start, os.environ.get("RANK", "0")

    def kept(*args: Any) -> Any:
        training = real(*args)
        model = training.student.model
        tied = {id(one) for one in model.parameters()}
        whole = ranks.gathered(dict(model.named_parameters()) | dict(model.named_buffers()), keep=True)
        frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
        torch.save({"whole": whole, "tied": len(tied), "frozen": frozen}, Path(folder, f"{rank}.pt"))
        return training

    loop.start = kept


def main() -> None:
    """Train."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    held_out = [EvalSample(np.array(ids, np.int32), len(ids), 1, str(i)) for i, ids in enumerate(job["held_out"])]
    if job["poison"]:
        poison(job["poison"])
    if job["breaks"]:
        break_second(*job["breaks"])
    if job.get("weights"):
        keep_weights(job["weights"])
    if not job.get("outlines", True):
        opening.outline = lambda *_: None
    config = job["config"] | (job.get("second", {}) if os.environ.get("RANK") == "1" else {})
    summary = loop.train(TrainConfig.from_flat(**config), TokenizerInfo(**job["tokenizer"]), held_out, Silent())
    if os.environ.get("RANK", "0") == "0":
        Path(job["answer"]).write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
