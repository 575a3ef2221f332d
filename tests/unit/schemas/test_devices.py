"""``--device auto`` on machines that are not here: drivers too old, no driver, a laptop, a pod that lacks its GPU.

Torch and the kernel's files are made to say what they say there.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xtoken.pipeline.teachers.hf_teacher import _device
from xtoken.schemas import devices
from xtoken.schemas.devices import auto_device
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.student.model import pick_device

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``machine(built=..., cards=..., driver=..., usable=...)``: this machine."""

    def make(built: str | None, cards: int = 0, driver: str | None = None, usable: bool = False) -> None:
        for index in range(cards):
            (tmp_path / f"nvidia{index}").touch()
        (tmp_path / "nvidiactl").touch()
        if driver is not None:
            (tmp_path / "version").write_text(driver)

        def is_available() -> bool:
            if not usable and built and driver:
                warnings.warn("CUDA initialization: the driver is too old (found version 12020). Please", stacklevel=1)
            return usable

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch, "__version__", "2.14.0+cu130" if built else "2.14.0+cpu")
        monkeypatch.setattr(devices, "_DEV", tmp_path)
        monkeypatch.setattr(devices, "_DRIVER", tmp_path / "version")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_a_gpu_that_works_is_taken(machine: Callable[..., None]) -> None:
    machine("13.0", cards=1, driver=OPEN, usable=True)
    assert auto_device() == "cuda"


def test_no_gpu_is_the_cpu(machine: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    machine(None)
    assert auto_device() == "cpu"
    assert pick_device("auto") == _device("auto") == torch.device("cpu")
    assert not caplog.records


def test_a_build_for_cuda_without_a_gpu_is_said(machine: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    machine("13.0")
    assert auto_device() == "cpu"
    assert caplog.messages == ["torch is built for CUDA 13.0 and there is no NVIDIA GPU here: working on the CPU"]


@pytest.mark.parametrize(
    ("built", "cards", "driver", "said"),
    [
        ("13.0", 8, CLOSED, r"is here \(driver 535.104.05\).*CUDA 13.0, which needs driver 580 or newer.*too old"),
        ("13.0", 1, OPEN, r"driver 580.65.06\), but torch 2.14.0\+cu130 cannot use it"),
        ("12.8", 1, None, "an NVIDIA GPU is here, but torch .* CUDA 12.8, which needs driver 525"),
        ("14.1", 1, "a text", r"\(driver of unknown version\).*built for CUDA 14.1; update"),
        (None, 1, OPEN, r"torch 2.14.0\+cpu is built without CUDA; install torch for CUDA"),
        ("13.0", 0, OPEN, "no GPU is given to this process; start the container with --gpus all"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    machine: Callable[..., None], built: str | None, cards: int, driver: str | None, said: str
) -> None:
    """In both places that know ``auto``, with the driver, the CUDA that torch is built for, and the way out."""
    machine(built, cards, driver)
    for pick in (pick_device, _device):
        with pytest.raises(XtokenError, match=said) as error:
            pick("auto")
        assert "--device cpu" in str(error.value)
        assert "\n" not in str(error.value)
        assert pick("cpu") == torch.device("cpu")


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_who_hides_the_gpus_wants_the_cpu(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    machine("13.0", cards=2, driver=CLOSED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert auto_device() == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(XtokenError, match="driver 535"):
        auto_device()
