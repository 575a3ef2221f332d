"""How an engine starts and what it says when it cannot, with stand-ins for vLLM; a real one is in test_vllm_process."""

import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xtoken.pipeline.teachers import vllm_start
from xtoken.pipeline.teachers.vllm_start import CannotStart, Overheard, lacks_memory, root_cause, start_llm

ROOT = Path(__file__).resolve().parents[4]
MEMORY = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
ENGINE_LOG = f"""
(Worker_TP1 pid=8) ERROR 11-29 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker_TP1 pid=8) ERROR 11-29 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker_TP1 pid=8) ERROR 11-29 [multiproc_executor.py:953] {MEMORY}
(EngineCore pid=7) ERROR 11-29 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a \
background process. See stack trace for root cause.
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1530, in run_engine_core
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': 1}}
"""
WRAPPER = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (ENGINE_LOG, MEMORY),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
            "OutOfMemoryError: CUDA out of memory.",
        ),
        ("a warning\nKeyError: 'model.layers.0.x'\nbye\n", "KeyError: 'model.layers.0.x'"),
        ("ValueError: first\nValueError: last\n", "ValueError: last"),
        ("RuntimeError: Engine core initialization failed.\n", None),
        ("no error at all: fine\n", None),
        ("", None),
    ],
)
def test_the_root_cause_is_the_last_error_that_points_at_no_other(said: str, cause: str | None) -> None:
    found = root_cause(said)
    assert (found is None) == (cause is None)
    assert cause is None or (found or "").startswith(cause)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> list[dict[str, Any]]:
    """A vLLM whose first attempts end so; what each was asked for."""
    asked: list[dict[str, Any]] = []

    def llm(**options: Any) -> Any:
        asked.append(options)
        outcome = outcomes[len(asked) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    return asked


def process_says(text: str) -> None:
    """A process that writes on standard error."""
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write(sys.argv[1])", text], check=True)


def test_what_processes_say_is_passed_on_and_its_end_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    heard = Overheard()
    with heard.listening():
        process_says("a line that comes first\n" * 5000)
        process_says(ENGINE_LOG)
    assert heard.root_cause() == MEMORY
    assert capfd.readouterr().err == "a line that comes first\n" * 5000 + ENGINE_LOG


def test_a_process_without_standard_error_is_no_problem() -> None:
    code = "import os; os.close(2); from xtoken.pipeline.teachers.vllm_start import Overheard; heard = Overheard()\n"
    code += "with heard.listening(): pass\nassert heard.root_cause() is None"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_an_error_that_points_elsewhere_is_replaced_by_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def llm(**options: Any) -> Any:
        process_says(ENGINE_LOG)
        raise WRAPPER

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    with pytest.raises(CannotStart) as caught:
        start_llm({})
    assert str(caught.value) == MEMORY
    assert lacks_memory(str(caught.value))


PYDANTIC = """1 validation error for ModelConfig
  Value error, Model architectures ['XForCausalLM'] are not supported for now. [type=value_error, input_value=Args()]
    For further information visit https://errors.pydantic.dev"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("max_model_len is too large\nand more"), "max_model_len is too large"),
        (ValueError(PYDANTIC), "Model architectures ['XForCausalLM'] are not supported for now."),
        (AssertionError(), "AssertionError"),
        (TypeError("got an unexpected keyword argument 'x'"), "got an unexpected keyword argument 'x'"),
        (WRAPPER, str(WRAPPER)),
    ],
)
def test_what_says_something_is_said(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    fake_vllm(monkeypatch, error)
    with pytest.raises(CannotStart) as caught:
        start_llm({"hf_overrides": {}})
    assert str(caught.value) == message
    assert not lacks_memory(str(caught.value))


def test_a_quantized_head_is_asked_for_no_other_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    head = ValueError("A head_dtype different from the model dtype is only supported for an unquantized lm_head")
    asked = fake_vllm(monkeypatch, head, "an engine")
    assert start_llm({"model": "m", "hf_overrides": {"head_dtype": "float32"}}) == "an engine"
    assert asked[1] == {"model": "m"}
    fake_vllm(monkeypatch, head)
    with pytest.raises(CannotStart, match="unquantized lm_head"):
        start_llm({"model": "m"})


def engine_with(**attributes: Any) -> Any:
    return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(**attributes)))


def test_who_waits_for_a_dead_engine_is_woken() -> None:
    resources, answers = SimpleNamespace(engine_dead=False), queue.Queue[Any]()
    llm = engine_with(resources=resources, outputs_queue=answers)
    vllm_start.watch(llm)
    assert not vllm_start.is_gone(llm)
    resources.engine_dead = True
    assert isinstance(answers.get(timeout=60), RuntimeError)
    assert vllm_start.is_gone(llm)


def test_an_engine_in_this_process_is_not_watched() -> None:
    llm = engine_with()
    vllm_start.watch(llm)
    assert not vllm_start.is_gone(llm)


def test_a_release_that_waits_elsewhere_ends_the_process() -> None:
    code = (
        "import time; from types import SimpleNamespace as S; from xtoken.pipeline.teachers.vllm_start import watch\n"
    )
    code += "watch(S(llm_engine=S(engine_core=S(resources=S(engine_dead=True))))); time.sleep(100)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=90).returncode == 1
