"""Rows of a teacher from its raw logits, exact in ties.

Shapes: N positions, U teacher vocabulary, K entries asked for, P tokens that start with a space, n temperatures,
D sampled tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.draws import Sampler, counted, cut_draws, join_draws, refuse_empty, thresholds
from xtoken.schemas.errors import XtokenError

# Logits that exist at once: 256 MB on a CPU, so that the head's matrix is read for many rows; 512 MB on a GPU, where
# some four arrays of this size do.
BLOCK_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 27}
# On a CPU figures are computed of so many at once: arrays above 32 MB are mapped anew each time, which takes longer
# than the arithmetic.
_PART_LOGITS = 1 << 22
_TAU_SPLIT = 16  # a temperature's exponentials, or a float64 copy, exist for this part of the rows at once


@dataclass(frozen=True)
class RowFigures:
    """What is computed of N rows, on the device of their logits. Not a number where the logits are none.

    Attributes:
        ids: int64 [N, K], most probable first, ties by lower id.
        logprob: float32 [N, K].
        target_logprob: float32 [N], of the labels.
        target_rank: int64 [N], from 1.
        lse: float32 [N], log-sum-exp of the logits.
        space_logprob: float32 [N].
        tau_lognorm: float32 [N, n].
        draws: int64 [N, D], sampled ids, which ascend; no column where nothing is sampled.
        entropy: float32 [N], of what is sampled from, NaN where that has no mass; empty where nothing is sampled.
    """

    ids: Tensor
    logprob: Tensor
    target_logprob: Tensor
    target_rank: Tensor
    lse: Tensor
    space_logprob: Tensor
    tau_lognorm: Tensor
    draws: Tensor
    entropy: Tensor

    @classmethod
    def joined(cls, parts: "Sequence[RowFigures]") -> "RowFigures":
        """Consecutive rows as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)))

    def rows(self, asked: "RowReader") -> TeacherRows:
        """What was asked for, in numpy.

        Raises:
            XtokenError: the logits are not finite numbers, or the tokenizer's ids have no mass to sample from.
        """
        lse_N = _floats(self.lse)
        refuse_overflow(lse_N)
        draws = None
        if asked.sampler is not None:
            entropy_N = _floats(self.entropy)
            refuse_empty(entropy_N, asked.sampler.size)
            draws = counted(_ints(self.draws), entropy_N)
        return TeacherRows(
            ids=_ints(self.ids),
            logprob=_floats(self.logprob),
            target_logprob=_floats(self.target_logprob),
            target_rank=_ints(self.target_rank),
            lse=lse_N,
            space_logprob=_floats(self.space_logprob),
            tau_lognorm=_floats(self.tau_lognorm) if asked.temperatures else None,
            draws=draws,
        )


