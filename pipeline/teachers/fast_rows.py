"""The fastest reader of rows that is right on this machine: Triton kernels where they read made rows as they should.

A kernel is compiled for the device that it meets, by the Triton that is there. So every process asks it once, before
the first real row, to read rows full of ties, -inf and extreme values.

Shapes: as in ``sliced_rows``; C cumulative sums of a row.
"""

import logging
from functools import cache
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.draws import Sampler, thresholds
from xtoken.pipeline.teachers.logit_rows import RowFigures, RowReader, top_k
from xtoken.pipeline.teachers.sliced_rows import OpenScan, SlicedReader, TorchScan, count_before

_SUMS = 1e-5  # nats, and of the value: float32 sums against float64
_STEP = 1e-12  # of the mass: float64 sums in another order
_ROWS = ((3001, 20), (40_000, 64))  # columns and entries, for tiles of 64 and of 256 columns
_TEMPERATURES, _DRAWS = (0.5, 2.0), 5
_SHARE, _NEAR = 0.4, 1e-9  # of the mass: about where a step is looked for, and how near to it a level lies
_LOG = logging.getLogger("xtoken")


class Reader(Protocol):
    """``RowReader`` or ``SlicedReader``."""

    def read(
        self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None
    ) -> TeacherRows: ...

    def figures(
        self, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64] | None = None
    ) -> RowFigures: ...


