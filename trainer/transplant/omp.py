"""Orthogonal matching pursuit: rows of a donor's embedding as sums of few rows of tokens that both models have.

Training-free tokenizer transplantation (arXiv 2506.06607): the sum that gives a token's row in the donor's embedding is
taken over the same tokens' rows of the other model.

Shapes: M rows to write as sums, A atoms (rows of shared tokens), H width, K atoms in one sum.
"""

import numpy as np
import torch
from torch import Tensor

from xtoken.schemas.token_map import EQUAL, PIECES, UNDECODABLE, TokenMap
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.transplant.rows import Sums

_ROOM = 1 << 28  # bytes of a block's basis and scores
_BLOCK = 256
_NOTHING = 1e-6  # a rest below this share of its row, or an atom's new part below this share of it, is rounding


def shared_sums(donor_UH: Tensor, token_map: TokenMap, most: int, device: torch.device, progress: Progress) -> Sums:
    """Sums for all text tokens that the old model lacks.

    Args:
        donor_UH: the donor's embedding: a row for each new token.
        token_map: the old ids of each new token; tokens of equal bytes are the shared ones.
        most: K, most atoms in one sum; fewer where fewer are shared.
        device: where they are searched.
        progress: shows how many rows are done.
    """
    shared, wanted = token_map.of(EQUAL), token_map.of(PIECES, UNDECODABLE)
    dtype = torch.promote_types(donor_UH.dtype, torch.float32)
    atoms_AH = donor_UH[torch.from_numpy(shared)].to(device, dtype)
    most = min(most, len(shared))
    step = max(1, min(_BLOCK, _ROOM // (8 * most * atoms_AH.shape[1] + 4 * len(shared))))
    picks, weights = [np.zeros((0, most), np.int64)], [np.zeros((0, most))]
    progress.start("omp", len(wanted), "tokens")
    for at in range(0, len(wanted), step):
        rows_MH = donor_UH[torch.from_numpy(wanted[at : at + step])].to(device, dtype)
        pick_MK, weight_MK = pursue(rows_MH, atoms_AH, most)
        picks.append(pick_MK.cpu().numpy())
        weights.append(weight_MK.cpu().numpy())
        progress.advance(len(rows_MH))
    old = token_map.first(shared).astype(np.int64)
    return Sums(wanted, old[np.concatenate(picks)], np.concatenate(weights))


def pursue(rows_MH: Tensor, atoms_AH: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each row as a sum of at most K atoms: int64 [M, K] which, float64 [M, K] times what.

    In each round the atom whose direction has the largest part in what is left of the row, then all of a row's atoms
    weighed anew by least squares. A row of which nothing is left gets atoms of weight 0.

    Args:
        rows_MH: to write as sums.
        atoms_AH: what the sums are made of; its dtype is that of the search, the weights are found in float64.
        most: K, at most A.
    """
    count, width = rows_MH.shape
    direction_AH = torch.nn.functional.normalize(atoms_AH, dim=1)
    left_MH = rows_MH.double()
    least_M = left_MH.norm(dim=1) * _NOTHING
    basis_MKH, factor_MKK = left_MH.new_zeros(count, most, width), left_MH.new_zeros(count, most, most)
    part_MK = left_MH.new_zeros(count, most)
    pick_MK = torch.zeros(count, most, dtype=torch.int64, device=rows_MH.device)
    for k in range(most):
        score_MA = (left_MH.to(direction_AH.dtype) @ direction_AH.T).abs()
        pick_M = score_MA.scatter_(1, pick_MK[:, :k], -1.0).argmax(1)
        atom_MH = atoms_AH[pick_M].double()
        rest_MH, seen_MK = _orthogonal(atom_MH, basis_MKH[:, :k])
        norm_M = rest_MH.norm(dim=1)
        useful_M = (norm_M > _NOTHING * atom_MH.norm(dim=1)) & (left_MH.norm(dim=1) > least_M)
        unit_MH = torch.where(useful_M[:, None], rest_MH / norm_M[:, None].clamp_min(1e-300), 0.0)
        part_MK[:, k] = (unit_MH * left_MH).sum(1)
        left_MH = left_MH - part_MK[:, k, None] * unit_MH
        pick_MK[:, k], basis_MKH[:, k] = pick_M, unit_MH
        factor_MKK[:, :k, k] = torch.where(useful_M[:, None], seen_MK, 0.0)
        factor_MKK[:, k, k] = torch.where(useful_M, norm_M, 1.0)
    weight_MK = torch.linalg.solve_triangular(factor_MKK, part_MK[:, :, None], upper=True)[:, :, 0]
    return pick_MK, weight_MK


def _orthogonal(atom_MH: Tensor, basis_MKH: Tensor) -> tuple[Tensor, Tensor]:
    """What of each atom its basis does not hold, and its parts along the basis; twice, against rounding."""
    rest_MH, seen_MK = atom_MH, torch.zeros(basis_MKH.shape[:2], dtype=atom_MH.dtype, device=atom_MH.device)
    for _ in range(2):
        part_MK = torch.einsum("mkh,mh->mk", basis_MKH, rest_MH)
        rest_MH = rest_MH - torch.einsum("mk,mkh->mh", part_MK, basis_MKH)
        seen_MK = seen_MK + part_MK
    return rest_MH, seen_MK
