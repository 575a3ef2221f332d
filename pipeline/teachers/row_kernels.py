"""A slice's logits read by Triton kernels: once for everything but samples, once more for those.

``scan_tiles`` reads the logits and leaves some figures of each tile, a few hundred neighbouring columns. The k-th
largest of the tiles' largest logits is a floor: at least k logits reach it, all of them in tiles whose largest does.
``collect`` reads those tiles, about k of them, and keeps what reaches the floor, to be sorted by keys without ties.
``tile_masses`` reads all again and adds up p in float64; ``pick_columns`` reads the tiles in which samples fall.

Order, ids and ranks follow from float32 subtractions, which are the same everywhere. Sums differ from torch's by the
order of addition: within a tile in float32, between tiles in float64. Samples follow the same p as ``draws.draw_row``,
added up in float64 in another order: an id differs only where a level lies within that rounding (1e-13) of a step.

Needs Triton, or its interpreter (TRITON_INTERPRET=1, for tests): nothing else imports this module.

Shapes: as in ``sliced_rows``; G tiles of a row, and in kernels B tiles of one program and T columns of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtoken.pipeline.teachers.logit_rows import top_k
from xtoken.pipeline.teachers.sliced_rows import NO_KEY, Asked, Label, pack

_TILES = (512, 256, 128, 64)  # columns of a tile: the most that leaves twice as many tiles as entries are asked for
_BLOCK = 1024  # columns that a program reads at once: one warp, so that its sums need no barrier
_READERS = 8  # programs that share the chosen tiles of a row
_ROOM, _LEAST_ROOM = 4, 256  # times k, and at least: candidates of a row; one with more, for its ties, is left to torch
_PEAK, _TOTAL, _SPACE_PEAK, _SPACE_TOTAL, _BEFORE, _ABOVE, _BELOW, _TAU = range(8)  # figures of a tile


class KernelScan:
    """See ``sliced_rows.Scan``; ``tile`` is the columns of a tile."""

    def __init__(self, logits_NU: Tensor, label: Label, asked: Asked) -> None:
        assert logits_NU.stride(1) == 1
        self._logits_NU, self._asked = logits_NU, asked
        rows, width = logits_NU.shape
        self.tile = next((tile for tile in _TILES if width >= 2 * asked.k * tile), _TILES[-1])
        self._tiles = triton.cdiv(width, self.tile)
        self._block = _BLOCK // self.tile
        self._blocks = (rows, triton.cdiv(self._tiles, self._block))
        figures_NFG = self._scan_tiles(label)
        self._peak_NG = figures_NFG[:, _PEAK]
        self.sums_NF = _added_up(figures_NFG, asked.temperatures)
        self._until_NG = self._peak_NG  # sums of p up to each tile's end, once they are asked for

    def keys(self, lse_N: Tensor) -> Tensor:
        k, (rows, width) = self._asked.k, self._logits_NU.shape
        peak_NG, order_NG = (self._peak_NG - lse_N[:, None]).sort(dim=1, descending=True)
        floor_N = peak_NG[:, k - 1].contiguous() if k <= self._tiles else torch.full_like(lse_N, -torch.inf)
        chosen_N = (peak_NG >= floor_N[:, None]).sum(dim=1, dtype=torch.int32)
        room = triton.next_power_of_2(max(_ROOM * k, _LEAST_ROOM))
        key_NC = torch.full((rows, room), NO_KEY, dtype=torch.int64, device=lse_N.device)
        found_N = torch.zeros(rows, dtype=torch.int32, device=lse_N.device)
        values = (lse_N, floor_N, order_NG.to(torch.int32), chosen_N, key_NC, found_N, width, self._tiles)
        self._run(collect, (rows, _READERS), *values, ROOM=room, READERS=_READERS)
        key_NK = key_NC.sort(dim=1, descending=True).values[:, :k]
        full = torch.nonzero(found_N > room).flatten()
        if len(full):
            key_NK[full] = pack(*top_k(self._logits_NU[full].float() - lse_N[full, None], k))
        return key_NK

    def masses(self, lse_N: Tensor) -> Tensor:
        out_N2G = torch.empty(len(lse_N), 2, self._tiles, dtype=torch.float64, device=lse_N.device)
        values = (lse_N, out_N2G, self._asked.size, self._tiles)
        self._run(tile_masses, self._blocks, *values, BLOCK=self._block, num_warps=1)
        self._until_NG = out_N2G[:, 0].cumsum(dim=1).contiguous()
        return torch.stack([self._until_NG[:, -1], out_N2G[:, 1].sum(dim=1)], dim=1)

    def pick(self, lse_N: Tensor, level_ND: Tensor) -> Tensor:
        level_ND = torch.minimum(level_ND, self._until_NG[:, -1:])
        tile_ND = torch.searchsorted(self._until_NG, level_ND)
        within_ND = level_ND - torch.nn.functional.pad(self._until_NG, (1, 0)).gather(1, tile_ND)
        column_ND = torch.empty_like(tile_ND)
        values = (lse_N, within_ND, tile_ND, column_ND, self._asked.size, level_ND.shape[1])
        self._run(pick_columns, tuple(level_ND.shape), *values)
        return column_ND

    def _scan_tiles(self, label: Label) -> Tensor:
        (rows, width), taus, device = self._logits_NU.shape, self._asked.temperatures, self._logits_NU.device
        scale_n = torch.tensor([1 / tau for tau in taus] or [1.0], dtype=torch.float32, device=device)
        out_NFG = torch.empty(rows, _TAU + len(taus), self._tiles, device=device)
        values = (label.logit_N, label.column_N, self._asked.space_bits, scale_n, out_NFG, width, self._tiles)
        self._run(scan_tiles, self._blocks, *values, BLOCK=self._block, TAUS=len(taus), num_warps=1)
        return out_NFG

    def _run(self, kernel: Any, grid: tuple[int, ...], *values: Tensor | int, **constants: int) -> None:
        logits_NU = self._logits_NU
        # Triton starts on the current device
        with torch.cuda.device_of(logits_NU):  # type: ignore[no-untyped-call]
            kernel[grid](logits_NU, logits_NU.stride(0), *values, TILE=self.tile, **constants)


def _added_up(figures_NFG: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """float64 [N, F]: the sums of ``sliced_rows`` from the figures of tiles."""
    peak_NG = figures_NFG[:, _PEAK].double()
    columns = [
        _lse(peak_NG, figures_NFG[:, _TOTAL]),
        _lse(figures_NFG[:, _SPACE_PEAK].double(), figures_NFG[:, _SPACE_TOTAL]),
        figures_NFG[:, _BEFORE].double().sum(dim=1),
        figures_NFG[:, _ABOVE].amin(dim=1).double(),
        figures_NFG[:, _BELOW].amax(dim=1).double(),
        *(_lse(peak_NG / tau, figures_NFG[:, _TAU + index]) for index, tau in enumerate(temperatures)),
    ]
    return torch.stack(columns, dim=1)


def _lse(peak_NG: Tensor, total_NG: Tensor) -> Tensor:
    return (peak_NG + total_NG.double().log()).logsumexp(dim=1)


@triton.jit
def _tile_of(logits, stride, row, tile, width, TILE: tl.constexpr):
    """float32 [T] of one tile, and its columns; -inf where the row has ended."""
    column_T = tile * TILE + tl.arange(0, TILE)
    value_T = tl.load(logits + row.to(tl.int64) * stride + column_T, mask=column_T < width, other=-float("inf"))
    return value_T.to(tl.float32), column_T


@triton.jit
def _tiles_of(logits, stride, row, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [B, T] of this program's tiles, their columns, and the tiles [B]."""
    tile_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_BT = tile_B[:, None] * TILE + tl.arange(0, TILE)[None, :]
    value_BT = tl.load(logits + row.to(tl.int64) * stride + column_BT, mask=column_BT < width, other=-float("inf"))
    return value_BT.to(tl.float32), column_BT, tile_B


