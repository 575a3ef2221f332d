"""How far the P-KL of stored entries can lie above that of the whole row, for each policy of unreached tokens.

The rows go through align's own kernel, once with the entries that a capture keeps and once with all of them. W is the
identity over N cells; teacher tokens N and up are reached by none, and each begins with the token of some cell.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xtoken.pipeline.align.kernels_project import FATES, project_rows
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, VocabArrays
from xtoken.trainer.losses.divergence import NOTHING

CELLS, UNREACHED = 12, 9
SIZE = CELLS + UNREACHED
FLOAT32 = 1e-5  # targets hold float32 log-probabilities
FATE = {"prefix": "spread", "rest": "to rest", "none": "left out"}

Row = NDArray[np.float64]


def columns(p_U: Row, kept: NDArray[np.int64], policy: str, prefix: NDArray[np.int64]) -> dict[str, Any]:
    """The target of a row of which ``kept`` tokens are stored, as ``xtoken align`` makes it."""
    fate = np.where(np.arange(SIZE) < CELLS, FATES.index("stays"), FATES.index(FATE[policy])).astype(np.int8)
    share = np.where(fate == FATES.index("spread"), 1, 0)
    starts = np.concatenate([[0], np.cumsum(share)]).astype(np.int64)
    to = prefix.astype(np.int32) if policy == "prefix" else np.zeros(0, np.int32)
    logp = np.log(p_U[kept])
    rest = 1 - p_U[kept].sum()
    rest_R = np.array([math.log(rest) if rest > 1e-12 else -math.inf])
    row = (np.array([0, len(kept)], np.int64), kept.astype(np.int32), logp, p_U[kept], rest_R)
    made = (fate, np.zeros(SIZE, np.int8), starts, to, np.ones(len(to)))
    count, ids, logprob, rest_C, _ = project_rows(np.zeros(1, np.int64), *row, *made, False, SIZE)
    return {"pkl_count": count, "pkl_ids": ids, "pkl_logprob": logprob, "pkl_rest_logprob": rest_C}


def pkl(q_V: Row, target: dict[str, Any], make_view: Any) -> float:
    """The loss itself, float64."""
    every, flags = np.arange(CELLS, dtype=np.int32), np.ones(CELLS, np.bool_)
    w = ProjectionArrays(every, every, np.ones(CELLS, np.float32), flags, flags)
    vocab = VocabArrays(flags, every, np.ones(CELLS, np.int32))
    loss = open_loss("p-kl", LossSetup(w, vocab, CELLS, SIZE, torch.device("cpu"), LossOptions()))
    z = torch.tensor(np.log(q_V))[None]
    return float(loss.terms(make_view(z, [0], columns=target))[0])


def cells(target: dict[str, Any]) -> dict[int, float]:
    return dict(zip(target["pkl_ids"].tolist(), np.exp(target["pkl_logprob"].astype(np.float64)).tolist(), strict=True))


def outside(q_V: Row, target: dict[str, Any]) -> float:
    """The student's REST, as the loss takes it: where all cells are kept it is not 0."""
    return max(NOTHING, float(np.delete(q_V, list(cells(target))).sum()))


def some(seed: int) -> tuple[Row, NDArray[np.int64], NDArray[np.int64], Row]:
    """A teacher's row, the tokens kept of it, the prefix of each unreached token, a student's row."""
    rng = np.random.default_rng(seed)
    p_U = rng.dirichlet(np.full(SIZE, rng.choice([0.2, 1.0, 5.0])))
    p_U = (p_U + 1e-6) / (p_U + 1e-6).sum()
    kept = np.argsort(-p_U, kind="stable")[: int(rng.integers(1, SIZE))]
    prefix = rng.integers(0, CELLS, UNREACHED)
    whole = p_U[:CELLS] + np.bincount(prefix, p_U[CELLS:], CELLS)
    q_V = whole if rng.random() < 0.3 else rng.dirichlet(np.full(CELLS, rng.choice([0.3, 3.0]))) + 1e-5
    return p_U, kept, prefix, q_V / q_V.sum()


def test_a_student_that_is_the_whole_row_pays_for_what_was_not_kept(make_view: Any) -> None:
    """Teacher: half token 0, .2 token 1, .2 on token 12, which no student token reaches and begins with 0, .1 token 2.

    Kept are 0 and 1. The whole row is (.7, .2, .1), and so is the student: KL 0. Stored are .5 and .2 with REST .3,
    where the student has .1: .5 log(5/7) + .3 log 3.
    """
    p_U, q_V = np.full(SIZE, 1e-13), np.full(CELLS, 1e-13)
    p_U[[0, 1, CELLS, 2]] = 0.5, 0.2, 0.2, 0.1
    q_V[:3] = 0.7, 0.2, 0.1
    kept, prefix = np.array([0, 1]), np.zeros(UNREACHED, np.int64)
    stored = pkl(q_V, columns(p_U, kept, "prefix", prefix), make_view)
    assert pkl(q_V, columns(p_U, np.arange(SIZE), "prefix", prefix), make_view) == pytest.approx(0, abs=FLOAT32)
    assert stored == pytest.approx(0.5 * math.log(5 / 7) + 0.3 * math.log(3), abs=FLOAT32)
    assert stored <= 0.2 * (1 + math.log(3)) + FLOAT32, "the bound of docs/losses.md, m = .2"


@pytest.mark.parametrize("seed", range(80))
def test_the_bound_under_prefix(make_view: Any, seed: int) -> None:
    p_U, kept, prefix, q_V = some(seed)
    target = columns(p_U, kept, "prefix", prefix)
    stored = pkl(q_V, target, make_view)
    whole = pkl(q_V, columns(p_U, np.arange(SIZE), "prefix", prefix), make_view)
    cell_U = np.concatenate([np.arange(CELLS), prefix])
    unkept = np.setdiff1d(np.arange(SIZE), kept)
    inside = [t for t in unkept if cell_U[t] in cells(target)]  # unkept, but of a cell that is kept
    m_V = np.bincount(cell_U[inside], p_U[inside], CELLS) if inside else np.zeros(CELLS)
    whole_V = np.bincount(cell_U, p_U, CELLS)
    m, rest = m_V.sum(), p_U[unkept].sum()
    above = m * (1 + math.log(rest / outside(q_V, target))) + float(m_V @ np.log(q_V / whole_V)) if m else 0.0
    assert stored - whole <= above + FLOAT32
    assert m <= rest + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_under_rest_it_is_never_above(make_view: Any, seed: int) -> None:
    p_U, kept, prefix, q_V = some(seed)
    stored, whole = (pkl(q_V, columns(p_U, tokens, "rest", prefix), make_view) for tokens in (kept, np.arange(SIZE)))
    if cells(columns(p_U, kept, "rest", prefix)):
        assert stored <= whole + FLOAT32


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_under_none(make_view: Any, seed: int) -> None:
    """What was not kept may be mass that would have been left out: REST holds the share e too much."""
    p_U, kept, prefix, q_V = some(seed)
    target = columns(p_U, kept, "none", prefix)
    if not cells(target):
        return
    stored, whole = pkl(q_V, target, make_view), pkl(q_V, columns(p_U, np.arange(SIZE), "none", prefix), make_view)
    left_out = kept[kept >= CELLS]
    unkept = np.setdiff1d(np.arange(CELLS, SIZE), kept)
    e = p_U[unkept].sum() / (1 - p_U[left_out].sum())
    assert stored <= (1 - e) * whole - e * math.log(outside(q_V, target)) + FLOAT32
