"""Rows of a vLLM engine, written by a process of its own: an engine binds threads and memory of the process it is in.

Arguments: model folder, npz with the sequences ("0", "1", ...), npz to write, codec. Run from the repository root.
"""

import sys

import numpy as np

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig

COLUMNS = ("ids", "logprob", "target_logprob", "target_rank", "lse", "space_logprob", "tau_lognorm")
DRAWS = ("drawn", "ids", "count", "entropy")


def configured(model: str, codec: str, backend: str) -> PrecomputeConfig:
    """What is wanted of each row under a codec."""
    wanted = {"k": 64, "temperatures": [0.5, 2.0]} if codec == "topk" else {"draws": 50, "seed": 3}
    return PrecomputeConfig.from_flat(
        corpus="-", out="-", teacher=model, backend=backend, codec=codec, max_tokens=256, batch_tokens=256, **wanted
    )


def main(model: str, source: str, target: str, codec: str) -> None:
    config = configured(model, codec, "vllm")
    teacher = open_teacher(config.teacher, config.codec, load_tokenizer(model).table)
    with np.load(source) as file:
        batch = [file[str(index)] for index in range(len(file.files))]
    found = {"info": np.array(teacher.info.model_dump_json())}
    for turn in range(2):
        for index, rows in enumerate(teacher.rows(batch)):
            present = [name for name in COLUMNS if getattr(rows, name) is not None]
            found |= {f"{name}-{index}-{turn}": getattr(rows, name) for name in present}
            if rows.draws is not None:
                found |= {f"draws-{name}-{index}-{turn}": getattr(rows.draws, name) for name in DRAWS}
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
