"""Rows of a new matrix from those of an old one, token by token.

Shapes: R old rows, V new tokens, N new rows (V and padding), H width (1 for a bias).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.token_map import CONTROL, EQUAL, NEW_CONTROL, PIECES, UNDECODABLE, TokenMap

_BLOCK = 1 << 22  # numbers in float64 at once


@dataclass(frozen=True, eq=False)
class Sums:
    """New rows as weighted sums of old ones (``omp.shared_sums``).

    Attributes:
        new: int64 [M], the new ids.
        old: int64 [M, K], the old ids of each sum.
        weight: float64 [M, K].
    """

    new: NDArray[np.int64]
    old: NDArray[np.int64]
    weight: NDArray[np.float64]


def new_rows(
    old_RH: Tensor, token_map: TokenMap, size: int, seed: tuple[int, int], init: str, sums: Sums | None = None
) -> Tensor:
    """[N, H] the new matrix, in the dtype of the old one.

    Control tokens and tokens of equal bytes are copies. Under ``fvt`` a token of several pieces is their mean (equal
    weights), under ``random`` normal with the mean and the standard deviation of each dimension of the old matrix,
    under ``omp`` the sum in ``sums``. What is left of the tokens is normal likewise. Ids that no text uses, and padded
    ones, are the old mean row. Sums are taken in float64.

    Args:
        old_RH: the old matrix; only rows of ``token_map.known`` count.
        token_map: the old ids of each new token.
        size: N.
        seed: of the normal rows.
        init: fvt, omp or random.
        sums: under omp, those of all text tokens that are no copies.
    """
    mean_H, spread_H = moments(old_RH, token_map.known)
    new_NH = mean_H.to(old_RH.dtype).repeat(size, 1)
    copied = token_map.of(CONTROL, EQUAL)
    new_NH[torch.from_numpy(copied)] = old_RH[torch.from_numpy(token_map.first(copied).astype(np.int64))]
    if init == "fvt":
        _put_means(new_NH, old_RH, token_map)
    if sums is not None:
        _put_sums(new_NH, old_RH, sums)
    kinds = {"fvt": (UNDECODABLE, NEW_CONTROL), "omp": (NEW_CONTROL,)}.get(init, (PIECES, UNDECODABLE, NEW_CONTROL))
    _put_normal(new_NH, token_map.of(*kinds), mean_H, spread_H, seed)
    return new_NH


def moments(old_RH: Tensor, known: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension over the known rows, float64 [H] each."""
    width = old_RH.shape[1]
    total_H, squares_H = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for ids in _blocks(known, width):
        total_H += old_RH[torch.from_numpy(ids.astype(np.int64))].double().sum(0)
    mean_H = total_H / len(known)
    for ids in _blocks(known, width):
        squares_H += (old_RH[torch.from_numpy(ids.astype(np.int64))].double() - mean_H).square().sum(0)
    return mean_H, (squares_H / len(known)).sqrt()


def _blocks(ids: NDArray[np.generic], width: int) -> Iterator[NDArray[np.generic]]:
    step = max(1, _BLOCK // width)
    return (ids[at : at + step] for at in range(0, len(ids), step))


def _put_means(new_NH: Tensor, old_RH: Tensor, token_map: TokenMap) -> None:
    """Mean of the pieces, in float64; tokens with equally many pieces together, so that each is one plain mean."""
    counts = np.diff(token_map.offsets)
    several = token_map.of(PIECES)
    for count in np.unique(counts[several]).tolist():
        for new in _blocks(several[counts[several] == count], count * new_NH.shape[1]):
            at = token_map.offsets[new][:, None] + np.arange(count)
            pieces = old_RH[torch.from_numpy(token_map.ids[at].astype(np.int64))].double()
            new_NH[torch.from_numpy(new)] = pieces.mean(1).to(new_NH.dtype)


def _put_sums(new_NH: Tensor, old_RH: Tensor, sums: Sums) -> None:
    for at in _blocks(np.arange(len(sums.new)), sums.old.shape[1] * new_NH.shape[1]):
        rows = old_RH[torch.from_numpy(sums.old[at])].double()
        weight = torch.from_numpy(sums.weight[at])[:, :, None]
        new_NH[torch.from_numpy(sums.new[at])] = (rows * weight).sum(1).to(new_NH.dtype)


def _put_normal(
    new_NH: Tensor, new: NDArray[np.int64], mean_H: Tensor, spread_H: Tensor, seed: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    for ids in _blocks(new, new_NH.shape[1]):
        drawn = torch.from_numpy(rng.standard_normal((len(ids), new_NH.shape[1])))
        new_NH[torch.from_numpy(ids)] = (mean_H + spread_H * drawn).to(new_NH.dtype)
