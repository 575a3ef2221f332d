"""Sorted L1: two distributions compared rank by rank, without knowing which token is which.

The teacher's list is what it kept, n values; the shorter list is padded with zeros, so

    sum_r |s_r - t_r| = sum_{r <= n} |s_r - t_r| + (mass of the student's other ranks)

and only the student's n largest values are ever sorted out, whatever its vocabulary.

Shapes: C chunks, V student vocabulary, O some of its tokens, R ranks compared, K entries summed over chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from xtoken.trainer.losses.base import owners


def padded(count_C: Tensor, value_K: Tensor) -> Tensor:
    """[C, R] with zeros after each chunk's values; R is the longest list."""
    count_C = count_C.long()
    longest = int(count_C.max()) if len(count_C) else 0
    chunk_K = owners(count_C, len(value_K))
    rank_K = torch.arange(len(value_K), device=value_K.device) - (count_C.cumsum(0) - count_C)[chunk_K]
    padded_CR = value_K.new_zeros(len(count_C), longest)
    padded_CR[chunk_K, rank_K] = value_K
    return padded_CR


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
