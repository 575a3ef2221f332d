"""The lab's plan, and how it tells a difference from chance."""

import numpy as np
import pytest

from xtoken.benchmarks.lab.compare import Difference, difference
from xtoken.benchmarks.lab.plan import Plan

TEST = {"resamples": 2000, "level": 0.95, "seed": 0}


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says() -> None:
    """Over 200 draws of documents and seeds whose true difference is known."""
    draw, inside = np.random.default_rng(0), 0
    kind_D = np.repeat([0, 1], 30)
    for turn in range(200):
        size_D = draw.integers(500, 1500, 60).astype(float)
        per_byte_SD = -0.05 + 0.02 * draw.standard_normal((1, 60)) + 0.004 * draw.standard_normal((3, 1))
        theirs_SD = 2 * size_D + 50 * draw.standard_normal((3, 60))
        found = difference(theirs_SD + per_byte_SD * size_D, theirs_SD, size_D, kind_D, **TEST | {"seed": turn})
        inside += found.low <= -0.05 <= found.high
    assert 0.85 <= inside / 200 <= 0.99  # three seeds are few: a bootstrap of them is a little narrow


def test_what_all_documents_share_has_no_spread() -> None:
    size_D = np.array([10.0, 20.0, 30.0])
    theirs_SD = np.array([[5.0, 9.0, 11.0]])
    found = difference(theirs_SD - 0.5 * size_D, theirs_SD, size_D, np.zeros(3, np.int64), **TEST)
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert (found.seeds, found.documents) == (1, 3)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (-0.3, -0.2, 0.1, "reproduced"),
        (-0.3, -0.05, 0.1, "too small to tell"),
        (-0.05, 0.2, 0.1, "not reproduced"),
        (-0.05, 0.005, -0.01, "reproduced"),  # not worse by .01
        (0.02, 0.03, -0.01, "not reproduced"),
    ],
)
def test_verdicts(low: float, high: float, margin: float, verdict: str) -> None:
    assert Difference((low + high) / 2, low, high, 3, 60).verdict(margin) == verdict


def test_the_plan_names_what_it_runs() -> None:
    plan = Plan.read()
    words = plan.words
    for name in plan.experiments:
        asked = words["experiments"][name]
        for run in plan.runs(name):
            assert run.setting in words["settings"], (name, run.setting)
            assert run.student in words["students"]
            assert not run.variant or run.variant in asked["variants"]
    labels = {name: {f"{run.setting} {run.variant}".strip() for run in plan.runs(name)} for name in plan.experiments}
    for claim in words["claims"]:
        assert plan.compared(claim) <= labels[claim["experiment"]], claim
    hours = sum(plan.minutes(name) for name in plan.experiments) / 60
    assert 10 < hours < 30
    assert plan.table().count("\n") == len(plan.experiments) + 3