def open_reader(
    asked: RowReader, device: torch.device, width: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> Reader:
    """The reader for a slice of ``width`` columns of the vocabulary, whose first has the id ``first``.

    Args:
        asked: what is read; its ids are those of the whole vocabulary.
        device: of the logits.
        width: columns here.
        first: the id of the first.
        group: devices that hold the vocabulary's slices, by rank in their order; None = it is all here.
    """
    if agrees(device):
        return SlicedReader(asked, _kernels(), width, first, group)
    return asked if group is None else SlicedReader(asked, TorchScan, width, first, group)


@cache
def agrees(device: torch.device) -> bool:
    """Whether Triton is there and its kernels read made rows on a device as torch does; asked once per process."""
    try:
        kernels = _kernels()
    except ImportError:
        return False
    try:
        found = next((fault for width, k in _ROWS if (fault := difference(kernels, device, width, k))), None)
    except Exception as error:  # whatever a compiler or driver has: torch reads the rows
        found = f"{type(error).__name__}: {error}"
    if found is not None:
        _LOG.warning("Triton kernels are not used, torch reads the rows: %s", found)
    return found is None


def _kernels() -> OpenScan:
    from xtoken.pipeline.teachers.row_kernels import KernelScan

    return KernelScan


def difference(scan: OpenScan, device: torch.device, width: int, k: int) -> str | None:
    """What a scan reads wrongly of made rows of so many columns; None where everything is right."""
    for dtype in (torch.float32, torch.bfloat16):
        logits_NU, target_N, uniform_N = made_rows(width, dtype, device)
        space_P = torch.arange(0, width, 3, device=device)
        asked = RowReader(k, space_P, _TEMPERATURES, Sampler(_DRAWS, 0, _sampled_from(width)))
        rows = SlicedReader(asked, scan, width).figures(logits_NU, target_N, uniform_N)
        wrong = wrong_figures(rows, asked, logits_NU, target_N, uniform_N)
        if wrong:
            return f"{', '.join(wrong)} of {dtype} logits [{len(target_N)}, {width}], k {k}"
    return None


def made_rows(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Logits [N, U] that are hard to read, labels [N], numbers [N] to sample with; the last columns pad the head."""
    rng = np.random.default_rng(width)
    plain_U = rng.normal(0, 4, width)
    plain_U[width // 5] = plain_U.max() + 1  # each row has mass that may be sampled
    half_U = np.where(np.arange(width) < width // 2, plain_U, -np.inf)
    rows_NU = np.stack(
        [
            plain_U,
            plain_U.round(),  # ties
            np.zeros(width),  # nothing but ties
            half_U,
            np.where(np.arange(width) % (width // 3) == 1, plain_U, -np.inf),  # fewer than k that are possible
            plain_U * 2000,
            plain_U * 1e-6,  # logits that differ and share a log-probability
            np.where(np.arange(width) == width // 3, 120.0, plain_U),  # one that leaves the others no mass in float32
            half_U[::-1] - 300.0,
        ]
    )
    rows_NU[:, width - 7 :] = -np.inf
    logits_NU = torch.from_numpy(rows_NU).to(device, dtype)
    target_N = torch.from_numpy(rng.integers(0, width - 7, len(rows_NU))).to(device)
    target_N[0] = logits_NU[0].argmax()
    return logits_NU, target_N, _close_calls(logits_NU.float())


def _close_calls(logits_NU: Tensor) -> NDArray[np.float64]:
    """Numbers by which a level lies a billionth of the mass above or below a step: sums in float32 miss it."""
    p_NU = (logits_NU - logits_NU.logsumexp(dim=1, keepdim=True))[:, : _sampled_from(logits_NU.shape[1])].double().exp()
    until_NU = (p_NU.cumsum(dim=1) / p_NU.sum(dim=1, keepdim=True)).cpu().numpy()
    at_N1 = (until_NU < _SHARE).sum(axis=1, keepdims=True)
    sign_N = np.where(np.arange(len(until_NU)) % 2 == 0, 1, -1)
    level_N = _DRAWS * (np.take_along_axis(until_NU, at_N1, axis=1)[:, 0] + sign_N * _NEAR)
    number_N: NDArray[np.float64] = np.ceil(level_N) - level_N
    return number_N


def _sampled_from(width: int) -> int:
    return width - width // 8


def wrong_figures(
    rows: RowFigures, asked: RowReader, logits_NU: Tensor, target_N: Tensor, uniform_N: NDArray[np.float64]
) -> list[str]:
    """Names of figures of the whole vocabulary that are wrong.

    Order and ranks must be exactly those of the float32 logits less the float32 normaliser; sums are compared with
    float64.
    """
    logits_NU = logits_NU.float()
    logprob_NU = logits_NU - rows.lse[:, None]
    wide_NU, lse_N1 = logits_NU.double(), rows.lse.double()[:, None]
    top_NK, ids_NK = top_k(logprob_NU, asked.k)
    target_logprob_N = logprob_NU.gather(1, target_N[:, None])[:, 0]
    tau_Nn = [(wide_NU / tau).logsumexp(dim=1) - lse_N1[:, 0] / tau for tau in asked.temperatures]
    checks = {
        "lse": _close(rows.lse, wide_NU.logsumexp(dim=1)),
        "ids": torch.equal(rows.ids, ids_NK),
        "logprob": torch.equal(rows.logprob, top_NK),
        "target_logprob": torch.equal(rows.target_logprob, target_logprob_N),
        "target_rank": torch.equal(rows.target_rank, 1 + count_before(logprob_NU, target_logprob_N, target_N)),
        "space_logprob": _close(rows.space_logprob, (_space(wide_NU, asked.space_P) - lse_N1[:, 0]).clamp(max=0.0)),
        "tau_lognorm": not tau_Nn or _close(rows.tau_lognorm, torch.stack(tau_Nn, dim=1)),
        "draws": asked.sampler is None or _follow(rows, asked.sampler, logprob_NU, uniform_N),
    }
    return [name for name, holds in checks.items() if not holds]


def _space(wide_NU: Tensor, space_P: Tensor) -> Tensor:
    return wide_NU.index_select(1, space_P).logsumexp(dim=1)


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=_SUMS, atol=_SUMS)


def _follow(rows: RowFigures, sampler: Sampler, logprob_NU: Tensor, uniform_N: NDArray[np.float64]) -> bool:
    """Whether each sampled token is where the sum of p passes a level, up to the rounding of that sum."""
    ids_ND, entropy_N, wide_NU = rows.draws, rows.entropy, logprob_NU[:, : sampler.size].double()
    if not bool((ids_ND < sampler.size).all()):
        return False
    p_NU = wide_NU.exp()
    until_NC = torch.nn.functional.pad(p_NU.cumsum(dim=1), (1, 0))
    mass_N1 = until_NC[:, -1:]
    level_ND = torch.from_numpy(thresholds(uniform_N, sampler.draws)).to(logprob_NU.device) * mass_N1
    slack_N1 = _STEP * mass_N1
    after_ND = level_ND > until_NC.gather(1, ids_ND) - slack_N1
    until_ND = level_ND <= until_NC.gather(1, ids_ND + 1) + slack_N1
    share_NU = p_NU / mass_N1
    return bool(
        (after_ND & until_ND & (p_NU.gather(1, ids_ND) > 0)).all()
        and _close(entropy_N, torch.special.entr(share_NU).sum(dim=1))
    )
