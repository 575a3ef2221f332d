"""Stops a run before a bad step reaches the weights, and says which sample is at fault.

A term is bad when it is NaN or inf, or when it lies further above its median of the last steps than chance takes it.
Medians, since one outlier must not widen what counts as usual; only above, since a term that falls is no fault.
A step of few tokens, such as the last of an epoch, is a mean of little and may lie further off.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from xtoken.schemas.errors import XtokenError

WINDOW = 50  # steps that the median is taken of
LEAST = 20  # steps before a spike can be told from the noise of a beginning
WORST = 3  # samples that a message names
_NORMAL = 1.4826  # the standard deviation of a normal distribution, in its median absolute deviations
_SHARE = 0.02  # of the median: a term that hardly moves may still move this much
_NATS = 0.01  # and this much, where its median is near zero, as that of h-kl
_LABELS = {"kd": "KD", "ce": "CE", "grad_norm": "the gradient norm"}


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a step: ``term`` is ``kd``, ``ce`` or ``grad_norm``; no median: its value is NaN or inf."""

    term: str
    value: float
    median: float | None = None
    deviations: float | None = None
    steps: int = 0

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.median is None:
            return f"{_LABELS[self.term]} is {self.value:g}"
        return (
            f"{_LABELS[self.term]} is {self.value:.4g}, {self.deviations:.3g} deviations above its median of the last "
            f"{self.steps} steps, {self.median:.4g}"
        )


class Watch:
    """The last terms of a run; ``spike`` is how many deviations above the median stop it, 0: only NaN or inf does.

    A function of the figures it was shown, which are those of the whole step on every rank, so all ranks decide alike.
    """

    def __init__(self, spike: float) -> None:
        self.spike = spike
        self._seen: dict[str, deque[tuple[float, int]]] = {term: deque(maxlen=WINDOW) for term in ("kd", "ce")}

    def look(self, ce: float, kd: float | None, grad_norm: float, tokens: int = 1, chunks: int = 1) -> Verdict | None:
        """Judge a step (nats; gradient norm before clipping); one that passes becomes part of what is usual.

        Args:
            tokens, chunks: what CE and KD are means of; left out where they are alike in all steps.
        """
        terms = ({} if kd is None else {"kd": (kd, chunks)}) | {"ce": (ce, tokens)}
        values = {term: value for term, (value, _) in terms.items()} | {"grad_norm": grad_norm}
        for term, value in values.items():
            if not math.isfinite(value):
                return Verdict(term, value)
        spikes = [verdict for term, value in terms.items() if (verdict := self._spike(term, *value)) is not None]
        if spikes:
            return max(spikes, key=lambda verdict: verdict.deviations or 0.0)
        for term, held in terms.items():
            self._seen[term].append(held)
        return None

    def _spike(self, term: str, value: float, size: int) -> Verdict | None:
        seen = [one for one, _ in self._seen[term]]
        if not self.spike or len(seen) < LEAST:
            return None
        usual, usual_size = median(seen), median(count for _, count in self._seen[term])
        deviation = max(_NORMAL * median(abs(one - usual) for one in seen), _SHARE * abs(usual), _NATS)
        deviation *= max(1.0, math.sqrt(usual_size / max(1, size)))  # that of a mean of so few
        deviations = (value - usual) / deviation
        return Verdict(term, value, usual, deviations, len(seen)) if deviations > self.spike else None

    def state(self) -> dict[str, list[list[float]]]:
        """Plain JSON for a checkpoint."""
        return {term: [[value, size] for value, size in seen] for term, seen in self._seen.items()}

    def restore(self, state: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Go on from ``state()``, exactly."""
        for term, seen in self._seen.items():
            seen.clear()
            seen.extend((value, int(size)) for value, size in state[term])


@dataclass(frozen=True)
class SampleScore:
    """A sample of the step scored alone: nats per predicted token, per chunk of each teacher; None: not held by it."""

    id: str
    tokens: int
    ce: float
    kd: tuple[float | None, ...] = ()

    @property
    def terms(self) -> dict[str, float]:
        """``kd`` is that of the teacher where it is worst."""
        held = [value for value in self.kd if value is not None]
        return {"ce": self.ce, **({"kd": max(held, key=_badness)} if held else {})}

    @property
    def is_number(self) -> bool:
        """Whether every term is."""
        return all(map(math.isfinite, self.terms.values()))

    def __str__(self) -> str:
        kd = " / ".join("-" if value is None else f"{value:.4g}" for value in self.kd)
        return f"{self.id} ({self.tokens} tokens, {f'KD {kd}, ' if kd else ''}CE {self.ce:.4g})"


def _badness(value: float) -> float:
    """Orders by size, NaN and inf above all."""
    return value if math.isfinite(value) else math.inf


def worst_samples(scores: Sequence[SampleScore], term: str) -> list[SampleScore]:
    """All samples, worst first by ``term``; by their largest term where it is the gradient's norm."""
    return sorted(scores, key=lambda score: (score.is_number, -_blame(score, term), score.id))


def _blame(score: SampleScore, term: str) -> float:
    terms = score.terms
    return _badness(terms[term]) if term in terms else max(map(_badness, terms.values()))


@dataclass(frozen=True)
class Diagnosis:
    """A verdict on ``step`` and its samples, each scored alone with the weights that the step began with."""

    step: int
    verdict: Verdict
    scores: Sequence[SampleScore]

    def error(self) -> XtokenError:
        """What stops the run: step, term, median, the worst samples, and the ways out."""
        head = f"step {self.step}: {self.verdict.sentence}; the step was not taken, the last checkpoint stays"
        return XtokenError("; ".join([head, *self._cause(), self._way_out()]))

    def record(self) -> dict[str, Any]:
        """The same as JSON, with all samples, worst first."""
        verdict = self.verdict
        return {
            "step": self.step,
            "term": verdict.term,
            "value": _json(verdict.value),
            "median": verdict.median,
            "deviations": verdict.deviations,
            "sentence": verdict.sentence,
            "no_number": sum(not score.is_number for score in self.scores),
            "samples": [
                {"id": one.id, "tokens": one.tokens, "ce": _json(one.ce), "kd": [_json(value) for value in one.kd]}
                for one in worst_samples(self.scores, verdict.term)
            ],
        }

    def _cause(self) -> list[str]:
        if not self.scores:
            return []
        count, broken = len(self.scores), sum(not score.is_number for score in self.scores)
        if broken == count > 1:
            return [f"each of its {count} samples alone gives NaN or inf: the weights are at fault, not a sample"]
        worst = ", ".join(map(str, worst_samples(self.scores, self.verdict.term)[:WORST]))
        named = [f"worst of its {count} samples, each scored alone: {worst}"]
        if self.verdict.median is None and not broken:
            return ["each of its samples alone is finite, so they break in the backward pass", *named]
        return named

    def _way_out(self) -> str:
        look = f"look at one with 'xtoken inspect TARGETS --html {self._worst_id()}', " if self.scores else ""
        regardless = "" if self.verdict.median is None else ", or --spike 0 to go on regardless"
        return f"{look}go back and leave the step out with --rollback N, lower --lr{regardless}"

    def _worst_id(self) -> str:
        return worst_samples(self.scores, self.verdict.term)[0].id


def _json(value: float | None) -> float | str | None:
    """JSON has no word for NaN and inf."""
    return value if value is None or math.isfinite(value) else str(value)
