"""A process that serves another ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xtoken.pipeline.teachers import vllm_parent

ROOT = Path(__file__).resolve().parents[4]
# A parent whose child makes a worker as vLLM does: our class is one of its bases.
WORKER = """
import sys, time
from xtoken.pipeline.teachers.vllm_parent import EndsWithParent

class Worker:
    def __init__(self, name):
        self.name = name

class Mixed(Worker, EndsWithParent):
    pass

assert Mixed("w").name == "w"
print("watching", flush=True)
time.sleep(500)
"""
PARENT = f"""
import subprocess, sys, time
from xtoken.pipeline.teachers.vllm_parent import followed

with followed():
    child = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "watching\\n"
print(child.pid, flush=True)
time.sleep(500)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not vllm_parent._started(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert vllm_parent._started(child)
            parent.kill()
            assert gone(child, seconds=120)
        finally:
            parent.kill()
            if vllm_parent._started(child):
                os.kill(child, signal.SIGKILL)


def test_nothing_is_watched_in_the_process_itself() -> None:
    with vllm_parent.followed():
        assert isinstance(vllm_parent.EndsWithParent(), vllm_parent.EndsWithParent)
    assert "XTOKEN_VLLM_PARENT" not in os.environ


def test_the_dead_and_the_waiting_have_no_start() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected
        assert vllm_parent._started(process.pid) == ""
    assert vllm_parent._started(process.pid) == ""
    assert vllm_parent._started(os.getpid()) != ""


def test_what_an_engines_worker_imports_holds_no_numba() -> None:
    """vLLM looks at everything in every module when it starts on a CPU, and trips over what numba's hold."""
    code = "import sys, pipeline.teachers.vllm_parent, pipeline.tokens; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
