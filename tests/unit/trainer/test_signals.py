"""SIGTERM is heard once; who sends it twice, or outside, gets what it always did."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import xtoken.trainer.signals as signals
from xtoken.trainer.signals import preemption


class Heard(Exception):
    """Raised by the handler that was there before."""


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, raise_heard)
    yield
    signal.signal(signal.SIGTERM, before)


def raise_heard(*_: Any) -> None:
    raise Heard


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_is_noted_and_a_later_one_does_what_it_did_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with preemption() as preempted:
        assert not preempted.asked
        term()
        assert preempted.asked
        now += signals.SAME - 0.1
        term()  # the launcher's, which passes on what this process got, too
        assert preempted.asked
        now += 0.1
        with pytest.raises(Heard):
            term()


def test_afterwards_all_is_as_before() -> None:
    with preemption():
        pass
    assert signal.getsignal(signal.SIGTERM) is raise_heard
    with preemption() as preempted:
        term()
    assert preempted.asked
    assert signal.getsignal(signal.SIGTERM) is raise_heard


def test_an_error_inside_restores_too() -> None:
    with pytest.raises(ZeroDivisionError), preemption():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) is raise_heard


def test_another_thread_is_never_asked() -> None:
    found: list[Any] = []

    def work() -> None:
        with preemption() as preempted:
            found.extend([preempted.asked, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, raise_heard]


def test_a_second_sigterm_ends_a_process_at_once() -> None:
    """A process of its own, which has no handler: it lives through the first and dies of the second."""
    code = (
        "import os, signal, xtoken.trainer.signals; from xtoken.trainer.signals import preemption\n"
        "xtoken.trainer.signals.SAME = 0.0\n"
        "with preemption() as preempted:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(preempted.asked, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n"), done.stderr
