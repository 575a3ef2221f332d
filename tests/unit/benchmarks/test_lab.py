"""The lab's plan, and how it tells a difference from chance."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.benchmarks.lab import texts
from xtoken.benchmarks.lab.compare import Difference, difference
from xtoken.benchmarks.lab.plan import Plan
from xtoken.benchmarks.lab.results import compact, restore
from xtoken.benchmarks.lab.work import Lab

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


KINDS = (*texts.JUDGE, *texts.OTHER)


@pytest.fixture
def lab(tmp_path: Path) -> Callable[[str, str], Lab]:
    """``lab(name, text)``: one document of each kind, and nothing run yet."""

    def made(name: str, text: str) -> Lab:
        (tmp_path / name / "texts").mkdir(parents=True)
        rows = [json.dumps({"id": f"{kind}/one", "text": text}) for kind in KINDS]
        (tmp_path / name / "texts" / "judge.jsonl").write_text("\n".join(rows) + "\n")
        (tmp_path / name / "figures").mkdir()
        return Lab(Plan.read(), tmp_path / name, threads=1)

    return made


def keep(lab: Lab, experiment: str, setting: str, rate: float, bits: float) -> str:
    """Figures of one run of an experiment; its name."""
    run = next(
        run
        for run in lab.plan.runs(experiment)
        if (run.setting, run.rate) in ((setting, rate), (setting, None)) and run.seed == 0
    )
    name = lab.name(run)
    documents = {f"{kind}/one#0": [bits, 8] for kind in KINDS}
    figures = {key: getattr(run, key) for key in ("experiment", "setting", "variant", "seed", "steps")}
    lab.keep(name, {"run": name, **figures, "rate": lab.rate(run), "minutes": 1.0, "documents": documents})
    return name


def test_runs_of_the_committed_results_are_not_run_again(lab: Any, tmp_path: Path) -> None:
    """But for those of which a claim needs more than the results hold."""
    first = lab("first", "eight ch")
    for setting in ("ce", "gold alone"):
        for rate in (1e-3, 2e-3, 4e-3):
            keep(first, "rates", setting, rate, bits=20.0 + rate)
    measured = keep(first, "uncommon", "ce", 1e-3, bits=19.123)
    without = keep(first, "uncommon", "gold alone", 1e-3, bits=21.0)
    assert first.asked(measured) == first.asked(without) == {"numerals"}
    first.keep(measured, {step: {"docs/one": [3.25, 2], "tables/one": [0.0, 0]} for step in ("80", "750")}, "numerals")
    (tmp_path / "lab.json").write_text(json.dumps(compact(first)))

    second = lab("second", "eight ch")
    assert restore(second, tmp_path / "lab.json") == 7
    found = {run["run"]: run for run in compact(second)["runs"]}
    assert found == {run["run"]: run for run in compact(first)["runs"] if run["run"] != without}
    assert found[measured]["bits"] == [19.12] * len(KINDS)
    assert found[measured]["numerals"] == {"80": [3.25, 0.0], "750": [3.25, 0.0]}
    assert restore(second, tmp_path / "lab.json") == 0

    with pytest.raises(SystemExit, match="judged by other documents"):
        restore(lab("third", "nine char"), tmp_path / "lab.json")


def test_a_run_keeps_its_checkpoints_for_any_experiment_that_shares_it() -> None:
    plan = Plan.read()
    kept = {(run.setting, run.seed) for run in plan.runs("mixing") if plan.checkpoints(run)}
    assert kept == {("ce", 0), ("ce", 1), ("ce", 2), ("p-kl alone", 0), ("gold alone", 0), ("byte-prefix alone", 0)}
    assert not any(plan.checkpoints(run) for run in plan.runs("rates"))
