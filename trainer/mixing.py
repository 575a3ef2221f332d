"""How distillation (KD) and cross-entropy (CE) become one objective: sum over terms i of w_i times term i.

* ``fixed``: the user's weights.
* ``dynamic``: KD is scaled to the value of CE in each step (X-Token, arXiv 2605.21699).
* ``gradmag``: terms are scaled to gradients of one size (ALM, arXiv 2503.20083, GradMag),

      w_i = u_i min(r / |G_i|, 1e4)

  u_i is the user's weight: ``ce_weight``, or ``kd_weight`` times the teacher's share. G_i is the gradient of term i,
  divided by its denominator of the whole step, by the hidden states that enter the head; |G_i|^2 is a sum over all
  positions of the step. Norms are averaged over the steps in which they were measured (decay .9, without bias towards
  the 0 that such a mean starts from). r is the norm of CE, or the largest of KD where CE has weight 0.

Terms are counted CE first, then the teachers. Shapes: T = 1 + D terms, D teachers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DECAY = 0.9
MOST = 1e4  # a term whose gradient all but vanishes is not blown up to that of CE


@dataclass
class Mixing:
    """The weights of a run's terms, and under ``gradmag`` the norms measured so far.

    Attributes:
        mode, kd_weight, ce_weight: see ``xtoken.schemas.configs.train.LossGroup``.
        shares: the teachers' weights, summing to 1.
        every: steps from one measurement of the norms to the next.
        mean_T: decayed sums of the norms, not yet divided by the sum of their weights.
        measured_T: how often each was measured.
    """

    mode: str
    kd_weight: float
    ce_weight: float
    shares: Sequence[float] = (1.0,)
    every: int = 10
    mean_T: list[float] = field(default_factory=list)
    measured_T: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mean_T = self.mean_T or [0.0] * (1 + len(self.shares))
        self.measured_T = self.measured_T or [0] * (1 + len(self.shares))

    @property
    def user_T(self) -> list[float]:
        """u: what the user asked for."""
        return [self.ce_weight, *(self.kd_weight * share for share in self.shares)]

    def weights(self, kd: float, ce: float) -> tuple[float, float]:
        """Weights of KD and CE under ``fixed`` and ``dynamic``, in a step where these are their values."""
        if self.mode == "fixed":
            return self.kd_weight, self.ce_weight
        # H-KL can be negative: the ratio of magnitudes keeps the direction of its gradient.
        return (abs(ce / kd) if kd else 1.0), 1.0

    def measures(self, step: int) -> bool:
        """Whether norms are measured in a step, counted from 1: they act from the next step on, the first at once."""
        return self.mode == "gradmag" and (step - 1) % self.every == 0

    def observe(self, norm_T: Sequence[float]) -> None:
        """Take in the norms of a step; a term that has none there (0, or not a finite number) keeps what it had."""
        for i, (norm, user) in enumerate(zip(norm_T, self.user_T, strict=True)):
            if user > 0 and norm > 0 and math.isfinite(norm):
                self.mean_T[i] = DECAY * self.mean_T[i] + (1 - DECAY) * norm
                self.measured_T[i] += 1

    def norms(self) -> list[float | None]:
        """The averaged norm of each term, None where it was never measured; [T]."""
        return [
            mean / (1 - DECAY**count) if count else None
            for mean, count in zip(self.mean_T, self.measured_T, strict=True)
        ]

    def by_norms(self) -> list[float]:
        """w under ``gradmag``, [T]; the user's weight for a term that was never measured."""
        norms = self.norms()
        known = [norm for norm in norms if norm is not None]
        size = norms[0] if norms[0] is not None else max(known, default=0.0)
        return [
            user if norm is None else user * min(size / norm, MOST)
            for user, norm in zip(self.user_T, norms, strict=True)
        ]

    def capped(self) -> list[int]:
        """Terms whose gradient stays smaller than asked for, since their weight has reached ``MOST``."""
        return [i for i, (w, user) in enumerate(zip(self.by_norms(), self.user_T, strict=True)) if w >= MOST * user > 0]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; nothing unless norms are measured."""
        return {"mixing": [self.mean_T, self.measured_T]} if self.mode == "gradmag" else {}

    def restore(self, state: Sequence[list[Any]]) -> None:
        """Go on from ``state``."""
        self.mean_T, self.measured_T = (list(values) for values in state)
