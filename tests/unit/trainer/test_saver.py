"""Checkpoints that are written while the run goes on: they hold the step they are of, and nothing wrong is lost."""

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import xtoken.trainer.checkpoint as checkpoint
import xtoken.trainer.loop as loop
import xtoken.trainer.saver as saver
from xtoken.schemas.configs.train import CheckpointGroup, TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.flags import build, words_of
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.checkpoint import Policy, restore_checkpoint
from xtoken.trainer.loop import train
from xtoken.trainer.ranks import gathered
from xtoken.trainer.saver import Saver, room_to_copy

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7]]
SECONDS = 60  # that no test waits
ONE = Policy(1)


@pytest.fixture
def configure(make_targets: Callable[..., str], student_dir: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    root = make_targets(LENGTHS)

    def build(**options: Any) -> TrainConfig:
        base = {"targets": [root], "student": student_dir, "out": str(tmp_path / "run"), "device": "cpu"}
        sizes = {"steps": 5, "step_tokens": 24, "micro_tokens": 14, "max_tokens": 32, "warmup": 1, "lr": 1e-2}
        return TrainConfig.from_flat(**{**base, **sizes, **options})

    return build


def saved(out: str) -> list[str]:
    return sorted(path.name for path in Path(out, "checkpoints").iterdir())


class SlowDisk:
    """Reading back waits until ``go``; ``waits`` is set while it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.waits, self.threads = threading.Event(), threading.Event(), set[str]()
        self._real = checkpoint._verify
        monkeypatch.setattr(checkpoint, "_verify", self._verify)

    def _verify(self, folder: Path) -> Any:
        self.threads.add(threading.current_thread().name)
        self.waits.set()
        assert self.go.wait(SECONDS)
        return self._real(folder)


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed over is a copy: the weights change while the disk is slow."""
    disk, weight = SlowDisk(monkeypatch), torch.arange(6.0).reshape(2, 3)
    turned, state = weight.T, {"left_out": [1]}
    held = saver.Saver()
    copies = gathered({"weight": weight, "turned": turned, "step": torch.tensor(3.0)}, keep=True, own=True)
    held.begin(tmp_path, 3, {"model": copies}, state, ONE)
    weight.fill_(-1)
    assert disk.waits.wait(SECONDS)
    assert [path.name for path in tmp_path.iterdir()] == [".step-000003.tmp"], "not one before it is verified"
    held.look()
    disk.go.set()
    held.join()
    found = restore_checkpoint(tmp_path)
    assert found is not None
    tensors = found.tensors("model")
    assert torch.equal(tensors["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors["turned"], torch.arange(6.0).reshape(2, 3).T)
    held.close()


def test_steps_go_on_while_a_disk_is_slow(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 2 is not whole before step 3 is done, the next waits for it, and the bits are the same."""
    quiet = train(configure(out=str(tmp_path / "quiet"), save_every=100), student_info, [], Silent())
    disk, real, calls = SlowDisk(monkeypatch), loop.run_step, []

    def step(*args: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        figures = real(*args, **options)
        if calls[-1] == 3:
            assert disk.waits.wait(SECONDS)
            assert saved(configure().out) == [".step-000002.tmp"]
            disk.go.set()
        return figures

    monkeypatch.setattr(loop, "run_step", step)
    summary = train(configure(save_every=2, keep=9), student_info, [], Silent())
    assert saved(configure().out) == ["step-000002", "step-000004", "step-000005"]
    assert all(name.startswith("saver") for name in disk.threads), disk.threads
    ours, theirs = (load_file(Path(one["model"]) / "model.safetensors") for one in (summary, quiet))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize("at", [2, 5], ids=["on-the-way", "at-the-end"])
def test_a_disk_that_fails_behind_the_steps_ends_the_run(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """By its own sentence, with the last whole checkpoint left, from which the same command goes on."""
    real = checkpoint._write

    def write(folder: Path, step: int, *args: Any) -> None:
        if step == at:
            raise OSError(errno.EIO, "Input/output error")
        real(folder, step, *args)

    monkeypatch.setattr(checkpoint, "_write", write)
    config = configure(save_every=1)
    with pytest.raises(XtokenError, match=rf"step-00000{at} could not be written .*earlier checkpoints stay"):
        train(config, student_info, [], Silent())
    assert f"step-00000{at - 1}" in saved(config.out)
    assert not Path(config.out, "summary.json").exists()
    monkeypatch.setattr(checkpoint, "_write", real)
    assert train(config, student_info, [], Silent())["steps"] == 5


def test_what_ends_a_run_lets_its_checkpoint_become_whole(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, real, calls = SlowDisk(monkeypatch), loop.run_step, []

    def step(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            assert disk.waits.wait(SECONDS)
            threading.Timer(0.2, disk.go.set).start()
            raise ZeroDivisionError
        return real(*args, **options)

    monkeypatch.setattr(loop, "run_step", step)
    with pytest.raises(ZeroDivisionError):
        train(configure(save_every=2), student_info, [], Silent())
    assert saved(configure().out) == ["step-000002"]


def test_an_error_of_the_disk_does_not_hide_what_ended_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", refuse)
    held = Saver()
    held.begin(tmp_path, 1, {"model": {}}, {}, ONE)
    with caplog.at_level(logging.WARNING, "xtoken"):
        held.close()
    assert "step-000001 could not be written" in caplog.text


def test_without_room_for_a_copy_the_run_waits(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied, and each checkpoint is whole before the next step."""
    monkeypatch.setattr(saver, "free_memory", lambda: 1000)
    monkeypatch.setattr("xtoken.trainer.start.gathered", lambda *_, **__: 1 / 0)
    real, whole = loop.run_step, list[list[str]]()

    def step(*args: Any, **options: Any) -> Any:
        whole.append(saved(configure().out))
        return real(*args, **options)

    monkeypatch.setattr(loop, "run_step", step)
    train(configure(save_every=2), student_info, [], Silent())
    assert whole == [[], [], ["step-000002"], ["step-000002"], ["step-000002", "step-000004"]]


def test_room_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"model": {"a": torch.zeros(10), "b": torch.zeros(5, dtype=torch.int64)}, "optimizer": {}}
    for free, fits in ((160, True), (159, False), (None, True)):
        monkeypatch.setattr(saver, "free_memory", lambda free=free: free)
        assert room_to_copy(tensors) is fits


def test_copies_share_no_memory() -> None:
    weight = torch.zeros(3, 2)
    copies = gathered({"a": weight, "b": weight, "c": weight.T}, keep=True, own=True)
    places = {one.data_ptr() for one in (weight, *copies.values())}
    assert len(places) == 4
    assert gathered({"a": weight}, keep=True)["a"].data_ptr() == weight.data_ptr(), "a model that is saved needs none"
    assert gathered({"a": weight}, keep=False, own=True) == {}


class TestSaveEvery:
    """``--save-every`` counts steps or time."""

    def test_steps(self) -> None:
        options = CheckpointGroup(save_every=3)
        assert [step for step in range(1, 10) if options.due(step, 1e9)] == [3, 6, 9]

    def test_time(self) -> None:
        """And a step whose checkpoint is to stay for good is saved whatever the time."""
        options = CheckpointGroup(save_every="10m", keep_every=4)
        assert [options.due(1, seconds) for seconds in (0, 599, 600, 601)] == [False, False, True, True]
        assert [step for step in range(1, 10) if options.due(step, 0)] == [4, 8]

    @pytest.mark.parametrize(
        ("given", "value", "seconds"),
        [("50", 50, None), (7, 7, None), ("90s", "90s", 90), ("10m", "10m", 600), ("2h", "2h", 7200)],
    )
    def test_words(self, given: Any, value: Any, seconds: int | None) -> None:
        config = build(TrainConfig, {"targets": "t", "student": "s", "out": "o", "save_every": given})
        assert (config.checkpoint.save_every, config.checkpoint.save_seconds) == (value, seconds)
        assert TrainConfig.from_flat(**config.record()) == config
        words = words_of(config)
        assert words[-2:] == ["--save-every", str(value)] if value != 50 else "--save-every" not in words

    @pytest.mark.parametrize("given", ["10 minutes", "1.5h", "0s", "m", "-3", "0", 0])
    def test_other_words_are_refused(self, given: Any) -> None:
        with pytest.raises(ValidationError, match=r"write 50, 90s, 10m or 2h|give at least 1, or a time such as 10m"):
            CheckpointGroup(save_every=given)

    def test_a_run_by_the_clock(
        self, configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where every step takes twenty seconds, one in three is followed by a checkpoint; the last one always is."""
        now, real = [0.0], loop.run_step

        def step(*args: Any, **options: Any) -> Any:
            now[0] += 20
            return real(*args, **options)

        monkeypatch.setattr(loop, "run_step", step)
        monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
        train(configure(save_every="1m", keep=9, steps=8), student_info, [], Silent())
        assert saved(configure().out) == ["step-000003", "step-000006", "step-000008"]
