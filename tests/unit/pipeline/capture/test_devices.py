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
    devices.pin_gpus(slot)
    assert os.environ[devices.VISIBLE] == expected


@pytest.mark.parametrize(
    ("visible", "slot", "expected"),
    [("0,1,2,3,4", 1, "2,3"), ("0,1,2,3,4", 2, "0,1"), ("5,6", 3, "5,6"), ("7", 0, "7")],
)
def test_tensor_parallel_workers_take_groups(monkeypatch, visible, slot, expected):
    monkeypatch.setenv(devices.VISIBLE, visible)
    devices.pin_gpus(slot, 2)
    assert os.environ[devices.VISIBLE] == expected


def test_without_the_variable_the_machine_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv(devices.VISIBLE, "undone")  # what the code sets below is undone too
    monkeypatch.delenv(devices.VISIBLE)
    monkeypatch.setattr(devices, "_DEV", tmp_path)
    devices.pin_gpus(0)
    assert devices.VISIBLE not in os.environ
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    devices.pin_gpus(1)
    assert os.environ[devices.VISIBLE] == "1"
