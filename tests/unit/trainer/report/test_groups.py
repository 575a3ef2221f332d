"""Which runs belong together and what they are called."""

import math
from pathlib import Path

import pytest
from report_runs import write_run

from xtoken.trainer.report.groups import Group, Spread, baseline, comparable, differences, group_runs, shortened, spread
from xtoken.trainer.report.run_folder import read_run


def groups(folder: Path, *runs: dict[str, object]) -> list[Group]:
    """Groups of runs of one step."""
    roots = [write_run(folder / str(at), **{"steps": 1, "held_out": False, **run}) for at, run in enumerate(runs)]
    return group_runs([read_run(root) for root in roots])


def test_runs_that_differ_in_their_seed_only_are_one_group(tmp_path: Path) -> None:
    found = groups(tmp_path, {"seed": 2}, {"loss": "ce", "seed": 0}, {"seed": 0})
    assert [group.label for group in found] == ["p-kl", "ce"]
    assert [run.seed for run in found[0].runs] == [0, 2]
    assert baseline(found).label == "ce"
    assert baseline(found[:1]).label == "p-kl"


def test_labels_say_what_tells_groups_apart(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        {"lr": 1e-4, "student": "models/small"},
        {"lr": 2e-4, "student": "models/small"},
        {"lr": 1e-4, "student": "models/large"},
        {"mix": "dynamic"},
        {"loss": "ce", "mix": "dynamic"},
    )
    labels = [group.label for group in found]
    assert labels[:3] == [
        "p-kl, lr 0.0001, student small",
        "p-kl, lr 0.0002, student small",
        "p-kl, lr 0.0001, student large",
    ]
    assert labels[3:] == ["p-kl, dynamic", "ce"]


def test_labels_are_unique_and_short_whatever_they_hold(tmp_path: Path) -> None:
    long = "x" * 200
    found = groups(tmp_path, {"student": f"{long}a"}, {"student": f"{long}b"}, {"student": "$\\frac{<b>"})
    labels = [group.label for group in found]
    assert len(set(labels)) == 3
    assert max(map(len, labels)) <= 66


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    found = differences(groups(tmp_path, {"seed": 0}, {"seed": 1}, {"loss": "ce", "targets_hash": ["ab" * 32]}))
    assert found == {"loss": ["p-kl", "ce"], "targets_hash": ["01234567", "abababab"]}


def test_values_on_one_line() -> None:
    assert [shortened(value) for value in (None, True, [], ["a", "b"], 5e-5, 7, {"b": 1, "a": 2})] == [
        "none", "yes", "none", "a, b", "5e-05", "7", '{"a": 2, "b": 1}',
    ]  # fmt: skip
    assert len(shortened("y" * 99)) == 60


def test_mean_and_deviation_over_seeds() -> None:
    assert spread([]) is None
    assert spread([2.0]) == Spread(2.0, None, 1)
    assert spread([0.1, 0.1, 0.1]) == Spread(0.1, 0.0, 3)
    found = spread([1.0, 2.0, 3.0])
    assert found == Spread(2.0, 1.0, 3)
    broken = spread([1.0, math.nan])
    assert broken is not None
    assert math.isnan(broken.mean)


@pytest.mark.parametrize("same", [True, False])
def test_figures_of_another_text_do_not_compare(tmp_path: Path, same: bool) -> None:
    ours, theirs = (write_run(tmp_path / loss, loss, steps=2) for loss in ("p-kl", "ce"))
    if not same:
        for name in ("metrics.jsonl", "summary.json"):
            file = Path(theirs) / name
            file.write_text(file.read_text().replace('"bytes": 400000.0', '"bytes": 399999.0'))
    a, b = group_runs([read_run(ours), read_run(theirs)])
    assert comparable(a, b, "bits_per_byte") is same
    assert comparable(a, b, "kl")
