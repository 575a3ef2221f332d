"""Reading ahead: the same batches for any number of threads and ranks, bounded, and its errors are heard."""

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from xtoken.schemas.errors import VerificationError
from xtoken.trainer.data import plan as plans
from xtoken.trainer.data.batches import STEPS_AHEAD, Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.data.plan import Position
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import RowGroup, Targets
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.ragged import Columns

LENGTHS = [[9, 12, 5, 7, 11, 6], [6, 8, 10], [13, 4, 9, 9, 3, 7, 8], [5] * 6]
TOTAL = sum(map(len, LENGTHS))
STEPS = 20
DEADLINE = 120.0
OTHERS: set[threading.Thread] = set()


class Reads(Loss):
    """A loss of P-KL's columns."""

    columns = Columns.of("p-kl")

    def terms(self, view: View) -> Any:
        raise NotImplementedError


LAYOUT = Layout(0, 16, 24, (Reads(),))


@pytest.fixture
def root(make_targets: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(plans, "WINDOW_SAMPLES", 5)
    return make_targets(LENGTHS)


def open_loader(root: str, **options: Any) -> Loader:
    return Loader(Sources([Targets(root)]), LAYOUT, **({"step_tokens": 36, "micro_tokens": 32, "seed": 4} | options))


def steps_of(root: str, steps: int, **options: Any) -> list[StepBatch]:
    with open_loader(root, **options) as loader:
        return [loader.step() for _ in range(steps)]


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit, dtypes included."""
    if isinstance(ours, np.ndarray):
        return bool(ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes())
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if type(ours).__module__.startswith("xtoken.trainer.data") and not isinstance(ours, Position):
        return all(same(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours))
    return bool(ours == theirs)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_resume_anywhere_with_any_threads(root: str, packing: bool, streams: int) -> None:
    """In the middle of an epoch and across its end, from the positions that the step before left."""
    options = {"streams": streams, "mine": tuple(range(streams)), "packing": packing}
    whole = steps_of(root, STEPS, **options)
    assert min(position.epoch for position in whole[-1].positions) >= 2
    assert same(steps_of(root, STEPS, threads=3, **options), whole)
    ends = {at for at in range(1, STEPS) if whole[at].positions[0].epoch != whole[at - 1].positions[0].epoch}
    for done in sorted({1, 2, *ends, *(end - 1 for end in ends)} - {0}):
        threads = 1 + 2 * (done % 2)
        again = steps_of(root, 4, threads=threads, positions=whole[done - 1].positions, **options)
        assert same(again[: STEPS - done], whole[done : done + 4]), done


def test_a_url_is_read_by_several_threads(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(root, "/ahead-targets", recursive=True)
    try:
        assert same(steps_of("memory://ahead-targets", STEPS, threads=3), steps_of(root, STEPS))
    finally:
        memory.rm("/ahead-targets", recursive=True)


def test_the_comparison_sees_a_difference(root: str) -> None:
    first, second = steps_of(root, 2)
    assert same(first, first)
    assert not same(first, second)


def test_ranks_read_their_streams_only(root: str) -> None:
    """Two ranks with two streams of four each make the steps of one rank with four."""
    options = {"streams": 4, "step_tokens": 60}
    whole = steps_of(root, 8, mine=(0, 1, 2, 3), **options)
    low, high = (steps_of(root, 8, mine=mine, **options) for mine in ((0, 1), (2, 3)))
    for all_of_it, first, second in zip(whole, low, high, strict=True):
        assert same(all_of_it.micros, first.micros + second.micros)
        assert all_of_it.positions == first.positions + second.positions
        assert all_of_it.predicted == first.predicted + second.predicted


@pytest.mark.parametrize("streams", [2, 3])
def test_streams_take_every_sample_once_an_epoch(root: str, streams: int) -> None:
    first_epoch: list[str] = []
    for stream in range(streams):
        for step in steps_of(root, TOTAL, streams=streams, mine=(stream,), step_tokens=1):
            first_epoch += step.sample_ids if step.positions[0].epoch == 0 else []
    assert len(set(first_epoch)) == len(first_epoch) == TOTAL


def test_positions_are_those_of_the_last_step(root: str) -> None:
    with open_loader(root, threads=2) as loader:
        assert loader.positions == (Position(),)
        first = loader.step()
        assert loader.positions == first.positions
        assert first.padded == sum(micro.input_BL.size for micro in first.micros) >= first.predicted


class Spy:
    """Counts what is decoded, and can hold it up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()
        plain = Targets.read

        def read(targets: Targets, ref: Any, columns: tuple[str, ...]) -> RowGroup:
            self.read.append((ref.part, ref.group))
            self.begun.set()
            assert self.go.wait(DEADLINE)
            return plain(targets, ref, columns)

        monkeypatch.setattr(Targets, "read", read)


@pytest.fixture
def spy(root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found = Spy(monkeypatch)
    yield found
    found.go.set()


@pytest.fixture(autouse=True)
def _threads_of_others() -> None:
    """Loaders that other tests left to the garbage collector may still have theirs."""
    OTHERS.clear()
    OTHERS.update(loader_threads())


def loader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("loader")} - OTHERS


def wait_for_no_threads() -> None:
    limit = time.monotonic() + DEADLINE
    while loader_threads():
        assert time.monotonic() < limit, loader_threads()
        time.sleep(0.01)


def test_little_is_read_ahead(make_targets: Callable[..., str], spy: Spy) -> None:
    """One window and a few row groups more, however many there are."""
    root = make_targets([[6] * 12] * 8, name="many")
    with open_loader(root, step_tokens=12, threads=2) as loader:
        loader.step()
    window = -(-plans.WINDOW_SAMPLES // 2)
    in_hand = 2 * (STEPS_AHEAD + 1)  # samples of steps begun: they may reach into the next window
    assert window <= len(spy.read) <= 2 * window + in_hand < 8 * 6


def test_resume_decodes_nothing_that_was_used(make_targets: Callable[..., str], spy: Spy) -> None:
    root = make_targets([[6] * 12] * 4, name="many")
    plan = plans.Plan(Sources([Targets(root)]), 4)
    windows = plan.epoch_windows(0, 0)
    used = {(unit.ref.part, unit.ref.group) for window in windows[:5] for unit in window.units}
    with open_loader(root, positions=[Position(0, windows[5].before + 1)]) as loader:
        loader.step()
    assert used
    assert used.isdisjoint(spy.read)


def test_an_error_of_a_thread_is_raised_by_step(root: str) -> None:
    with open_loader(root, threads=3) as loader:
        Path(root, "data", "part-00002.parquet").write_bytes(b"PAR1 nothing of it left")
        for _ in range(2):
            with pytest.raises(VerificationError, match=r"part-00002\.parquet"):
                _ = [loader.step() for _ in range(TOTAL)]
    wait_for_no_threads()


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_interrupt_reaches_a_waiting_caller(root: str, spy: Spy) -> None:
    spy.go.clear()
    with open_loader(root) as loader:
        interrupter = threading.Thread(target=lambda: spy.begun.wait(DEADLINE) and _thread.interrupt_main())
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            loader.step()
        interrupter.join(DEADLINE)
        spy.go.set()
    wait_for_no_threads()


def test_close_ends_what_runs(root: str, spy: Spy) -> None:
    loader = open_loader(root, threads=3)
    loader.step()
    loader.close()
    read = len(spy.read)
    wait_for_no_threads()
    assert len(spy.read) == read
    loader.close()


def test_nothing_is_read_before_the_first_step(root: str, spy: Spy) -> None:
    open_loader(root).close()
    assert spy.read == []


def test_a_stream_goes_on_where_a_share_would_predict_nothing(make_targets: Callable[..., str]) -> None:
    """Without a context token a sample of one token predicts nothing, so the share takes a second."""
    root = make_targets([[1, 1, 1, 1, 4]], name="short")
    bare = Layout(None, 16, 24, (Reads(),))
    with Loader(Sources([Targets(root)]), bare, step_tokens=1, micro_tokens=8, seed=0) as loader:
        found: list[Micro] = [micro for _ in range(6) for micro in loader.step().micros]
    assert all(len(micro.label_P) == 3 for micro in found)
