"""Rows of a teacher from a slice of the vocabulary on each of several devices, or from one that is the whole of it.

Under tensor parallelism every device holds the logits of some columns of the output head. Gathering them costs more
than everything that is read from them. What crosses the wire here are the label's logit, a few sums and K candidates of
each row; every device ends with the same figures. A scan reads the columns that lie here: ``TorchScan`` with torch,
``KernelScan`` of ``row_kernels`` with Triton.

The figures are those of ``RowReader``. Its normaliser is a float32 sum in an order of its own, so ours may differ from
it by the last bits; given the normaliser, log-probabilities, ids, their order and ranks are exactly those.

Shapes: N positions, U columns of this slice, K entries asked for, W slices, n temperatures, D sampled tokens of a row,
F = 5 + n sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.draws import thresholds
from xtoken.pipeline.teachers.logit_rows import RowFigures, RowReader, top_k

LSE, SPACE, BEFORE, ABOVE, BELOW, TAU = range(6)
"""Columns of a slice's sums: log-sum-exp of its logits, of those of tokens that start with a space, how many logits
stand before the label's (larger, or equal and of a lower id), the next larger one (+inf: none), the next smaller one
(-inf: none), and from TAU on log-sum-exp of logits / tau."""

NO_KEY = -(2**63)
_PARTS = 16  # temporary copies exist for this part of the rows at once
_RECOUNTED = 64  # rows whose log-probabilities exist at once for a second count
_LOW = 0xFFFF_FFFF


@dataclass(frozen=True)
class Asked:
    """What is asked of a slice.

    Attributes:
        k: entries, at most U.
        space_P: int64 [P], columns of tokens that start with a space.
        space_bits: int32 [U / 32, rounded up], a bit for each column: whether it is one of those, lowest bit first.
        temperatures: n of them.
        size: samples are of the columns before this one.
    """

    k: int
    space_P: Tensor
    space_bits: Tensor
    temperatures: tuple[float, ...]
    size: int

    @classmethod
    def of(cls, reader: RowReader, width: int, first: int) -> "Asked":
        """What of ``reader``'s wishes is for a slice of ``width`` columns, whose first has the id ``first``."""
        column_P = reader.space_P - first
        column_P = column_P[(column_P >= 0) & (column_P < width)]
        bit_U = torch.zeros(-(-width // 32) * 32, dtype=torch.int64, device=column_P.device)
        bit_U[column_P] = 1
        weight_32 = 1 << torch.arange(32, device=column_P.device)
        bits = (bit_U.view(-1, 32) * weight_32).sum(dim=1)
        size = 0 if reader.sampler is None else min(max(reader.sampler.size - first, 0), width)
        return cls(min(reader.k, width), column_P, _wrapped(bits), reader.temperatures, size)


@dataclass(frozen=True)
class Label:
    """The label of each row: int64 [N] its column counted from this slice's first, and float32 [N] its logit."""

    column_N: Tensor
    logit_N: Tensor


class Scan(Protocol):
    """A reading of the logits [N, U] of one slice, float32 or bfloat16, which stay as they are.

    Attributes:
        sums_NF: float64, see ``LSE`` and those after it.
    """

    sums_NF: Tensor

    def keys(self, lse_N: Tensor) -> Tensor:
        """int64 [N, k], descending: the k best of this slice by log-probability and column, as ``pack`` has them."""
        ...

    def masses(self, lse_N: Tensor) -> Tensor:
        """float64 [N, 2]: sum of p, and of -p log p, over the columns that may be sampled."""
        ...

    def pick(self, lse_N: Tensor, level_ND: Tensor) -> Tensor:
        """int64 [N, D]: the first column at which the sum of p reaches a level, a float64 above 0. Follows ``masses``.

        A level that lies elsewhere gives any column.
        """
        ...


class OpenScan(Protocol):
    """A kind of scan."""

    def __call__(self, logits_NU: Tensor, label: Label, asked: Asked) -> Scan: ...


class SlicedReader:
    """Reads what a ``RowReader`` reads, each device of a group its own slice of the vocabulary."""

    def __init__(
        self, asked: RowReader, scan: OpenScan, width: int, first: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        """
        Args:
            asked: what is asked for; its ids are those of the whole vocabulary.
            scan: reads a slice.
            width: U.
            first: the id of this slice's first column.
            group: the devices, by rank in the order of their slices; None = this slice is the whole vocabulary.
        """
        self.scan, self._reader, self._width, self._first, self._group = scan, asked, width, first, group
        self._asked = Asked.of(asked, width, first)

    def read(self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None) -> TeacherRows:
        """See ``RowReader.read``; the logits are this slice's, float32 or bfloat16, and stay as they are."""
        return self.figures(logits_NU, target_N, uniform_N).rows(self._reader)

    def figures(self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None) -> RowFigures:
        """See ``RowReader.figures``. All ranks call it with the same rows and get the same.

        Columns that pad the head, behind the last token, hold -inf.
        """
        assert logits_NU.shape[1] == self._width
        label = self._label(logits_NU, target_N - self._first)
        scan = self.scan(logits_NU, label, self._asked)
        sums_NF = merged_sums(self._gathered(scan.sums_NF))
        lse_N = sums_NF[:, LSE].float()
        logprob_NK, ids_NK = unpack(self._keys(scan, lse_N))
        draws_ND, entropy_N = self._sampled(scan, lse_N, uniform_N)
        return RowFigures(
            ids=ids_NK,
            logprob=logprob_NK,
            target_logprob=label.logit_N - lse_N,
            target_rank=self._ranks(logits_NU, label, sums_NF, lse_N),
            lse=lse_N,
            # from the float32 normaliser that is stored: its rounding is in all figures then
            space_logprob=(sums_NF[:, SPACE] - lse_N.double()).float().clamp_(max=0.0),
            tau_lognorm=self._tau_lognorm(sums_NF, lse_N),
            draws=draws_ND,
            entropy=entropy_N,
        )

    def _label(self, logits_NU: Tensor, column_N: Tensor) -> Label:
        here_N = (column_N >= 0) & (column_N < self._width)
        logit_N = logits_NU.gather(1, column_N.clamp(0, self._width - 1)[:, None])[:, 0].float()
        logit_N = logit_N.masked_fill(~here_N, -torch.inf)
        return Label(column_N, self._reduced(logit_N, dist.ReduceOp.MAX))

    def _keys(self, scan: Scan, lse_N: Tensor) -> Tensor:
        k = self._reader.k
        key_NK = scan.keys(lse_N) - self._first  # of ids instead of columns
        if self._group is None:
            return key_NK
        key_NK = torch.nn.functional.pad(key_NK, (0, k - key_NK.shape[1]), value=NO_KEY)
        return torch.cat(list(self._gathered(key_NK)), dim=1).sort(dim=1, descending=True).values[:, :k]

    def _ranks(self, logits_NU: Tensor, label: Label, sums_NF: Tensor, lse_N: Tensor) -> Tensor:
        """int64 [N] from 1. Logits that differ may share a log-probability, and then the lower id comes first.

        Rounding keeps the order, so a row has such a logit if and only if the label's neighbour is one.
        """
        logprob_N = label.logit_N - lse_N
        neighbour_N2 = sums_NF[:, ABOVE : BELOW + 1].float() - lse_N[:, None]
        again = torch.nonzero((neighbour_N2 == logprob_N[:, None]).any(dim=1)).flatten()
        before_N = sums_NF[:, BEFORE].long()
        if len(again):
            parts = [
                count_before(logits_NU[part].float() - lse_N[part, None], logprob_N[part], label.column_N[part])
                for part in torch.split(again, _RECOUNTED)
            ]
            before_N[again] = self._reduced(torch.cat(parts), dist.ReduceOp.SUM)
        return before_N + 1

    def _tau_lognorm(self, sums_NF: Tensor, lse_N: Tensor) -> Tensor:
        tau_n = torch.tensor(self._asked.temperatures, dtype=torch.float64, device=lse_N.device)
        return (sums_NF[:, TAU:] - lse_N.double()[:, None] / tau_n).float()

    def _sampled(self, scan: Scan, lse_N: Tensor, uniform_N: NDArray[np.float64] | None) -> tuple[Tensor, Tensor]:
        """See ``xtoken.pipeline.teachers.draws``: slices stand in the order of ids, so sums of p go on in the next."""
        sampler = self._reader.sampler
        if sampler is None:
            return lse_N.new_empty((len(lse_N), 0), dtype=torch.int64), lse_N.new_empty(0)
        assert uniform_N is not None, "a sampler needs a number for each row"
        mass_WN2 = self._gathered(scan.masses(lse_N))
        until_WN = mass_WN2[:, :, 0].cumsum(dim=0)
        mass_N = until_WN[-1]
        share_ND = torch.from_numpy(thresholds(uniform_N, sampler.draws)).to(lse_N.device)
        level_ND = share_ND * mass_N[:, None]
        here = 0 if self._group is None else dist.get_rank(self._group)
        since_N = until_WN[here - 1] if here else torch.zeros_like(mass_N)
        column_ND = scan.pick(lse_N, level_ND - since_N[:, None])
        mine_ND = (level_ND > since_N[:, None]) & (level_ND <= until_WN[here][:, None])
        id_ND = self._reduced((column_ND + self._first).masked_fill(~mine_ND, -1), dist.ReduceOp.MAX)
        entropy_N = (mass_WN2[:, :, 1].sum(dim=0) / mass_N + mass_N.log()).clamp_(min=0.0)
        return id_ND.sort(dim=1).values, entropy_N.float()

    def _gathered(self, value: Tensor) -> Tensor:
        """[W, ...]: everyone's, by rank."""
        if self._group is None:
            return value[None]
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, value.contiguous(), group=self._group)
        return torch.stack(parts)

    def _reduced(self, value: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        if self._group is not None:
            dist.all_reduce(value, by, group=self._group)
        return value


class TorchScan:
    """The scan in torch, in temporary copies of a part of the rows."""

    def __init__(self, logits_NU: Tensor, label: Label, asked: Asked) -> None:
        self._logits_NU, self._asked = logits_NU, asked
        self.sums_NF = self._in_parts(self._sums, label.logit_N, label.column_N)

    def keys(self, lse_N: Tensor) -> Tensor:
        return pack(*top_k(self._logits_NU.float() - lse_N[:, None], self._asked.k))

    def masses(self, lse_N: Tensor) -> Tensor:
        return self._in_parts(self._masses, lse_N)

    def pick(self, lse_N: Tensor, level_ND: Tensor) -> Tensor:
        return self._in_parts(self._pick, lse_N, level_ND)

    def _in_parts(self, read: Callable[..., Tensor], *of_rows: Tensor) -> Tensor:
        splits = min(_PARTS, len(self._logits_NU))
        parts = zip(*(value.tensor_split(splits) for value in (self._logits_NU, *of_rows)), strict=True)
        return torch.cat([read(logits.float(), *values) for logits, *values in parts])

    def _sums(self, logits_NU: Tensor, logit_N: Tensor, column_N: Tensor) -> Tensor:
        label_N1 = logit_N[:, None]
        columns = [
            *_log_sums(logits_NU, 1.0),
            *_log_sums(logits_NU.index_select(1, self._asked.space_P), 1.0),
            count_before(logits_NU, logit_N, column_N),
            logits_NU.masked_fill(logits_NU <= label_N1, torch.inf).amin(dim=1),
            logits_NU.masked_fill(logits_NU >= label_N1, -torch.inf).amax(dim=1),
            *_log_sums(logits_NU, *self._asked.temperatures),
        ]
        return torch.stack([column.double() for column in columns], dim=1)

    def _p(self, logits_NU: Tensor, lse_N: Tensor) -> Tensor:
        return (logits_NU[:, : self._asked.size] - lse_N[:, None]).double().exp_()

    def _masses(self, logits_NU: Tensor, lse_N: Tensor) -> Tensor:
        p_NU = self._p(logits_NU, lse_N)
        surprise_N = torch.special.entr(p_NU).sum(dim=1)
        mass_N = p_NU.cumsum_(dim=1)[:, -1] if self._asked.size else torch.zeros_like(surprise_N)
        return torch.stack([mass_N, surprise_N], dim=1)

    def _pick(self, logits_NU: Tensor, lse_N: Tensor, level_ND: Tensor) -> Tensor:
        if not self._asked.size:
            return torch.zeros_like(level_ND, dtype=torch.int64)
        until_NU = self._p(logits_NU, lse_N).cumsum_(dim=1)
        return torch.searchsorted(until_NU, torch.minimum(level_ND, until_NU[:, -1:]))


def _log_sums(logits_NU: Tensor, *temperatures: float) -> list[Tensor]:
    """float64 [N] of each temperature: log-sum-exp of logits / tau."""
    if not logits_NU.shape[1]:
        return [torch.full((len(logits_NU),), -torch.inf, dtype=torch.float64, device=logits_NU.device)]
    # what lies below the largest logit adds up as exactly as float32 can; where all are -inf, so is the sum
    peak_N1 = logits_NU.amax(dim=1, keepdim=True)
    peak_N1 = peak_N1.masked_fill(peak_N1 == -torch.inf, 0.0)
    below_NU, peak_N = logits_NU - peak_N1, peak_N1[:, 0].double()
    return [below_NU.div(tau).logsumexp(dim=1).double() + peak_N / tau for tau in temperatures]


def merged_sums(sums_WNF: Tensor) -> Tensor:
    """[N, F]: the sums of slices as those of the vocabulary."""
    sums_NF = sums_WNF.logsumexp(dim=0)
    sums_NF[:, BEFORE] = sums_WNF[:, :, BEFORE].sum(dim=0)
    sums_NF[:, ABOVE] = sums_WNF[:, :, ABOVE].amin(dim=0)
    sums_NF[:, BELOW] = sums_WNF[:, :, BELOW].amax(dim=0)
    return sums_NF


def count_before(value_NU: Tensor, label_N: Tensor, column_N: Tensor) -> Tensor:
    """int64 [N]: how many of a slice stand before the label, which may lie in another slice."""
    lower_NU = torch.arange(value_NU.shape[1], device=value_NU.device) < column_N[:, None]
    label_N1 = label_N[:, None]
    return ((value_NU > label_N1) | ((value_NU == label_N1) & lower_NU)).count_nonzero(dim=1)


def pack(logprob: Tensor, column: Tensor) -> Tensor:
    """int64 keys that fall as entries do: by float32 log-probability, ties by lower column. No two are the same."""
    bits = logprob.view(torch.int32)
    rising = torch.where(bits >= 0, bits, bits ^ 0x7FFF_FFFF)  # the bits of negative floats rise as they fall
    return (rising.long() << 32) | (_LOW - column)


def unpack(key: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 log-probabilities and int64 columns of keys."""
    rising = (key >> 32).to(torch.int32)
    bits = torch.where(rising >= 0, rising, rising ^ 0x7FFF_FFFF)
    return bits.view(torch.float32), _LOW - (key & _LOW)


def _wrapped(bits: Tensor) -> Tensor:
    """The int32 that have the lower 32 bits of int64."""
    return (bits - ((bits >> 31) << 32)).to(torch.int32)
