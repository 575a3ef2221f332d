"""One rank of a training run, as torchrun starts it: reads a job (config, tokenizer, held_out, answer) from a file.

The first rank writes what ``train`` returned to ``answer``.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from schemas.manifest import TokenizerInfo
from schemas.progress import Silent
from schemas.train_config import TrainConfig
from trainer.evaluate import EvalSample
from trainer.loop import train


def main() -> None:
    """Train."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    held_out = [EvalSample(np.array(ids, np.int32), len(ids), 1, str(i)) for i, ids in enumerate(job["held_out"])]
    summary = train(TrainConfig(**job["config"]), TokenizerInfo(**job["tokenizer"]), held_out, Silent())
    if os.environ.get("RANK", "0") == "0":
        Path(job["answer"]).write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
