"""Workers that cannot open: who is tried again, who is given up, and what ends the run."""

import pytest

from xtoken.pipeline.executors.leases import ATTEMPTS
from xtoken.pipeline.executors.open_failures import Openings
from xtoken.pipeline.store.files import DiskFull
from xtoken.schemas.errors import Unreachable, XtokenError


def test_the_first_error_ends_a_run_that_nobody_can_open_once_all_have_failed() -> None:
    openings = Openings()
    for slot, loading in ((3, 2), (1, 1)):
        assert "cannot open: no memory" in openings.broken(slot, XtokenError(f"no memory on {slot}"), loading)
    assert openings.usable([1, 3], workers=1) == [], "they wait for those that are loading"
    with pytest.raises(XtokenError, match=r"^no memory on 3$"):
        openings.broken(2, XtokenError("another"), 0)


def test_one_that_opens_saves_the_run_and_the_others_are_tried_again() -> None:
    openings = Openings()
    openings.broken(0, XtokenError("taken"), 1)
    openings.opened(1)
    for _ in range(ATTEMPTS - 1):
        assert openings.usable([0, 2], workers=1) == [0, 2]
        what = openings.broken(0, XtokenError("taken"), 0, "node-7")
    assert what.startswith("a worker on node-7 cannot open: taken")
    assert openings.usable([0, 2], workers=1) == [2]


def test_failures_count_in_a_row() -> None:
    openings = Openings()
    openings.opened(0)
    for _ in range(3 * ATTEMPTS):
        openings.broken(0, XtokenError("a download was cut"), 0)
        openings.opened(0)
    assert openings.usable([0], workers=0) == [0]


def test_the_run_ends_where_nobody_is_left() -> None:
    openings = Openings()
    openings.opened(0)
    for _ in range(ATTEMPTS):
        openings.died(0, "signal 9")
    assert openings.usable([], workers=0) == []
    assert openings.usable([0], workers=1) == [], "another one is at work"
    with pytest.raises(XtokenError, match=r"no worker is left.*the last: signal 9 while loading$"):
        openings.usable([0], workers=0)


def test_deaths_before_anybody_opened_are_tried_three_times_in_all() -> None:
    openings = Openings()
    for slot in range(ATTEMPTS - 1):
        openings.died(slot, "signal 9")
        assert openings.usable([slot], workers=0) == [slot]
    with pytest.raises(XtokenError, match="signal 9 while loading, 3 times in a row; is there enough memory"):
        openings.died(7, "signal 9")


def test_what_would_befall_every_worker_ends_the_run_at_once() -> None:
    openings = Openings()
    openings.opened(0)
    with pytest.raises(DiskFull):
        openings.broken(1, DiskFull("no room"), 5)


def test_an_outage_costs_no_slot() -> None:
    openings = Openings()
    openings.opened(1)
    for _ in range(3 * ATTEMPTS):
        openings.broken(0, Unreachable("503"), 0)
    assert openings.usable([0], workers=1) == [0]
