"""One vLLM engine, used in every way the tests compare, in a process of its own and not from its main thread.

Arguments: model folder, npz with the sequences ("0", "1", ...), npz to write, "all" or "wait". With "wait" the process
scores in half precision, says so on standard output, and waits to be killed. Run from the repository root.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers import vllm_engine, vllm_worker
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.vllm_replies import Entries, TensorRows
from xtoken.pipeline.teachers.vllm_whole import Whole
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig

if TYPE_CHECKING:
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

K = 32
STEP = 256
COLUMNS = ("ids", "logprob", "target_logprob", "target_rank")

Batch = list[NDArray[np.int32]]


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Feed:
    """Batches of ``order``, with "nothing ready" wherever it is allowed; remembers when it was asked."""

    def __init__(self, batch: Batch, order: Sequence[int]) -> None:
        self.unanswered = 0
        self.most = 0
        self.nones = 0
        self._batch, self._order = batch, order

    def batches(self) -> Iterator[list[tuple[Hashable, NDArray[np.int32]]] | None]:
        for start in range(0, len(self._order), 3):
            while self.unanswered and self.nones % 2:
                self.nones += 1
                yield None
            self.nones += 1
            keys = self._order[start : start + 3]
            self.unanswered += len(keys)
            self.most = max(self.most, self.unanswered)
            yield [(("key", key), self._batch[key]) for key in keys]


def by_stream(teacher: "VllmTeacher", batch: Batch, found: dict[str, Any]) -> list[TeacherRows]:
    feed = Feed(batch, np.random.default_rng(0).permutation(len(batch)).tolist())
    rows: dict[Hashable, TeacherRows] = {}
    for key, answer in teacher.stream(feed.batches()):
        assert key not in rows
        rows[key] = answer
        feed.unanswered -= 1
    found["stream"] = np.array([feed.most, feed.nones])
    return [rows["key", index] for index in range(len(batch))]


def left_early(teacher: "VllmTeacher", batch: Batch) -> int:
    """Requests that the engine still has after a stream was given up."""
    stream = teacher.stream(iter([[(index, ids) for index, ids in enumerate(batch)]]))
    next(stream)
    stream.close()
    return int(teacher._engine._core.get_num_unfinished_requests())


def with_fault(
    teacher: "VllmTeacher", batch: Batch, break_it: Callable[[], Callable[[], None]]
) -> tuple[str, list[str], list[TeacherRows]]:
    """(path, warnings, rows) of another teacher on the same engine, opened while something was broken."""
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

    logged = Warnings()
    logging.getLogger("xtoken").addHandler(logged)
    mend = break_it()
    try:
        engine = vllm_engine.Engine(teacher._engine._llm, K, whole=teacher._whole)
    finally:
        mend()
        logging.getLogger("xtoken").removeHandler(logged)
    return engine.path, logged.messages, VllmTeacher(engine, teacher.info, K, whole=engine.whole).rows(batch[:2])


def swapped() -> Callable[[], None]:
    """Tensors whose probabilities stand one place off."""
    entries = TensorRows.entries

    def off(self: TensorRows) -> Entries:
        token, logprob, rank = entries(self)
        return token, np.roll(logprob, 1, axis=1), rank

    TensorRows.entries = off  # type: ignore[method-assign]
    return lambda: setattr(TensorRows, "entries", entries)


def renamed() -> Callable[[], None]:
    """A version whose method has another name."""
    name = vllm_engine._UPDATE
    vllm_engine._UPDATE = "_another_name"
    return lambda: setattr(vllm_engine, "_UPDATE", name)


def raising() -> Callable[[], None]:
    """A version that hands over something else, while the engine is in the middle of a step."""
    keep_tensors = vllm_engine._keep_tensors

    def fail(processor: object, original: object, tensors: object) -> None:
        raise TypeError("tensors are something else")

    vllm_engine._keep_tensors = fail
    return lambda: setattr(vllm_engine, "_keep_tensors", keep_tensors)


def mixed_up() -> Callable[[], None]:
    """Figures of another row than the one they come with."""
    packed = Whole.packed

    def off(self: Whole, *given: Any) -> Any:
        ids, floats = packed(self, *given)
        return ids, floats.roll(1, dims=0)

    Whole.packed = off  # type: ignore[method-assign]
    return lambda: setattr(Whole, "packed", packed)


def unlike() -> Callable[[], None]:
    """A runner whose function is called in another way."""
    rows = vllm_worker.prompt_rows

    def fail(*_: object) -> None:
        raise TypeError("another signature")

    vllm_worker.prompt_rows = fail  # type: ignore[assignment]
    return lambda: setattr(vllm_worker, "prompt_rows", rows)


def keep(found: dict[str, Any], name: str, rows: list[TeacherRows] | None) -> None:
    for index, one in enumerate(rows or []):
        found.update({f"{name}-{column}-{index}": getattr(one, column) for column in COLUMNS})


def top_only(teacher: "VllmTeacher") -> "VllmTeacher":
    """Another teacher on the same engine, without whole rows."""
    from xtoken.pipeline.teachers.vllm_teacher import VllmTeacher

    engine = vllm_engine.Engine(teacher._engine._llm, K)
    return VllmTeacher(engine, teacher.info.model_copy(update={"capture_path": engine.path}), K)


def everything(teacher: "VllmTeacher", batch: Batch, found: dict[str, Any]) -> None:
    keep(found, "whole", teacher.rows(batch))
    keep(found, "streamed", by_stream(teacher, batch, found))
    found["left"] = np.array(left_early(teacher, batch))
    keep(found, "public", teacher.second_path(batch))
    keep(found, "after", teacher.rows(batch))
    keep(found, "rows", top_only(teacher).rows(batch))
    for fault in (swapped, raising, renamed, mixed_up, unlike):
        path, messages, rows = with_fault(teacher, batch, fault)
        found[f"{fault.__name__}-path"] = np.array(path)
        found[f"{fault.__name__}-warnings"] = np.array(messages)
        keep(found, fault.__name__, rows)


def main(model: str, source: str, target: str, what: str) -> None:
    # vLLM's processes import this file, and its CPU build stumbles over numba there.
    from xtoken.pipeline.teachers.vllm_teacher import open_teacher

    config = PrecomputeConfig.from_flat(
        corpus="-",
        out="-",
        teacher=model,
        backend="vllm",
        k=K,
        max_tokens=600,
        batch_tokens=STEP,
        dtype="float32" if what == "all" else "bfloat16",
    )
    # vLLM's rows need nothing of the tokenizer; bytes are loaded in no time.
    teacher = open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
    with np.load(source) as file:
        batch = [file[str(index)] for index in range(len(file.files))]
    found: dict[str, Any] = {
        "info": np.array(teacher.info.model_dump_json()),
        "settings": np.array(json.dumps(teacher.settings)),
    }
    if what == "all":
        everything(teacher, batch, found)
    else:
        keep(found, "rows", teacher.rows(batch[:4]))
        keep(found, "public", teacher.second_path(batch[:4]))
    np.savez(target, **found)
    print("written", flush=True)
    while what == "wait":
        time.sleep(1)


if __name__ == "__main__":
    thread = threading.Thread(target=main, args=sys.argv[1:])
    thread.start()
    thread.join()
