"""The plan as the harness reads it: which runs there are, what each trains, and what they cost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PLAN = Path(__file__).with_name("plan.yaml")
Words = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        experiment: the first that asks for it.
        student: name of a student of the plan.
        setting: name of a setting.
        variant: name of what else differs, such as W's rule; empty: nothing.
        rate: peak learning rate; None: the best of its setting's sweep.
        seed: of the sample order and of random weights.
        steps: how many.
    """

    experiment: str
    student: str
    setting: str
    variant: str
    rate: float | None
    seed: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """``plan.yaml``."""

    words: Words

    @classmethod
    def read(cls, path: Path = PLAN) -> "Plan":
        """From a file."""
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")))

    @property
    def experiments(self) -> list[str]:
        """Names, in order."""
        return list(self.words["experiments"])

    def runs(self, experiment: str) -> list[Run]:
        """The runs of an experiment, one seed of everything before the next seed; none of those with a script."""
        asked = self.words["experiments"][experiment]
        found = dict.fromkeys(self._runs(experiment, asked))
        if "again" in asked:
            found |= dict.fromkeys(self._runs(experiment, {**asked, **asked["again"]}))
        return sorted(found, key=lambda run: run.seed)

    def _runs(self, experiment: str, asked: Words) -> Iterator[Run]:
        if "script" in asked:
            return
        name = asked["student"]
        steps = asked.get("steps", self.words["students"][name]["steps"])
        variants = asked.get("variants", [""])
        for seed in asked["seeds"]:
            for variant in variants:
                for setting in asked["settings"]:
                    for rate in asked.get("rates", [None]):
                        known = None if rate == "best" else rate
                        yield Run(experiment, name, setting, variant, known, seed, steps)
        for setting in asked.get("once", []):
            yield Run(experiment, name, setting, "", None, asked["seeds"][0], steps)

    def minutes(self, experiment: str) -> float:
        """What an experiment costs, without what an earlier one has run already."""
        asked = self.words["experiments"][experiment]
        if "script" in asked:
            return float(asked["minutes"])
        students = self.words["students"]
        earlier = {self.key(run) for name in self._before(experiment) for run in self.runs(name)}
        new = [run for run in self.runs(experiment) if self.key(run) not in earlier]
        seconds = sum(run.steps * students[run.student]["seconds_per_step"] for run in new)
        return (seconds + len(new) * students[asked["student"]]["seconds_to_judge"]) / 60 + asked.get("minutes", 0)

    def sweep(self, run: Run) -> list[Run]:
        """The runs that decide a rate which is not given: those of the experiment's first seed, if it has rates; else
        of the sweep on the small student, of the setting itself, or the first of its loss, or CE.
        """
        same = (run.experiment, run.setting, run.variant)
        own = [
            one for one in self.runs(run.experiment) if one.rate and (one.experiment, one.setting, one.variant) == same
        ]
        if own:
            return [one for one in own if one.seed == own[0].seed]
        runs, settings = self.runs("rates"), self.words["settings"]
        swept = list(dict.fromkeys(one.setting for one in runs))
        loss = settings[run.setting]["loss"]
        alike = [one for one in swept if settings[one]["loss"] == loss]
        chosen = run.setting if run.setting in swept else (alike or ["ce"])[0]
        return [one for one in runs if one.setting == chosen]

    def checkpoints(self, run: Run) -> int | None:
        """Every how many steps a run's checkpoint is kept, if any experiment that shares the run asks for it."""
        for name, asked in self.words["experiments"].items():
            if "checkpoints" in asked and self.key(run) in map(self.key, self.runs(name)):
                return int(asked["checkpoints"])
        return None

    def claims(self, experiment: str) -> list[Words]:
        """Those about an experiment."""
        return [claim for claim in self.words["claims"] if claim["experiment"] == experiment]

    def against(self, claim: Words, ours: str) -> str:
        """What one of a claim's settings is compared with."""
        theirs: str = claim["theirs"]
        return f"{ours} fixed" if theirs == "the same, fixed" else theirs

    def compared(self, claim: Words) -> set[str]:
        """Every setting that a claim is about."""
        return {*claim["ours"], *(self.against(claim, ours) for ours in claim["ours"])}

    def variant(self, run: Run) -> Words:
        """What a run's variant changes; nothing: it is the run of its setting."""
        variants = self.words["experiments"][run.experiment].get("variants", {})
        found: Words = variants.get(run.variant, {})
        return found

    def key(self, run: Run) -> tuple[Any, ...]:
        """What decides a run's outcome: experiments share runs of the same."""
        return run.student, run.setting, run.variant if self.variant(run) else "", run.rate, run.seed, run.steps

    def _before(self, experiment: str) -> list[str]:
        return self.experiments[: self.experiments.index(experiment)]

    def table(self) -> str:
        """Markdown: runs and hours of each experiment."""
        lines = ["| experiment | student | settings | runs | hours |", "|---|---|---|---|---|"]
        total = 0.0
        for name in self.experiments:
            asked, hours = self.words["experiments"][name], self.minutes(name) / 60
            total += hours
            settings = ", ".join([*asked.get("settings", []), *asked.get("once", [])]) or asked.get("script", "")
            variants = f" of each: {', '.join(asked['variants'])}" if "variants" in asked else ""
            lines.append(
                f"| {name} | {asked.get('student', '')} | {settings}{variants} | {len(self.runs(name))} | {hours:.1f} |"
            )
        return "\n".join([*lines, f"| all | | | | {total:.1f} |"]) + "\n"
