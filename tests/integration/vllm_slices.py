"""Rows of a vLLM engine of two workers, each of which has half of the output head, read in slices and gathered.

Arguments: model folder, npz with a sequence "ids", npz to write. Run from the repository root; vLLM is to bind no
threads (VLLM_CPU_OMP_THREADS_BIND=nobind), and there is nothing in it that torch should compile.
"""

import logging
import sys
from typing import Any

import numpy as np

from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.vllm_whole import Whole
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig

K, DRAWS, SAMPLED_FROM = 64, 40, 250
TEMPERATURES = [0.5, 2.0]
COLUMNS = ("ids", "logprob", "target_logprob", "target_rank", "lse", "space_logprob", "tau_lognorm")
COUNTS = ("drawn", "ids", "count", "entropy")


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def starts(vocabulary: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tokens that begin a word, in both halves."""
    return np.arange(vocabulary) % 7 == 0


def wanted(vocabulary: int) -> dict[str, Whole]:
    """What is asked of rows, one after the other."""
    sampler = Sampler(DRAWS, 3, SAMPLED_FROM)
    return {
        "topk": Whole(K, starts(vocabulary), tuple(TEMPERATURES)),
        "sampled": Whole(1, starts(vocabulary), (), sampler),
    }


def main(model: str, source: str, target: str) -> None:
    # vLLM's processes import this file, and its CPU build stumbles over numba there.
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher, open_teacher

    said = Warnings()
    logging.getLogger("xtoken").addHandler(said)
    config = PrecomputeConfig.from_flat(
        corpus="-", out="-", teacher=model, backend="vllm", k=K, max_tokens=64, dtype="float32", tensor_parallel=2,
        temperatures=TEMPERATURES,
    )  # fmt: skip
    teacher: Any = open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
    engine, info = teacher._engine, teacher.info
    with np.load(source) as file:
        batch = [file["ids"], file["ids"][:1].repeat(2)]
    found = {"info": np.array(info.model_dump_json()), "said": np.array(said.messages)}
    for name, whole in wanted(info.vocab_rows).items():
        for way, sliced in (("sliced", True), ("gathered", False)):
            engine.whole, engine._sliced, engine._k = whole, sliced, whole.k
            assert engine._whole_difference() is None
            found[f"{name}-{way}-path"] = np.array(engine.path)
            rows, *_ = VllmTeacher(engine, info, whole.k, {}, whole).rows(batch)
            for column in COLUMNS:
                if getattr(rows, column) is not None:
                    found[f"{name}-{way}-{column}"] = getattr(rows, column)
            for column in COUNTS if rows.draws is not None else ():
                found[f"{name}-{way}-draws-{column}"] = getattr(rows.draws, column)
    found["said later"] = np.array(said.messages[len(found["said"]) :])
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
