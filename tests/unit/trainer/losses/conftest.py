"""A toy pair of vocabularies, the setups built from it, and views of a few positions.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary, N entries of W.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, View, VocabArrays

V, U = 24, 30
SPECIALS = 2  # bos and eos
TOKENS = [b"", b"", *(f"{' ' * (i % 3 == 0)}{'abcdef'[i % 6] * (1 + i // 6)}".encode() for i in range(V - SPECIALS))]


@dataclass
class Pair:
    """A random W: most rows exact, some of pieces, two empty; teacher tokens 26 and up are not reached."""

    weight_VU: np.ndarray = field(default_factory=lambda: np.zeros((V, U)))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(5)
        for s in range(SPECIALS, V):
            pieces = 1 if s < 16 else int(rng.integers(2, 4))
            columns = [s] if pieces == 1 else rng.choice(26, pieces, replace=False)
            share = 0.9 * 0.1 ** np.arange(pieces)
            self.weight_VU[s, columns] = share / share.sum()

    @property
    def stored(self) -> np.ndarray:
        """W as the float32 file holds it, in float64."""
        return self.weight_VU.astype(np.float32).astype(np.float64)

    @property
    def reached(self) -> np.ndarray:
        """Teacher ids that a row of W reaches."""
        return np.flatnonzero(self.weight_VU.sum(0) > 0)

    @property
    def arrays(self) -> ProjectionArrays:
        """W; of the rows with weight 1, three quarters are common and half are exact."""
        s, t = np.nonzero(self.weight_VU)
        weight = self.weight_VU[s, t].astype(np.float32)
        common = (weight == 1) & (s % 4 != 0)
        return ProjectionArrays(s.astype(np.int32), t.astype(np.int32), weight, common, common & (s % 4 != 1))

    @property
    def vocab(self) -> VocabArrays:
        """The student's tokens: ``TOKENS``, the first two special."""
        return VocabArrays.of(TOKENS, [None if i >= SPECIALS else "special" for i in range(V)])

    def setup(self, **options: Any) -> LossSetup:
        """``tau``, ``merge``, ``learn_w`` and any field of ``LossOptions``."""
        own = {name: options.pop(name) for name in ("tau", "merge", "learn_w") if name in options}
        return LossSetup(self.arrays, self.vocab, V, U, torch.device("cpu"), LossOptions(**options), **own)

    def pkl_chunk(self, rng: np.random.Generator, kept: int | None) -> tuple[np.ndarray, np.ndarray, float]:
        """Ids, log-probabilities and log REST of one chunk; ``kept=None`` keeps every reached token and has no REST."""
        p = rng.dirichlet(np.full(len(self.reached), 0.4))
        order = np.argsort(-p, kind="stable")[: len(p) if kept is None else kept]
        rest = -np.inf if kept is None else float(np.log1p(-p[order].sum()))
        return self.reached[order].astype(np.int32), np.log(p[order]), rest

    def hkl_chunk(self, rng: np.random.Generator, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Student ids and log-probabilities in C, log-probabilities outside C, of one chunk."""
        w = self.arrays
        partner = dict(zip(w.teacher_id[w.common].tolist(), w.student_id[w.common].tolist(), strict=True))
        p = rng.dirichlet(np.full(U, 0.4))
        order = np.argsort(-p, kind="stable")[:kept].tolist()
        common = [t for t in order if t in partner]
        other = [t for t in order if t not in partner]
        return np.array([partner[t] for t in common], np.int32), np.log(p[common]), np.log(p[other])


def central_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Slope of a scalar function along every entry of a float64 tensor."""
    slope, base = torch.zeros_like(at), at.detach()
    for i in range(base.numel()):
        up, down = base.clone().flatten(), base.clone().flatten()
        up[i] += step
        down[i] -= step
        with torch.no_grad():
            rise = function(up.view_as(base)) - function(down.view_as(base))
        slope.view(-1)[i] = rise / (2 * step)
    return slope


def _integers(values: Sequence[int]) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.int64).reshape(-1))


def build_view(
    z_PV: Tensor,
    first: Sequence[int],
    length: Sequence[int] | None = None,
    columns: Mapping[str, Any] | None = None,
    tau: float = 1.0,
    *,
    label: Sequence[int] | None = None,
    following: Sequence[int] | None = None,
) -> View:
    """A view of the positions with logits ``z_PV``; chunks of one token, labels 0 and no next position if not given."""
    return View(
        _integers(first),
        _integers([1] * len(first) if length is None else length),
        _integers([-1] * len(first) if following is None else following),
        {name: torch.as_tensor(np.asarray(values)) for name, values in (columns or {}).items()},
        logp_PV=torch.log_softmax(z_PV / tau, -1),
        label_P=_integers([0] * len(z_PV) if label is None else label),
    )


@pytest.fixture
def pair() -> Pair:
    """The toy pair of vocabularies."""
    return Pair()


@pytest.fixture
def make_view() -> Callable[..., View]:
    """``make_view(z_PV, first, length, columns, tau, label=, following=)``, see ``build_view``."""
    return build_view


@pytest.fixture
def slopes() -> Callable[..., Tensor]:
    """``slopes(function, at)``, see ``central_differences``."""
    return central_differences
