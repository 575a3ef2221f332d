"""Who reads what: streams partition every epoch, whatever the sizes, and windows go on anywhere."""

from collections.abc import Callable

import pytest

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data import plan as plans
from xtoken.trainer.data.plan import Plan, Position
from xtoken.trainer.data.sources import OwnedGroup, Sources
from xtoken.trainer.data.targets import Targets

LENGTHS = [[5] * 9, [4] * 2, [6] * 7, [3], [8] * 12, [5] * 4]
TOTAL = sum(map(len, LENGTHS))


@pytest.fixture
def sources(make_targets: Callable[..., str]) -> Sources:
    return Sources([Targets(make_targets(LENGTHS))])


def rows(units: list[OwnedGroup]) -> list[tuple[int, int, int]]:
    return [(unit.ref.part, unit.ref.group, row) for unit in units for row in unit.rows.tolist()]


@pytest.mark.parametrize("streams", [1, 2, 3, 5, TOTAL])
def test_streams_partition_every_epoch(sources: Sources, streams: int) -> None:
    plan = Plan(sources, 7, streams)
    every = {(group.ref.part, group.ref.group, row) for group in sources.groups for row in group.rows.tolist()}
    orders = []
    for epoch in range(3):
        dealt = [rows(units) for units in plan.units(epoch)]
        assert sorted(row for one in dealt for row in one) == sorted(every)
        assert all(dealt)
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 2, "row groups have two rows, slices fewer"
        orders.append(dealt)
    assert orders[0] != orders[1]
    assert orders[0] == [rows(units) for units in Plan(sources, 7, streams).units(0)]


def test_the_same_rows_whatever_other_streams_do(sources: Sources) -> None:
    """A stream's windows are found without looking at the others'."""
    plan = Plan(sources, 1, 3)
    for stream in range(3):
        windows = plan.epoch_windows(stream, 4)
        assert [unit for window in windows for unit in rows(list(window.units))] == rows(plan.units(4)[stream])
        assert {window.share for window in windows} == {sum(window.samples for window in windows)}


def test_more_streams_than_samples(sources: Sources) -> None:
    with pytest.raises(XtokenError, match=f"{TOTAL} samples cannot be dealt to {TOTAL + 1} streams; lower --streams"):
        Plan(sources, 0, TOTAL + 1)


def test_a_read_keeps_to_few_parts_at_a_time(make_targets: Callable[..., str]) -> None:
    plan = Plan(Sources([Targets(make_targets([[4] * 8] * 12))]), 3)
    (units,) = plan.units(0)
    parts = [unit.ref.part for unit in units]
    runs = [parts[low : low + 4 * plans.RUN_PARTS] for low in range(0, len(parts), 4 * plans.RUN_PARTS)]
    assert [len(set(run)) for run in runs] == [plans.RUN_PARTS] * 3
    assert any(run != sorted(run, key=run.index) for run in runs), "row groups of a run are mixed"


def test_windows_go_on_from_any_position(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WINDOW_SAMPLES", 5)
    plan = Plan(sources, 2, 2)
    whole = [window for epoch in range(3) for window in plan.epoch_windows(1, epoch)]
    share = whole[0].share
    for taken in range(share + 1):
        found = plan.windows(1, Position(0, taken))
        first = next(found)
        expected = [w for w in whole if w.epoch or w.before + w.samples > taken]
        assert (first.epoch, first.before, rows(list(first.units))) == (
            expected[0].epoch,
            expected[0].before,
            rows(list(expected[0].units)),
        )
        assert next(found).number == expected[1].number


def test_long_samples_make_short_windows(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WINDOW_TOKENS", 20)
    plan = Plan(sources, 2)
    windows = plan.epoch_windows(0, 0)
    assert len(windows) > 4
    for window in windows:
        assert sum(sources.tokens(unit) for unit in window.units[:-1]) < 20
