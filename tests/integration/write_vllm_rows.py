"""Rows of a vLLM engine, written by a process of its own: an engine binds threads and memory of the process it is in.

Arguments: model folder, npz with the sequences ("0", "1", ...), npz to write. Run from the repository root.
"""

import sys

import numpy as np

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig


def main(model: str, source: str, target: str) -> None:
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher=model, backend="vllm", k=64, max_tokens=256)
    # vLLM's rows need nothing of the tokenizer; bytes are loaded in no time.
    teacher = open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
    with np.load(source) as file:
        batch = [file[str(index)] for index in range(len(file.files))]
    found = {"info": np.array(teacher.info.model_dump_json())}
    for turn in range(2):
        for index, rows in enumerate(teacher.rows(batch)):
            for name in ("ids", "logprob", "target_logprob", "target_rank"):
                found[f"{name}-{index}-{turn}"] = getattr(rows, name)
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
