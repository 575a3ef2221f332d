"""Runs that differ in nothing but their seed, under a short name of their own."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import digest
from xtoken.trainer.report.run_folder import Evaluation, RunRecord

_BESIDE = ("seed", "out")  # what runs of one group may differ in
_HASH = re.compile(r"[0-9a-f]{32,}")
_LONGEST = 60
_COUNTED = {"bits_per_byte": "bytes", "kl": "chunks", "top1_agreement": "chunks"}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds (None for one), of ``n`` runs."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, by seed."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Its losses, each once."""
        return self.runs[0].losses

    @property
    def kind(self) -> str:
        """Its losses as text: KD of one kind compares with KD of the same only."""
        return "+".join(self.losses)

    @property
    def finished(self) -> int:
        """How many of its runs have a summary."""
        return sum(run.summary is not None for run in self.runs)

    def evaluations(self, when: str) -> list[Evaluation]:
        """One evaluation of each run that has it (see ``RunRecord.evaluation``)."""
        evaluations = [run.evaluation(when) for run in self.runs]
        return [one for one in evaluations if one is not None]

    def last(self) -> str:
        """``after`` where a run has been measured at its end, else ``latest``."""
        return "after" if self.evaluations("after") else "latest"

    def held_out(self, when: str, name: str) -> Spread | None:
        """A figure of evaluations over seeds."""
        return spread([one.figures[name] for one in self.evaluations(when) if name in one.figures])

    def final(self, name: str) -> Spread | None:
        """``loss``, ``kd`` or ``ce`` at the end, over seeds."""
        finals = [run.final(name) for run in self.runs]
        return spread([value for value in finals if value is not None])

    def teacher(self) -> float | None:
        """The teacher's own bits per byte on the held-out targets."""
        for when in ("after", "latest", "before"):
            figure = self.held_out(when, "teacher_bits_per_byte")
            if figure is not None and math.isfinite(figure.mean):
                return figure.mean
        return None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing, NaN where a value is NaN or inf."""
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return Spread(math.nan, None, len(values))
    if len(values) == 1:
        return Spread(values[0], None, 1)
    if min(values) == max(values):  # as of one student before training; a division would round
        return Spread(values[0], 0.0, len(values))
    mean = math.fsum(values) / len(values)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs.

    Raises:
        XtokenError: an identity holds half a character, which no JSON text of ours does.
    """
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        try:
            key = digest(_configuration(run))
        except (ValueError, RecursionError) as error:
            raise XtokenError(
                f"{run.root}: its run.json is damaged ({str(error)[:100]}); copy the run again"
            ) from error
        by_key.setdefault(key, []).append(run)
    groups = [Group("", tuple(sorted(same, key=lambda run: run.seed))) for same in by_key.values()]
    return [replace(group, label=label) for group, label in zip(groups, _labels(groups), strict=True)]


def baseline(groups: Sequence[Group]) -> Group:
    """What others are compared with: the first group of CE alone, else the first."""
    return next((group for group in groups if group.losses == ("ce",)), groups[0])


def comparable(group: Group, base: Group, name: str) -> bool:
    """Whether a held-out figure of both counts as much text: another amount is another text."""
    unit = _COUNTED[name]
    ones = [one for of in (group, base) for one in of.evaluations("after") if name in one.figures]
    return len({one.figures.get(unit) for one in ones}) <= 1


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Field -> its value in each group, for the fields of identity and configuration that are not the same in all."""
    held = [[_configuration(run) for run in group.runs] for group in groups]
    for group, configurations in zip(groups, held, strict=True):
        for run, configuration in zip(group.runs, configurations, strict=True):
            configuration |= {k: v for k, v in run.config.items() if k not in configuration and k not in _BESIDE}
    names = dict.fromkeys(name for configurations in held for one in configurations for name in one)
    differing = {}
    for name in names:
        values = [[shortened(one.get(name)) for one in configurations] for configurations in held]
        exact = {json.dumps(one.get(name), sort_keys=True) for configurations in held for one in configurations}
        if len(exact) > 1:
            differing[name] = [" | ".join(dict.fromkeys(of_group)) for of_group in values]
    return differing


def shortened(value: Any) -> str:
    """A value of a configuration, on one line: hashes by their first digits, long ones cut."""
    if isinstance(value, str):
        text = value[:8] if _HASH.fullmatch(value) else value
    elif isinstance(value, list):
        text = ", ".join(map(shortened, value)) or "none"
    elif value is None or isinstance(value, bool):
        text = {None: "none", True: "yes", False: "no"}[value]
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _configuration(run: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in run.identity.items() if name not in _BESIDE}


def _labels(groups: Sequence[Group]) -> list[str]:
    """Loss and mix; where that is not unique, what tells them apart."""
    labels = [_base(group) for group in groups]
    for base in dict.fromkeys(labels):
        same = [at for at, label in enumerate(labels) if label == base]
        if len(same) > 1:
            for at, words in zip(same, _telling([groups[at] for at in same]), strict=True):
                labels[at] = ", ".join([base, *words])
    cut = [label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…" for label in labels]
    return [f"{label} ({cut[:at].count(label) + 1})" if cut.count(label) > 1 else label for at, label in enumerate(cut)]


def _base(group: Group) -> str:
    mix = group.runs[0].identity.get("mix", "fixed")
    return group.kind + (f", {mix}" if mix != "fixed" and group.losses != ("ce",) else "")


def _telling(groups: Sequence[Group]) -> list[list[str]]:
    """For each of several groups the fields that set it apart, as few as do."""
    words: list[list[str]] = [[] for _ in groups]
    for name, values in differences(groups).items():
        longer = [[*word, f"{name} {_last_part(value)}"] for word, value in zip(words, values, strict=True)]
        if len({tuple(word) for word in longer}) > len({tuple(word) for word in words}):
            words = longer
    return words


def _last_part(value: str) -> str:
    return value.rstrip("/").rsplit("/", 1)[-1] or value
