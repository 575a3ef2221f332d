"""Paired tests, against values worked out by hand or by another road."""

import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import write_lines, write_run

from xtoken.trainer.report.groups import group_runs
from xtoken.trainer.report.paired import compare, holm, over_documents, over_seeds, paired
from xtoken.trainer.report.run_folder import read_run


def test_the_t_test_and_its_interval_by_hand() -> None:
    found = paired(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.1, 2.3, 3.1, 4.5]))
    assert found is not None
    # -.1 -.3 -.1 -.5: mean -.25, sd .1915, so t = -2.611 at 3 degrees of freedom, whose 97.5 % point is 3.182
    half = 3.1824463 * math.sqrt(0.11 / 3) / 2
    assert (found.n, found.difference) == (4, pytest.approx(-0.25))
    assert (found.low, found.high) == (pytest.approx(-0.25 - half), pytest.approx(-0.25 + half))
    assert found.p_t == pytest.approx(0.0796, abs=2e-4)
    assert found.p_wilcoxon == pytest.approx(0.125), "all four have one sign: 2 of 16 orders"


def test_no_spread_leaves_nothing_to_test() -> None:
    same = paired(np.ones(5), np.ones(5))
    assert same is not None
    assert (same.difference, same.p_t, same.p_wilcoxon) == (0.0, 1.0, 1.0)
    shifted = paired(np.full(5, 2.0), np.ones(5))
    assert shifted is not None
    assert math.isnan(shifted.p_t)
    assert shifted.low == shifted.high == 1.0
    assert paired(np.ones(1), np.zeros(1)) is None
    assert paired(np.array([1.0, math.nan, 2.0]), np.array([0.0, 0.0, math.inf])) is None


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([math.nan, 0.02])
    assert math.isnan(found[0])
    assert found[1] == 0.02
    assert holm([]) == []


def test_documents_are_paired_by_name_and_size(tmp_path: Path) -> None:
    def write(name: str, loss: str, seed: int, bits: dict[str, tuple[float, int]]) -> str:
        root = write_run(tmp_path / name, loss, seed, steps=2, held_out=False)
        lines = [{"when": "after", "id": k, "source": "", "bits": b, "bytes": n} for k, (b, n) in bits.items()]
        write_lines(Path(root) / "held-out.jsonl", lines)
        return root

    runs = [
        write("a0", "p-kl", 0, {"x": (100, 100), "y": (220, 100), "z": (50, 100), "other": (1, 7)}),
        write("a1", "p-kl", 1, {"z": (70, 100), "x": (140, 100), "y": (220, 100)}),
        write("b0", "ce", 0, {"y": (240, 100), "x": (150, 100), "z": (60, 101), "empty": (3, 0)}),
    ]
    ours, base = group_runs([read_run(root) for root in runs])
    found = over_documents(ours, base)
    assert found is not None
    assert found.n == 2, "z has another number of bytes"
    assert found.difference == pytest.approx(((1.2 - 1.5) + (2.2 - 2.4)) / 2)
    assert over_seeds(ours, base, "bits_per_byte") is None


def test_seeds_are_paired_and_p_values_corrected(tmp_path: Path) -> None:
    roots = [
        write_run(tmp_path / f"{loss}-{seed}", loss, seed, steps=2, documents=8)
        for loss, seeds in (("p-kl", (0, 1, 5)), ("alm", (0, 1)), ("ce", (1, 0, 7)))
        for seed in seeds
    ]
    groups = group_runs([read_run(root) for root in roots])
    base = groups[-1]
    seeds = over_seeds(groups[0], base, "bits_per_byte")
    assert seeds is not None
    assert seeds.n == 2
    tests = compare(groups, base, over_documents)
    assert list(tests) == ["p-kl", "alm"]
    assert sorted(one.holm_t for one in tests.values()) == pytest.approx(
        holm(sorted(one.p_t for one in tests.values()))
    )
    assert all(one.holm_t >= one.p_t for one in tests.values())
