"""One trainer per folder: the second is refused by name, and a lock dies with its holder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer import lock, loop
from xtoken.trainer.lock import LOCK, only_trainer
from xtoken.trainer.loop import train

HOLD = """
import sys
from pathlib import Path
from xtoken.trainer.lock import only_trainer
with only_trainer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def configure(make_targets: Callable[..., str], student_dir: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    base = {"targets": [make_targets([[9, 12, 5]])], "student": student_dir, "out": str(tmp_path / "run")}
    sizes = {"steps": 2, "step_tokens": 24, "micro_tokens": 14, "max_tokens": 32, "device": "cpu"}
    return lambda **options: TrainConfig.from_flat(**{**base, **sizes, **options})


def test_a_second_trainer_is_refused_and_a_killed_one_holds_nothing(
    configure: Callable[..., TrainConfig], student_info: Any
) -> None:
    """The holder is a process of its own; kill -9 lets the folder go at once."""
    config = configure()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, config.out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(XtokenError, match=rf"run is being trained in by process {holder.pid} on .*, since 20"):
            train(config, student_info, [], Silent())
        assert sorted(path.name for path in Path(config.out).iterdir()) == [LOCK]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert train(config, student_info, [], Silent())["steps"] == 2


def test_a_run_lets_go_at_its_end_however_it_ends(
    configure: Callable[..., TrainConfig], student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(), loop.run_step

    def within(*args: Any, **options: Any) -> Any:
        with pytest.raises(XtokenError, match=f"trained in by process {os.getpid()} on"):
            train(config, student_info, [], Silent())
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_step", within)
    with pytest.raises(KeyboardInterrupt):
        train(config, student_info, [], Silent())
    monkeypatch.setattr(loop, "run_step", real)
    assert train(config, student_info, [], Silent())["steps"] == 2
    assert Path(config.out, LOCK).read_text() == ""


def test_nothing_is_left_in_a_folder_that_is_no_run(
    configure: Callable[..., TrainConfig], student_info: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(XtokenError, match="exists and is not a training run"):
        train(configure(out=str(tmp_path / "mine")), student_info, [], Silent())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(XtokenError, match=r"--out .*thesis.tex/run cannot be written to \(Not a directory\)"):
        train(configure(out=str(tmp_path / "mine" / "thesis.tex" / "run")), student_info, [], Silent())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_signed_is_another_process(tmp_path: Path, text: str) -> None:
    with only_trainer(tmp_path):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(XtokenError, match="trained in by another process; wait for it"), only_trainer(tmp_path):
            pass


def test_a_disk_without_locks_is_said(
    configure: Callable[..., TrainConfig],
    student_info: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def without(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    summary = train(configure(), student_info, [], Silent())
    (note,) = summary["notes"]
    assert note in caplog.text
    assert note.endswith("has no locks (No locks available): nothing keeps a second trainer out of this folder")


def test_other_errors_of_the_disk_are_not_taken_for_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), only_trainer(tmp_path):
        pass
