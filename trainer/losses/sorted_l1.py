"""Sorted L1: two distributions compared rank by rank, without knowing which token is which.

The teacher's list is what it kept, n values; the shorter list is padded with zeros, so

    sum_r |s_r - t_r| = sum_{r <= n} |s_r - t_r| + (mass of the student's other ranks)

and only the student's n largest values are ever sorted out, whatever its vocabulary.

Shapes: C chunks, V student vocabulary, O some of its tokens, R ranks compared, K entries summed over chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xtoken.trainer.losses.base import owners


class Lists(NamedTuple):
    """Where the values of chunks stand in a table of them, a row each, as wide as the longest.

    Attributes:
        chunks, ranks: its size, C and R.
        place_K: int64, the place of each value in it, laid flat.
    """

    chunks: int
    ranks: int
    place_K: Tensor

    @classmethod
    def of(cls, count_C: Tensor) -> "Lists":
        """From the number of each chunk's values."""
        count_C = count_C.long()
        longest, chunk_K = int(count_C.max()) if len(count_C) else 0, owners(count_C)
        rank_K = torch.arange(len(chunk_K), device=count_C.device) - (count_C.cumsum(0) - count_C)[chunk_K]
        return cls(len(count_C), longest, chunk_K * longest + rank_K)

    def padded(self, value_K: Tensor) -> Tensor:
        """[C, R] with zeros after each chunk's values."""
        table = value_K.new_zeros(self.chunks * self.ranks).index_copy_(0, self.place_K, value_K)
        return table.view(self.chunks, self.ranks)


def sorted_l1(student_CR: Tensor, teacher_CR: Tensor, mass_C: Tensor) -> Tensor:
    """Sum over ranks of |student - teacher|, [C].

    Args:
        student_CR: the student's largest probabilities, descending; at least as many as the teacher kept, or all.
        teacher_CR: the teacher's, descending, zeros behind.
        mass_C: all of the student's mass that is compared; what is not in ``student_CR`` meets zeros.
    """
    width = max(student_CR.shape[1], teacher_CR.shape[1])
    student_CR = pad(student_CR, (0, width - student_CR.shape[1]))
    teacher_CR = pad(teacher_CR, (0, width - teacher_CR.shape[1]))
    tail_C = mass_C - student_CR.sum(1)
    # Rounding can bring the tail to -1e-7: only its value is floored, since a clamp would also cut the gradient.
    tail_C = tail_C + (tail_C.clamp(min=0) - tail_C).detach()
    return (student_CR - teacher_CR).abs().sum(1) + tail_C