@triton.jit
def _finite(peak):
    """A largest logit to subtract; nothing is left of a tile of -inf either way."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def scan_tiles(
    logits,
    stride,
    label,
    label_column,
    space_bits,
    scale,
    out,
    width,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAUS: tl.constexpr,
):
    """Figures of B tiles of a row: out [N, 7 + n, G], in the order of ``_PEAK`` and those after it."""
    row = tl.program_id(0)
    value_BT, column_BT, tile_B = _tiles_of(logits, stride, row, width, TILE, BLOCK)
    inside_BT, here_B = column_BT < width, tile_B < tiles
    out += row.to(tl.int64) * (7 + TAUS) * tiles + tile_B

    peak_B = tl.max(value_BT, axis=1)
    below_BT = value_BT - _finite(peak_B)[:, None]
    tl.store(out, peak_B, mask=here_B)
    tl.store(out + tiles, tl.sum(tl.exp(below_BT), axis=1), mask=here_B)

    word_BT = tl.load(space_bits + column_BT // 32, mask=inside_BT, other=0)
    space_BT = tl.where((word_BT >> (column_BT % 32)) & 1 != 0, value_BT, -float("inf"))
    peak_B = tl.max(space_BT, axis=1)  # of its own: beside another token, spaces may be too rare for float32
    tl.store(out + 2 * tiles, peak_B, mask=here_B)
    tl.store(out + 3 * tiles, tl.sum(tl.exp(space_BT - _finite(peak_B)[:, None]), axis=1), mask=here_B)

    logit, column = tl.load(label + row), tl.load(label_column + row)
    before_BT = (value_BT > logit) | ((value_BT == logit) & (column_BT < column) & inside_BT)
    tl.store(out + 4 * tiles, tl.sum(before_BT.to(tl.float32), axis=1), mask=here_B)
    tl.store(out + 5 * tiles, tl.min(tl.where(value_BT > logit, value_BT, float("inf")), axis=1), mask=here_B)
    tl.store(out + 6 * tiles, tl.max(tl.where(value_BT < logit, value_BT, -float("inf")), axis=1), mask=here_B)

    for index in tl.static_range(TAUS):
        total_B = tl.sum(tl.exp(below_BT * tl.load(scale + index)), axis=1)
        tl.store(out + (7 + index) * tiles, total_B, mask=here_B)


@triton.jit
def collect(
    logits,
    stride,
    lse,
    floor,
    order,
    chosen,
    keys,
    found,
    width,
    tiles,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
    READERS: tl.constexpr,
):
    """Keys of what reaches the row's floor, in any order: keys [N, ROOM], found [N]; more than ROOM means: not all.

    ``order`` [N, G] are the row's tiles, those that may hold some first; ``chosen`` [N] says how many those are.
    """
    row = tl.program_id(0)
    lse_row, floor_row, last = tl.load(lse + row), tl.load(floor + row), tl.load(chosen + row)
    keys += row.to(tl.int64) * ROOM
    at, others = tl.program_id(1), last * 0
    while (at < last) & (others <= ROOM):  # a row without room left is read again elsewhere
        tile = tl.load(order + row.to(tl.int64) * tiles + at)
        value_T, column_T = _tile_of(logits, stride, row, tile, width, TILE)
        logprob_T = value_T - lse_row
        kept_T = (column_T < width) & (logprob_T >= floor_row)
        count_T = kept_T.to(tl.int32)
        others = tl.atomic_add(found + row, tl.sum(count_T, axis=0))
        place_T = others + tl.cumsum(count_T, axis=0) - 1
        bits_T = logprob_T.to(tl.int32, bitcast=True)
        rising_T = tl.where(bits_T >= 0, bits_T, bits_T ^ 0x7FFFFFFF)
        key_T = (rising_T.to(tl.int64) << 32) | (0xFFFFFFFF - column_T.to(tl.int64))
        tl.store(keys + place_T, key_T, mask=kept_T & (place_T < ROOM))
        at += READERS


@triton.jit
def tile_masses(logits, stride, lse, out, size, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """float64 sums of B tiles of a row, of the columns before ``size``: out [N, 2, G], of p and of -p log p."""
    row = tl.program_id(0)
    value_BT, _, tile_B = _tiles_of(logits, stride, row, size, TILE, BLOCK)
    logprob_BT = (value_BT - tl.load(lse + row)).to(tl.float64)
    p_BT = tl.exp(logprob_BT)
    out += row.to(tl.int64) * 2 * tiles + tile_B
    tl.store(out, tl.sum(p_BT, axis=1), mask=tile_B < tiles)
    surprise_BT = -p_BT * tl.where(p_BT > 0.0, logprob_BT, 0.0)
    tl.store(out + tiles, tl.sum(surprise_BT, axis=1), mask=tile_B < tiles)


@triton.jit
def pick_columns(logits, stride, lse, level, tile, out, size, draws, TILE: tl.constexpr):
    """The first column of a tile with p > 0 at which the tile's sum of p reaches a level: out [N, D]; else the last."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * draws + tl.program_id(1)
    tile_at = tl.load(tile + at)
    value_T, column_T = _tile_of(logits, stride, row, tile_at, size, TILE)
    p_T = tl.exp((value_T - tl.load(lse + row)).to(tl.float64))
    reached_T = (tl.cumsum(p_T, axis=0) >= tl.load(level + at)) & (p_T > 0.0)
    first = tl.min(tl.where(reached_T, column_T, size), axis=0)
    last = tl.max(tl.where(p_T > 0.0, column_T, 0), axis=0)
    tl.store(out + at, tl.minimum(first, last).to(tl.int64))
