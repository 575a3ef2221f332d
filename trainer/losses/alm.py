"""ALM, approximate likelihood matching (arXiv 2503.20083): one number per chunk, its likelihood on either side.

With l the sum of the log-probabilities of a chunk's labels, a = l_T / tau_b - eps and b = l_S / tau_b - eps:

    binary-kl   e^a (a - b) + (1 - e^a) (log(1 - e^a) - log(1 - e^b))
    reverse     the same with a and b exchanged
    limit       (a - b) + a log(-b) - a log(-a), a = l_T - eps, b = l_S - eps: tau_b * binary-kl as tau_b grows
    abs         |l_T - l_S|
    tv          |e^a - e^b|: total variation of the two coins

The paper's tables take tau_b = 100, its appendix finds 5 no worse. A divergence of coins is a lower bound of that of
the two distributions over all chunks where both are the chunks' own probabilities: at tau_b = 1 only.

Debiasing: ``outcome`` adds to both sides the log-probability that the token after the chunk starts with a space;
where either side has none, both go without. ``merge`` joins chunks until the teacher expects a space.

Shapes: P positions, F features (log-probability of the label; with ``outcome`` that of a space), C chunks, G joined
chunks, V student vocabulary, E positions of chunks.
"""

import math
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.losses.base import FeatureLoss, LossSetup, View
from xtoken.trainer.losses.divergence import ranges
from xtoken.trainer.losses.log_softmax import label_places, labels
from xtoken.trainer.losses.token_set import set_mass
from xtoken.trainer.ragged import Array, Arrays, Columns

EPS = 1e-6  # keeps a chunk of probability 1 away from log(0); the paper's code takes the same


def alm(teacher_C: Tensor, student_C: Tensor, mode: str = "binary-kl", tau_b: float = 100.0) -> Tensor:
    """ALM's divergence of chunk likelihoods, [C] nats (arXiv 2503.20083); ``reference.alm`` is its formula.

    Args:
        teacher_C, student_C: log-likelihoods of the chunks, at most 0: sums of the log-probabilities of their labels.
        mode: ``binary-kl``, ``reverse``, ``limit``, ``abs`` or ``tv``.
        tau_b: temperature of ``binary-kl``, ``reverse`` and ``tv``.
    """
    if mode == "abs":
        return (teacher_C - student_C).abs()
    if mode == "limit":
        a_C, b_C = teacher_C - EPS, student_C - EPS
        return (a_C - b_C) + a_C * ((-b_C).log() - (-a_C).log())
    a_C, b_C = teacher_C / tau_b - EPS, student_C / tau_b - EPS
    if mode == "tv":
        return (a_C.exp() - b_C.exp()).abs()
    return binary_kl(b_C, a_C) if mode == "reverse" else binary_kl(a_C, b_C)


class ALM(FeatureLoss):
    """ALM against ``teacher_logprob`` and the columns ``alm_*`` of the target table."""

    columns: ClassVar[Columns] = Columns.of("alm", "teacher_logprob")

    def __init__(self, setup: LossSetup) -> None:
        options = setup.options
        self.mode, self.tau_b, self.threshold = options.alm, options.alm_tau, options.alm_threshold
        self.outcome, self.merge = "outcome" in options.debias, "merge" in options.debias
        # Joined chunks can be as long as a sample, and the token after a chunk may lie in the next block.
        self.local = not (self.outcome or self.merge)
        self.space_V = torch.as_tensor(setup.vocab.space_V[: setup.student_size], dtype=torch.float32)
        self.space_V = self.space_V.to(setup.device)
        if self.outcome and not self.space_V.any():
            raise XtokenError("no student token starts with a space, so --debias outcome has none; leave it out")

    def valid(self, start_C: NDArray[np.int64], arrays: Arrays) -> NDArray[np.bool_]:  # noqa: ARG002 - as the base
        """Chunks whose likelihood the teacher knows."""
        return np.isfinite(arrays["teacher_logprob"])

    def regroup(self, end_C: NDArray[np.int64], arrays: Arrays) -> tuple[NDArray[np.int64], Arrays]:
        """Join chunks until the teacher expects a space behind one; the sample's end closes the last group.

        A group that holds a chunk without teacher distribution has none either.
        """
        if not self.merge or not len(end_C):
            return end_C, arrays
        space_C = arrays["alm_space_logprob"]
        closes_C = space_C > math.log(self.threshold)  # false for NaN: what the teacher does not know joins on
        closes_C[-1] = True
        last_G = np.flatnonzero(closes_C)
        first_G = np.concatenate([[0], last_G[:-1] + 1])
        joined: dict[str, Array] = {
            "teacher_logprob": np.add.reduceat(arrays["teacher_logprob"].astype(np.float64), first_G),
            "alm_space_logprob": space_C[last_G],
        }
        return end_C[last_G], joined

    def features(self, logp_PV: Tensor, label_P: Tensor) -> Tensor:
        """See ``FeatureLoss.features``: log-probability of the label and, with ``outcome``, that of a space."""
        if not self.outcome:
            return labels(logp_PV, label_P)[:, None]
        place_P = label_places(label_P, logp_PV.shape[1])
        spaces = set_mass(logp_PV, self.space_V.to(logp_PV.dtype), place_P)
        # Below the smallest number the gradient is 0; logits must lie 87 apart for that.
        space_P = spaces.mass_P.clamp(min=torch.finfo(logp_PV.dtype).tiny).log()
        return torch.stack([spaces.logp_E, space_P], dim=1)

    def index(self, view: View) -> tuple[Tensor, Tensor]:
        """See ``Loss.index``: the chunk of each label, and its position."""
        return ranges(view.first_C, view.length_C)

    def terms_of(self, feature_PF: Tensor, view: View) -> Tensor:
        """See ``FeatureLoss.terms_of``."""
        # float64: these are few numbers, and the terms of a matched chunk cancel to nothing.
        feature_PF = feature_PF.double()
        chunk_E, position_E = self.indexed(view)
        student_C = feature_PF.new_zeros(len(view.first_C)).index_add(0, chunk_E, feature_PF[position_E, 0])
        teacher_C = view.columns["teacher_logprob"].double()
        if self.outcome:
            space_C = view.columns["alm_space_logprob"].double()
            known_C = (view.next_C >= 0) & ~space_C.isnan()
            teacher_C = teacher_C + torch.where(known_C, space_C, 0.0)
            student_C = student_C + torch.where(known_C, feature_PF[view.next_C.clamp(min=0), 1], 0.0)
        # sums of float32 log-probabilities near 0 can round above it, where the divergence does not exist
        return alm(teacher_C.clamp(max=0), student_C.clamp(max=0), self.mode, self.tau_b)


def binary_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(e^a || e^b) of two coins, nats; a and b are log-probabilities below 0."""
    return a.exp() * (a - b) - torch.expm1(a) * (log1mexp(a) - log1mexp(b))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, to full precision on both sides of -ln 2 (Maechler 2012)."""
    near = x > -math.log(2)
    # Each branch sees harmless numbers where the other is taken: a nan there would pass through the gradient.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def open_loss(setup: LossSetup) -> ALM:
    """See ``xtoken.trainer.losses.open_loss``."""
    return ALM(setup)