@dataclass(frozen=True)
class RowReader:
    """Turns logits into the figures of ``TeacherRows``.

    Attributes:
        k: entries per row.
        space_P: int64 [P], ids of the tokens that start with a space.
        temperatures: those of ``TeacherRows.tau_lognorm``.
        sampler: of ``TeacherRows.draws``; None = nothing is sampled.
    """

    k: int
    space_P: Tensor
    temperatures: tuple[float, ...] = ()
    sampler: Sampler | None = None

    def read(self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None) -> TeacherRows:
        """Rows of N positions from float32 logits, which are overwritten, and the int64 labels (tokens of the text).

        Order and rank follow the float32 log-probabilities, ties by lower id. ``uniform_N`` are the positions'
        numbers from the sampler, where there is one.

        Raises:
            XtokenError: the logits are not finite numbers, or the tokenizer's ids have no mass to sample from.
        """
        return self.figures(logits_NU, target_N, uniform_N).rows(self)

    def figures(self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None) -> RowFigures:
        """As ``read``, left where the logits are, and nothing refused: whoever reads the figures looks at them."""
        rows, size = logits_NU.shape
        step = max(1, _PART_LOGITS // size) if logits_NU.device.type == "cpu" else max(1, rows)
        parts = [slice(start, start + step) for start in range(0, max(1, rows), step)]
        return RowFigures.joined(
            [
                self._figures(logits_NU[part], target_N[part], None if uniform_N is None else uniform_N[part])
                for part in parts
            ]
        )

    def _figures(self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None) -> RowFigures:
        lse_N = logits_NU.logsumexp(dim=-1)
        logprob_NU = logits_NU.sub_(lse_N[:, None])
        top_NK, ids_NK = top_k(logprob_NU, self.k)
        draws_ND, entropy_N = lse_N.new_empty((len(lse_N), 0), dtype=torch.int64), lse_N.new_empty(0)
        if self.sampler is not None:
            draws_ND, entropy_N = draw(logprob_NU, uniform_N, self.sampler)
        return RowFigures(
            ids=ids_NK,
            logprob=top_NK,
            target_logprob=logprob_NU.gather(1, target_N[:, None])[:, 0],
            target_rank=_ranks(logprob_NU, ids_NK, target_N),
            lse=lse_N,
            space_logprob=logprob_NU.index_select(1, self.space_P).logsumexp(dim=-1).clamp_(max=0.0),
            tau_lognorm=tau_lognorm(logprob_NU, self.temperatures),
            draws=draws_ND,
            entropy=entropy_N,
        )


def refuse_overflow(lse_N: NDArray[np.float32]) -> None:
    """Raise XtokenError where a row's logits are no numbers."""
    if not np.isfinite(lse_N).all():
        raise XtokenError(
            "the teacher's logits hold NaN or infinity; a half-precision overflow? try --dtype float32 or bfloat16"
        )


def tau_lognorm(logprob_NU: Tensor, temperatures: Sequence[float]) -> Tensor:
    """[N, n] nats: log of the sum of p^(1/tau) over a row.

    From the float32 log-probabilities that are stored rather than the logits: the rounding of their normaliser is in
    both then, and does not pass for mass that was not kept.
    """
    if not temperatures:
        return logprob_NU.new_empty((len(logprob_NU), 0))
    parts = torch.tensor_split(logprob_NU, min(_TAU_SPLIT, len(logprob_NU)))
    norms = [[part.div(tau).logsumexp(dim=-1) for part in parts] for tau in temperatures]
    return torch.stack([torch.cat(norm) for norm in norms], dim=1)


def draw(logprob_NU: Tensor, uniform_N: NDArray[np.float64] | None, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Tokens sampled from rows of log-probabilities, added up in float64 (see ``xtoken.pipeline.teachers.draws``).

    Returns:
        int64 [N, D] ids, ascending, and float32 [N] entropy in nats, NaN in rows without mass on the sampler's ids.
    """
    assert uniform_N is not None, "a sampler needs a number for each row"
    share_ND = torch.from_numpy(thresholds(uniform_N, sampler.draws)).to(logprob_NU.device)
    splits = min(_TAU_SPLIT, len(logprob_NU))
    parts = zip(logprob_NU.tensor_split(splits), share_ND.tensor_split(splits), strict=True)
    drawn = [_draw_part(logprob[:, : sampler.size], share) for logprob, share in parts]
    return torch.cat([ids for ids, _ in drawn]), torch.cat([entropy for _, entropy in drawn])


def _draw_part(logprob_NU: Tensor, share_ND: Tensor) -> tuple[Tensor, Tensor]:
    p_NU = logprob_NU.double().exp_()
    surprise_N = torch.special.entr(p_NU).sum(dim=-1)
    mass_N = p_NU.cumsum_(dim=-1)[:, -1].clone()
    # entropy of p / mass: the mass is 1 to rounding, or less under a padded head; without mass 0 / 0
    entropy_N = (surprise_N / mass_N + mass_N.log()).clamp_(min=0.0)
    ids_ND = torch.searchsorted(p_NU, share_ND * mass_N[:, None])
    # a GPU adds up in blocks, whose seams may be off by one rounding
    return ids_ND.clamp_(max=p_NU.shape[1] - 1).sort(dim=-1).values, entropy_N.float()


def top_k(value_NU: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their ids, descending, ties by lower id (torch.topk promises no order).

    Returns:
        (values [N, K], ids int64 [N, K]).
    """
    width = value_NU.shape[1]
    more = min(k + 1, width)
    top, ids = value_NU.topk(more, dim=-1, sorted=True)
    cut_N = top[:, k - 1]
    # A tie across the cut: topk kept some of the equal entries, the lowest ids are wanted.
    unsure = torch.nonzero(cut_N == top[:, k]).flatten().tolist() if more > k else []
    ids = ids[:, :k].contiguous()
    for row in unsure:
        above = int((top[row, :k] > cut_N[row]).sum())
        ids[row, above:] = torch.nonzero(value_NU[row] == cut_N[row]).flatten()[: k - above]
    ids = ids.sort(dim=-1).values
    order = value_NU.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    return value_NU.gather(1, ids), ids


def join(parts: list[TeacherRows]) -> TeacherRows:
    """Consecutive rows as one."""
    return TeacherRows(
        ids=np.concatenate([part.ids for part in parts]),
        logprob=np.concatenate([part.logprob for part in parts]),
        target_logprob=np.concatenate([part.target_logprob for part in parts]),
        target_rank=np.concatenate([part.target_rank for part in parts]),
        lse=_join([part.lse for part in parts]),
        space_logprob=_join([part.space_logprob for part in parts]),
        tau_lognorm=_join([part.tau_lognorm for part in parts]),
        draws=join_draws([part.draws for part in parts]),
    )


def cut(rows: TeacherRows, start: int, stop: int) -> TeacherRows:
    """Rows ``start`` to ``stop``."""
    return TeacherRows(
        ids=rows.ids[start:stop],
        logprob=rows.logprob[start:stop],
        target_logprob=rows.target_logprob[start:stop],
        target_rank=rows.target_rank[start:stop],
        lse=None if rows.lse is None else rows.lse[start:stop],
        space_logprob=None if rows.space_logprob is None else rows.space_logprob[start:stop],
        tau_lognorm=None if rows.tau_lognorm is None else rows.tau_lognorm[start:stop],
        draws=cut_draws(rows.draws, start, stop),
    )


def _ranks(logprob_NU: Tensor, ids_NK: Tensor, target_N: Tensor) -> Tensor:
    """Ranks from 1: a target among the top k stands there; the others are counted over the vocabulary."""
    hit_NK = ids_NK == target_N[:, None]
    rank_N = 1 + hit_NK.int().argmax(dim=-1)
    missed = torch.nonzero(~hit_NK.any(dim=-1)).flatten()
    if len(missed):
        counted_ranks = _counted_on_cpu if missed.device.type == "cpu" else _counted
        rank_N[missed] = counted_ranks(logprob_NU, target_N, missed)
    return rank_N


def _counted(logprob_NU: Tensor, target_N: Tensor, missed: Tensor) -> Tensor:
    logprob_NU, target_N = logprob_NU[missed], target_N[missed]
    value_N1 = logprob_NU.gather(1, target_N[:, None])
    lower_NU = torch.arange(logprob_NU.shape[1], device=target_N.device) < target_N[:, None]
    before_NU = (logprob_NU > value_N1) | ((logprob_NU == value_N1) & lower_NU)
    return 1 + before_NU.count_nonzero(dim=-1)


def _counted_on_cpu(logprob_NU: Tensor, target_N: Tensor, missed: Tensor) -> Tensor:
    """The same row by row, as numpy counts true values some ten times as fast as torch does."""
    rows_NU, found = logprob_NU.numpy(), []
    for row, target in zip(missed.tolist(), target_N[missed].tolist(), strict=True):
        row_U = rows_NU[row]
        before = np.count_nonzero(row_U > row_U[target]) + np.count_nonzero(row_U[:target] == row_U[target])
        found.append(1 + int(before))
    return torch.tensor(found)


def _floats(value: Tensor) -> NDArray[np.float32]:
    assert value.dtype == torch.float32
    return value.cpu().numpy()


def _ints(value: Tensor) -> NDArray[np.int32]:
    return value.to(torch.int32).cpu().numpy()


def _join(parts: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts))
    return np.concatenate(present) if present else None
