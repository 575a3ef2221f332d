"""Products of matrices in half precision whose sums stay in float32.

A GPU sums such a product in float32 whatever its result is; ``out_dtype`` keeps the result from being rounded to
bfloat16, whose steps between 16 and 32 are 0.125, and costs no time. The CPU has no such kernels.

Shapes: P positions, H width of the hidden states, V ids, N x K x M any matrices.
"""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_EVEN = 8  # numbers of two bytes in the 16 bytes to which the rows of a matrix must be aligned for a GPU's fast kernels


def widens(matrix: Tensor) -> bool:
    """Whether products of matrices like this one can come in float32."""
    return matrix.is_cuda and matrix.dtype in _HALF


def linear(states_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """[P, V] ``states @ weight.T + bias``, at least float32; for whoever needs no gradient through it."""
    if widens(weight_VH):
        rows_PV = torch.mm(states_PH, weight_VH.t(), out_dtype=torch.float32)
        return rows_PV if bias_V is None else rows_PV.add_(bias_V)
    rows_PV = torch.nn.functional.linear(states_PH, weight_VH, bias_V)
    return rows_PV.to(torch.promote_types(rows_PV.dtype, torch.float32))


def even(size: int, most: int, device: torch.device) -> int:
    """On a GPU the next multiple of 8 from ``size`` on, if there are ``most`` rows at least as many; else ``size``.

    Qwen's 151,669 tokens would make rows of logits that begin at odd places; the head has 151,936.
    """
    wide = -(-size // _EVEN) * _EVEN
    return wide if device.type == "cuda" and wide <= most else size


def widened(rows_PV: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[P, width] the same rows in ``dtype``, with zeros behind."""
    if rows_PV.shape[1] == width:
        return rows_PV.to(dtype)
    wide = rows_PV.new_zeros(len(rows_PV), width, dtype=dtype)
    wide[:, : rows_PV.shape[1]] = rows_PV
    return wide


def add_product(total_NM: Tensor, left_NK: Tensor, right_KM: Tensor) -> None:
    """Add ``left @ right`` to a sum in float32 or more, in place; without a buffer for the product where possible."""
    if total_NM.dtype == left_NK.dtype:
        total_NM.addmm_(left_NK, right_KM)
    elif widens(left_NK) and total_NM.dtype == torch.float32:
        torch.addmm(total_NM, left_NK, right_KM, out_dtype=torch.float32, out=total_NM)
    else:
        total_NM += left_NK @ right_KM
