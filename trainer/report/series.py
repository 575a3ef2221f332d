"""Runs as the curves of small panels: a running mean, few points, seeds as mean and band.

Shapes: K logged values of one run, P points of a curve.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.trainer.report.groups import Group
from xtoken.trainer.report.run_folder import RunRecord

POINTS = 200  # of a curve; a panel is some 400 pixels wide
_SHARE = 50  # a running mean covers one step in so many
Values = NDArray[np.float64]

# name, title, unit
TRAINED = (
    ("kd", "KD", "nats per chunk"),
    ("ce", "CE", "nats per token"),
    ("loss", "objective", "nats"),
    ("top1_agreement", "top-1 agreement in training", "share of chunks"),
)
HELD_OUT = (
    ("bits_per_byte", "held-out text", "bits per byte"),
    ("kl", "held-out KL to the teacher", "nats per chunk"),
    ("top1_agreement", "held-out top-1 agreement", "share of chunks"),
)
MACHINE = (
    ("tokens_per_s", "speed", "student tokens per second"),
    ("grad_norm", "gradient norm", "before clipping"),
    ("lr", "learning rate", "of AdamW"),
    ("kd_gradient", "gradient of KD by hidden states", "norm before its weight"),
    ("ce_gradient", "gradient of CE by hidden states", "norm before its weight"),
    ("kd_weight", "weight of KD", "under --mix gradmag"),
    ("taught", "taught tokens of conversations", "share of student tokens"),
)


@dataclass(frozen=True)
class Curve:
    """One configuration in one panel; ``low_P`` and ``high_P`` are None for one run."""

    group: int
    x_P: Values
    y_P: Values
    low_P: Values | None = None
    high_P: Values | None = None


@dataclass(frozen=True)
class Panel:
    """What one small plot shows.

    Attributes:
        over: tokens | seconds.
        points: whether each value is marked, as few measured ones are.
        linear: never on a logarithmic scale.
        goals: values of horizontal lines, the teacher's own figures.
        events: (group, x) of what happened to a run.
    """

    title: str
    unit: str
    over: str
    curves: tuple[Curve, ...]
    points: bool = False
    linear: bool = False
    goals: tuple[float, ...] = ()
    events: tuple[tuple[int, float], ...] = ()


def window_of(groups: Sequence[Group]) -> int:
    """Steps of the running mean, odd, the same for all runs of a page."""
    longest = max((len(run.step_N) for group in groups for run in group.runs), default=1)
    return max(1, longest // _SHARE) | 1


def panels(groups: Sequence[Group], over: str) -> list[Panel]:
    """All panels that there are numbers for. KD and objective have one panel for each kind of loss."""
    events = tuple(_events(groups, over))
    drawn = [panel for figure in TRAINED for panel in _trained_panels(groups, figure, over, events)]
    goals = {goal for group in groups if (goal := group.teacher()) is not None}
    for name, title, unit in HELD_OUT:
        curves = tuple(curve for at, g in enumerate(groups) if (curve := _held_out(g, at, name, over)) is not None)
        lines = tuple(sorted(goals)) if name == "bits_per_byte" else ()
        drawn.append(Panel(title, unit, over, curves, points=True, goals=lines, events=events))
    if over == "tokens":
        drawn += [panel for figure in MACHINE for panel in _trained_panels(groups, figure, over, events)]
    return [panel for panel in drawn if any(np.isfinite(curve.y_P).any() for curve in panel.curves)]


def _trained_panels(
    groups: Sequence[Group], figure: tuple[str, str, str], over: str, events: tuple[tuple[int, float], ...]
) -> Iterator[Panel]:
    name, title, unit = figure
    window = 1 if name == "lr" else window_of(groups)
    for kind, members in _kinds(groups, name):
        curves = [_trained(groups[at], at, name, over, window) for at in members]
        yield Panel(
            f"{title}, {kind}" if kind else title,
            unit,
            over,
            tuple(curve for curve in curves if curve is not None),
            linear=name == "lr",
            events=tuple(event for event in events if event[0] in members),
        )


def _kinds(groups: Sequence[Group], name: str) -> Iterator[tuple[str, list[int]]]:
    """Which groups share a panel, and under what name."""
    if name not in ("kd", "loss"):
        yield "", list(range(len(groups)))
        return
    kinds: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        mixed = ", dynamic" if name == "loss" and group.runs[0].identity.get("mix") == "dynamic" else ""
        if group.losses != ("ce",):
            kinds.setdefault(group.kind + mixed, []).append(at)
    yield from kinds.items()


def _trained(group: Group, at: int, name: str, over: str, window: int) -> Curve | None:
    lines = []
    for run in group.runs:
        if name in run.curves:
            rows_K, values_K = run.curves[name]
            apart = int(np.median(np.diff(rows_K))) if len(rows_K) > 1 else 1  # steps between two values
            lines.append((_axis(run, over)[rows_K], smooth(values_K, window // apart | 1)))
    return _curve(at, lines)


def _held_out(group: Group, at: int, name: str, over: str) -> Curve | None:
    """Seeds are measured at the same steps, at nearly the same tokens."""
    made: dict[int, list[tuple[float, float]]] = {}
    for run in group.runs:
        of_run = {one.step: one.figures[name] for one in run.evaluations if name in one.figures}
        for step, value in of_run.items():
            made.setdefault(step, []).append((run.at(step)[over == "seconds"], value))
    if not made:
        return None
    of_steps = [np.array(made[step]).T for step in sorted(made)]
    x_P, y_P = (np.array([pairs[side].mean() for pairs in of_steps]) for side in (0, 1))
    if len(group.runs) == 1:
        return Curve(at, x_P, y_P)
    sd_P = np.array([pairs[1].std(ddof=1) if pairs.shape[1] > 1 else 0.0 for pairs in of_steps])
    return Curve(at, x_P, y_P, y_P - sd_P, y_P + sd_P)


def _axis(run: RunRecord, over: str) -> Values:
    return run.tokens_N if over == "tokens" else run.seconds_N


def _events(groups: Sequence[Group], over: str) -> Iterator[tuple[int, float]]:
    for at, group in enumerate(groups):
        for run in group.runs:
            for event in run.events[:POINTS]:
                yield at, run.at(event.step)[over == "seconds"]


def smooth(values_K: Values, window: int) -> Values:
    """Mean of the ``window`` (odd) values around each one, fewer at the ends; NaN and inf do not count."""
    finite_K = np.isfinite(values_K)
    sums = np.concatenate([[0.0], np.where(finite_K, values_K, 0.0).cumsum()])
    counts = np.concatenate([[0], finite_K.cumsum()])
    at_K = np.arange(len(values_K))
    first_K, last_K = np.maximum(at_K - window // 2, 0), np.minimum(at_K + window // 2 + 1, len(values_K))
    with np.errstate(invalid="ignore"):
        mean_K: Values = (sums[last_K] - sums[first_K]) / (counts[last_K] - counts[first_K])
    return np.where(finite_K, mean_K, math.nan)


def _curve(at: int, lines: Sequence[tuple[Values, Values]]) -> Curve | None:
    """One run as it is, thinned; several on common places, each as far as it got."""
    if not lines:
        return None
    if len(lines) == 1:
        x_K, y_K = lines[0]
        keep = np.unique(np.linspace(0, len(x_K) - 1, min(POINTS, len(x_K))).round().astype(np.int64))
        return Curve(at, x_K[keep], y_K[keep])
    ends = (min(float(x_K[0]) for x_K, _ in lines), max(float(x_K[-1]) for x_K, _ in lines))
    x_P = np.linspace(*ends, POINTS)
    y_RP = np.array([np.interp(x_P, *_whole(x_K, y_K, ends)) for x_K, y_K in lines])
    count_P = np.isfinite(y_RP).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_P = np.nansum(y_RP, axis=0) / count_P
        sd_P = np.sqrt(np.nansum((y_RP - mean_P) ** 2, axis=0) / (count_P - 1))
    sd_P = np.where(count_P > 1, sd_P, 0.0)
    return Curve(at, x_P, mean_P, mean_P - sd_P, mean_P + sd_P)


def _whole(x_K: Values, y_K: Values, ends: tuple[float, float]) -> tuple[Values, Values]:
    """A line with NaN where it was not: behind its end, and before its start by more than seeds differ in tokens."""
    slack = (ends[1] - ends[0]) / POINTS
    x = np.concatenate([[x_K[0] - 2 * slack], x_K, [x_K[-1] + 2 * slack]])
    first = y_K[0] if x_K[0] - ends[0] <= 2 * slack else math.nan
    last = y_K[-1] if ends[1] - x_K[-1] <= 2 * slack else math.nan
    return x, np.concatenate([[first], y_K, [last]])
