"""Which GPU a worker sees."""

import os

import pytest

from pipeline.capture import devices


@pytest.mark.parametrize(
    ("visible", "slot", "expected"),
    [("0,1,2", 1, "1"), ("4, 6", 1, "6"), ("4,6", 2, "4"), ("3", 5, "3"), ("", 1, ""), ("GPU-a,GPU-b", 0, "GPU-a")],
)
def test_a_slot_takes_one_of_the_visible_gpus(monkeypatch, visible, slot, expected):
    monkeypatch.setenv(devices.VISIBLE, visible)
    devices.pin_gpu(slot)
    assert os.environ[devices.VISIBLE] == expected


def test_without_the_variable_the_machine_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    monkeypatch.setattr(devices, "_DEV", tmp_path)
    devices.pin_gpu(0)
    assert devices.VISIBLE not in os.environ
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    devices.pin_gpu(1)
    assert os.environ[devices.VISIBLE] == "1"
    monkeypatch.delenv(devices.VISIBLE)
