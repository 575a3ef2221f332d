"""A vLLM engine in a process of its own that cannot load, and one that is killed while a step waits for it.

Arguments: folder of a model whose weights do not fit its configuration, folder of one with pictures, npz with a
sequence "ids", JSON to write. Run from the repository root with VLLM_ENABLE_V1_MULTIPROCESSING=1.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError

K = 8


def opened(model: str) -> Any:
    # vLLM's processes import this file, and its CPU build stumbles over numba there.
    from xtoken.pipeline.teachers.vllm_teacher import open_teacher

    config = PrecomputeConfig.from_flat(
        corpus="-", out="-", teacher=model, backend="vllm", k=K, max_tokens=64, dtype="float32"
    )
    return open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)


def refusal(call: Callable[[], Any]) -> str:
    """The message with which a call is refused."""
    try:
        call()
    except XtokenError as error:
        return str(error)
    return "nothing was refused"


def seconds_to_notice(teacher: Any, ids: NDArray[np.int32], found: dict[str, Any]) -> float:
    """Kill the engine's process while a step waits for its answer; how long the caller waits after that."""
    engine = teacher._engine
    (process,) = engine._core.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)  # so that it is certain to be in the middle of the step
    killer = threading.Thread(target=kill, args=(engine, process.pid, found))
    killer.start()
    found["killed"] = refusal(lambda: teacher.rows([ids]))
    noticed = time.monotonic()
    killer.join()
    found["later"] = refusal(lambda: teacher.rows([ids]))
    return noticed - float(found.pop("at"))


def kill(engine: Any, pid: int, found: dict[str, Any]) -> None:
    while not engine._core.has_unfinished_requests():
        time.sleep(0.01)
    found["at"] = time.monotonic()
    os.kill(pid, signal.SIGKILL)


def main(broken: str, model: str, source: str, target: str) -> None:
    with np.load(source) as file:
        ids = file["ids"]
    found: dict[str, Any] = {"refused": refusal(lambda: opened(broken))}
    teacher = opened(model)
    (rows,) = teacher.rows([ids])
    found |= {"path": teacher.info.capture_path, "settings": teacher.settings}
    found |= {"ids": rows.ids.tolist(), "logprob": rows.logprob.tolist()}
    found["seconds"] = seconds_to_notice(teacher, ids, found)
    with open(target, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    thread = threading.Thread(target=main, args=sys.argv[1:])
    thread.start()
    thread.join()
