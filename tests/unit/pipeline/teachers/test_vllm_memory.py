"""How much of a GPU an engine takes: of one or several on it, whatever the size of GPU and vocabulary."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xtoken.pipeline.teachers.vllm_memory import Gpu, alone_on_gpu, memory_share

ROOT = Path(__file__).resolve().parents[4]
GIB = 1 << 30
H100, H200, L4, T4 = 80 * GIB, 141 * GIB, 24 * GIB, 16 * GIB
QWEN, GEMMA = 151_936, 262_144


def model(rows: int, cap: float | None = None) -> Any:
    text = SimpleNamespace(vocab_size=rows, final_logit_softcapping=cap)
    return SimpleNamespace(get_text_config=lambda: text)


def share(rows: int, total: int, engines: int = 1, *, cap: float | None = None, tp: int = 1, v2: bool = True) -> float:
    return memory_share(model(rows, cap), tp, Gpu(total, engines), v2=v2)


def test_what_logits_need_stays_free_and_no_more() -> None:
    assert share(QWEN, H200) == 0.92, "never more than vLLM itself would take"
    for rows, total, cap, tp in (
        (QWEN, H100, None, 1),
        (GEMMA, H100, 30.0, 1),
        (GEMMA, L4, 30.0, 1),
        (QWEN, L4, None, 4),
    ):
        copies = 3 * 1024 * rows * 4 * (2 if cap or tp > 1 else 1)
        left = total * (1 - share(rows, total, cap=cap, tp=tp))
        assert left >= copies + 1.4 * GIB
        assert left <= max(copies + 1.6 * GIB + total / 1000, 0.081 * total)


def test_a_model_that_needs_nine_tenths_of_a_gpu_fits() -> None:
    """Qwen3-32B in bfloat16: 61 GiB of weights and some for activations and keys."""
    assert share(QWEN, H100) * 80 > 61 + 6


@pytest.mark.parametrize("total", [H200, H100, L4, T4])
@pytest.mark.parametrize("rows", [QWEN, GEMMA])
@pytest.mark.parametrize("v2", [True, False])
def test_engines_on_one_gpu_fit_beside_each_other(total: int, rows: int, v2: bool) -> None:
    for engines in (2, 3, 4):
        one = share(rows, total, engines, v2=v2)
        assert 0 < one * engines <= 0.92
        assert one < share(rows, total, engines - 1, v2=v2)


def test_the_older_runner_and_an_unknown_gpu_keep_room_for_whole_prompts() -> None:
    assert share(QWEN, H100, v2=False) == share(QWEN, 0) == memory_share(model(QWEN), 1, None, v2=True) == 0.8
    assert share(QWEN, 0, engines=2) == 0.4


def test_a_small_gpu_gets_a_share_that_is_one() -> None:
    assert share(GEMMA, 4 * GIB, cap=30.0) == 0.1
    assert share(GEMMA, 4 * GIB, engines=2, cap=30.0) == 0.05


HOLDER = """
from xtoken.pipeline.teachers.vllm_memory import alone_on_gpu
with alone_on_gpu(2):
    print("held", flush=True)
    input()
"""


def test_engines_that_share_a_gpu_load_one_after_the_other(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1/2,3")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        (lock,) = tmp_path.glob("*.lock")
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()  # however its holder ends
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with alone_on_gpu(1):
        assert list(tmp_path.glob("*.lock")) == [lock], "one that has its GPU for itself waits for nobody"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with alone_on_gpu(2):
        pass
