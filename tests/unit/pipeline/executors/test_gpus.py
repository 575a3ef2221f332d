"""Which GPU a worker sees."""

import os

import pytest

from xtoken.pipeline.capture import precompute, worker
from xtoken.pipeline.executors import gpus as devices
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent


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


@pytest.mark.parametrize(
    ("visible", "flags", "engines"),
    [
        ("0,1", {}, 1),
        ("0,1", {"workers": 2}, 1),
        ("0,1", {"workers": 3}, 2),
        ("0,1,2,3,4", {"workers": 4, "backend": "vllm", "tensor_parallel": 2}, 2),
        ("0", {"workers": 1, "backend": "vllm", "tensor_parallel": 2}, 1),
        ("", {"workers": 4}, 4),
        ("0", {"workers": 8, "ray": "auto"}, 1),
        ("0", {"ray": "auto", "gpus_per_worker": 0.5}, 2),
        ("0", {"ray": "auto", "gpus_per_worker": 0.3333}, 3),
        ("0", {"ray": "auto", "gpus_per_worker": 0.4}, 2),
        ("0", {"ray": "auto", "gpus_per_worker": 0.7}, 1),
        ("0", {"ray": "auto", "gpus_per_worker": 4.0}, 1),
        ("0", {"ray": "auto", "gpus_per_worker": 0.0}, 1),
    ],
)
def test_engines_that_share_a_gpu_are_counted(monkeypatch, visible, flags, engines):
    monkeypatch.setenv(devices.VISIBLE, visible)
    config = PrecomputeConfig.from_flat(**{"corpus": "c", "teacher": "t", "out": "o", **flags})
    assert devices.engines_per_gpu(config.run, config.teacher.tensor_parallel) == engines


def test_more_than_one_gpu_is_no_fraction():
    with pytest.raises(ValueError, match=r"gpus_per_worker=1\.5: only less than one GPU can be a fraction"):
        PrecomputeConfig.from_flat(corpus="c", teacher="t", out="o", ray="auto", gpus_per_worker=1.5)


@pytest.mark.parametrize(
    ("flags", "visible", "engines"),
    [
        ({"backend": "vllm", "device": "cuda", "workers": 4}, "1", [2]),
        ({"backend": "vllm", "workers": 4}, "1", [2]),
        ({"backend": "hf", "device": "cuda:1", "workers": 4}, "0,1", [2]),
    ],
)
def test_a_worker_sees_its_gpu_and_its_engine_knows_who_shares_it(monkeypatch, tmp_path, flags, visible, engines):
    monkeypatch.setenv(devices.VISIBLE, "0,1")
    (tmp_path / "corpus.txt").write_text("some words")
    known = {"corpus": str(tmp_path / "corpus.txt"), "teacher": "bytes", "out": str(tmp_path / "out"), "k": 4}
    precompute(PrecomputeConfig.from_flat(**known, backend="fake"), Silent())
    told = []

    def opened(config, codec, table, engines):
        told.append(engines)
        raise XtokenError("far enough")

    monkeypatch.setattr(worker, "open_teacher", opened)
    with pytest.raises(XtokenError, match="far enough"):
        worker.CaptureJob(PrecomputeConfig.from_flat(**known | flags)).open(3)
    assert (os.environ[devices.VISIBLE], told) == (visible, engines)


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
