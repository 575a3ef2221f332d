"""Which samples share a row of a forward pass, and which rows share a forward pass.

Sizes are inputs of samples. Rows are lists of sample numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.compiled import compiled

# How much wider rows may get, step by step, until as few of them as the widest allowed hold everything.
_WIDER = (1.0, 1.005, 1.01, 1.02, 1.03, 1.05, 1.1)


@dataclass(frozen=True)
class Shape:
    """One forward pass: its rows, each a list of sample numbers, and their width."""

    rows: list[list[int]]
    width: int


def padded_shapes(sizes: Sequence[int], micro_tokens: int) -> list[Shape]:
    """One sample per row, longest first, ``rows * width <= micro_tokens`` (or one row)."""
    order = sorted(range(len(sizes)), key=lambda sample: -sizes[sample])
    return _shapes([[sample] for sample in order], [sizes[sample] for sample in order], micro_tokens)


def packed_shapes(sizes: Sequence[int], micro_tokens: int, max_tokens: int) -> list[Shape]:
    """Several samples per row: first-fit decreasing, all rows about as wide.

    As many rows as first-fit decreasing needs at the greatest width, then the least width that needs no more.
    """
    if not sizes:
        return []
    size_B = np.array(sizes, np.int64)
    order_B = np.argsort(-size_B, kind="stable")
    falling_B = size_B[order_B]
    widest = max(int(falling_B[0]), min(max_tokens, micro_tokens))
    row_B = _first_fit(falling_B, widest)
    rows = int(row_B.max()) + 1
    # first-fit fills the first rows to the brim and leaves the last ones short, and padding goes up to the widest: look
    # for a lesser width that still needs no more rows, from the mean on
    least = max(int(falling_B[0]), -(-int(size_B.sum()) // rows))
    for wider in _WIDER:
        if (width := int(least * wider)) >= widest:
            break
        if (narrow_B := _first_fit(falling_B, width)).max() < rows:
            row_B = narrow_B
            break
    used = np.bincount(row_B, falling_B, rows).astype(np.int64)
    # the samples of each row, in order of the row's number: sorted by it and cut where it changes
    members = np.split(order_B[np.argsort(row_B, kind="stable")], np.cumsum(np.bincount(row_B))[:-1])
    by_width = np.argsort(-used, kind="stable").tolist()
    return _shapes([members[row].tolist() for row in by_width], used[by_width].tolist(), micro_tokens)


def _shapes(rows: list[list[int]], used: list[int], micro_tokens: int) -> list[Shape]:
    """Rows, widest first, gathered into forward passes."""
    shapes: list[Shape] = []
    for row, width in zip(rows, used, strict=True):
        # rows come widest first, so a pass is as wide as its first row and no later row widens it
        if shapes and (len(shapes[-1].rows) + 1) * shapes[-1].width <= micro_tokens:
            shapes[-1].rows.append(row)
        else:
            shapes.append(Shape([row], width))
    return shapes


@compiled
def _first_fit(size_B: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The first row with room for each sample, in order; no size is above ``width``."""
    row_B = np.zeros(len(size_B), np.int64)
    room = np.full(len(size_B), width, np.int64)
    first = 0  # rows before it are full for all that follow, as none is smaller than the last
    for sample in range(len(size_B)):
        while room[first] < size_B[-1]:
            first += 1
        row = first
        while room[row] < size_B[sample]:
            row += 1
        room[row] -= size_B[sample]
        row_B[sample] = row
    return row_B
