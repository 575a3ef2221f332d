"""Paired tests of two configurations: over held-out documents, and over seeds.

Shapes: D documents or seeds that both have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.report.groups import Group, comparable

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """A configuration minus the baseline.

    Attributes:
        n: pairs.
        difference: mean of the differences; below 0 the configuration has less.
        low, high: 95 % confidence interval of that mean, by Student's t.
        p_t, p_wilcoxon: of the paired t-test and Wilcoxon's signed-rank test, two-sided; NaN where all differences
            are the same, which leaves nothing to estimate a spread from.
        holm_t, holm_wilcoxon: the same after Holm's correction.
    """

    n: int
    difference: float
    low: float
    high: float
    p_t: float
    p_wilcoxon: float
    holm_t: float = math.nan
    holm_wilcoxon: float = math.nan


def over_documents(group: Group, base: Group) -> Paired | None:
    """Bits per byte of each held-out document that all runs measured, mean over seeds first.

    A name with another number of bytes is another document.
    """
    runs = (*group.runs, *base.runs)
    held = [run.documents for run in runs if run.documents]
    if not any(run.documents for run in group.runs) or not any(run.documents for run in base.runs):
        return None
    sizes = [{(name, size) for name, (_, size) in documents.items()} for documents in held]
    common = sorted(name for name, _ in set.intersection(*sizes))
    return paired(_of_documents(group, common), _of_documents(base, common))


def over_seeds(group: Group, base: Group, name: str) -> Paired | None:
    """A held-out figure after training, of the seeds that both configurations were run with; on one text only."""
    if not comparable(group, base, name):
        return None
    ours, theirs = _by_seed(group, name), _by_seed(base, name)
    common = sorted(ours.keys() & theirs.keys())
    return paired(np.array([ours[seed] for seed in common]), np.array([theirs[seed] for seed in common]))


def compare(groups: Sequence[Group], base: Group, test: Callable[[Group, Group], Paired | None]) -> dict[str, Paired]:
    """Label -> test of every other group against ``base``, corrected for their number."""
    tested = {group.label: test(group, base) for group in groups if group is not base}
    tests = {label: one for label, one in tested.items() if one is not None}
    t = holm([one.p_t for one in tests.values()])
    wilcoxon = holm([one.p_wilcoxon for one in tests.values()])
    return {
        label: replace(one, holm_t=t[at], holm_wilcoxon=wilcoxon[at]) for at, (label, one) in enumerate(tests.items())
    }


def paired(ours_D: NDArray[np.float64], base_D: NDArray[np.float64]) -> Paired | None:
    """Test that the mean (t) or the middle (Wilcoxon) of the differences is 0; None for fewer than two pairs.

    Raises:
        XtokenError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise XtokenError("paired tests need scipy; install it: pip install 'xtoken[plots]'") from error
    keep_D = np.isfinite(ours_D) & np.isfinite(base_D)
    ours_D, base_D = ours_D[keep_D], base_D[keep_D]
    difference_D = ours_D - base_D
    n = len(difference_D)
    if n < 2:
        return None
    mean = float(difference_D.mean())
    if np.ptp(difference_D) <= 1e-12 * max(np.abs(ours_D).max(), np.abs(base_D).max()):
        p = 1.0 if not difference_D.any() else math.nan
        return Paired(n, mean, mean, mean, p, p)
    test = stats.ttest_rel(ours_D, base_D)
    interval = test.confidence_interval(LEVEL)
    ranks = stats.wilcoxon(difference_D)
    return Paired(n, mean, float(interval.low), float(interval.high), float(test.pvalue), float(ranks.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN is no test and stays.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    tested = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, at) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[at] = largest
    return adjusted


def _of_documents(group: Group, names: Sequence[str]) -> NDArray[np.float64]:
    """Bits per byte, float64 [D]."""
    held = [run.documents for run in group.runs if run.documents]
    values = [[bits / size for bits, size in (documents[name] for name in names)] for documents in held]
    mean_D: NDArray[np.float64] = np.array(values, np.float64).mean(axis=0)
    return mean_D


def _by_seed(group: Group, name: str) -> dict[int, float]:
    by_seed: dict[int, list[float]] = {}
    for run in group.runs:
        after = run.evaluation("after")
        if after is not None and name in after.figures:
            by_seed.setdefault(run.seed, []).append(after.figures[name])
    return {seed: sum(values) / len(values) for seed, values in by_seed.items()}
