"""The rate of an engine that is kept busy, from when its samples were there."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.capture.estimate import pilot
from xtoken.pipeline.capture.estimate.pipelined import STEPS, WARM_STEPS, busy_rate, rate_when_warm, repeated
from xtoken.pipeline.teachers import open_teacher
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

STEP, SECONDS = 1000, 0.25
SECOND_OF_A_STEP = 0.02


def packed(sample: int, start_up: float = 0.0, late: int = 0) -> list[tuple[float, int]]:
    """What an engine gives that takes a quarter of a second for 1,000 tokens: samples of a step come together.

    A sample comes with the step that ends it; the first step takes longer, and every step comes ``late`` steps later.
    """
    found = []
    for number in range(STEPS * STEP // sample):
        step = -(-(number + 1) * sample // STEP)
        found.append((start_up + (step + late) * SECONDS, sample))
    return found


@pytest.mark.parametrize("start_up", [0.0, 30.0])
@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("sample", [10, 50, 250, 1000])
def test_start_up_and_latency_are_not_counted(sample: int, late: int, start_up: float) -> None:
    assert rate_when_warm(packed(sample, start_up, late), WARM_STEPS * STEP) == pytest.approx(STEP / SECONDS)


@pytest.mark.parametrize("sample", [130, 333, 700])
def test_samples_that_do_not_fill_steps_cost_a_twentieth_at_most(sample: int) -> None:
    assert rate_when_warm(packed(sample, 5.0), WARM_STEPS * STEP) == pytest.approx(STEP / SECONDS, rel=0.06)


def test_by_hand() -> None:
    times = [(1.0, 60), (1.0, 40), (2.0, 100), (4.0, 100), (6.0, 100)]
    assert rate_when_warm(times, 200) == 200 / 4
    assert rate_when_warm(times, 199) == 300 / 5
    assert rate_when_warm(times, 0) == (400 - 60) / 5, "where no sample is small enough, the first"


def test_pieces_are_repeated_until_there_is_enough() -> None:
    pieces: list[Any] = [type("Piece", (), {"ids": np.zeros(size)}) for size in (3, 5)]
    assert [len(one.ids) for one in repeated(pieces, 9)] == [3, 5, 3]
    assert [len(one.ids) for one in repeated(pieces, 2)] == [3]
    assert sum(len(one.ids) for one in repeated(pieces, 1000)) >= 1000


def on_a_gpu(steps: list[int]) -> Any:
    """``open_teacher`` of a machine whose engine takes its time, whatever is in a step."""

    def opened(*arguments: Any) -> Any:
        teacher: Any = open_teacher(*arguments)
        teacher.info = teacher.info.model_copy(update={"device": "NVIDIA H200"})
        first = teacher.rows

        def rows(batch: Any) -> Any:
            steps.append(sum(map(len, batch)))
            time.sleep(SECOND_OF_A_STEP)
            return first(batch)

        teacher.rows = rows
        return teacher

    return opened


@pytest.fixture
def config(tmp_path: Path) -> PrecomputeConfig:
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.txt"), teacher="bytes", backend="fake", k=4, max_tokens=100, batch_tokens=400,
        pilot=True, dry_run=True, out=str(tmp_path),
    )  # fmt: skip


def test_the_pilot_of_a_gpu_is_of_many_steps(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(pilot, "open_teacher", on_a_gpu(steps))
    found = pilot.take_pilot(config, 500, Silent())
    full = [size for size in steps if size >= 300]
    assert len(full) >= STEPS
    assert found.tokens < 1000, "what sizes are foretold from stays as it was"
    assert 0.02 * 400 / SECOND_OF_A_STEP < found.rate < 1.1 * 400 / SECOND_OF_A_STEP


def test_on_a_cpu_the_pilot_is_all(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "busy_rate", None)
    assert pilot.take_pilot(config, 500, Silent()).rate > 0


def test_an_engine_that_raises_ends_the_pilot(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(batch: Any) -> Any:
        raise XtokenError("out of memory")

    def measured(worker: Any, pieces: Any) -> float:
        worker.teacher.rows = broken
        return busy_rate(worker, pieces)

    monkeypatch.setattr(pilot, "open_teacher", on_a_gpu([]))
    monkeypatch.setattr(pilot, "busy_rate", measured)
    with pytest.raises(XtokenError, match="out of memory"):
        pilot.take_pilot(config, 500, Silent())
