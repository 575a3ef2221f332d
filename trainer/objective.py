"""A student and its losses as one module.

Shapes: B rows, L inputs of a row, P predicting positions, H width of the hidden states, M width of the head, V <= M ids
of the tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from xtoken.trainer.blocks import tensor
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.pieces import Block, pieces_of
from xtoken.trainer.products import even, linear
from xtoken.trainer.student.flat import segments
from xtoken.trainer.student.head import Head, find_head

A = ParamSpec("A")
T = TypeVar("T")


@dataclass(frozen=True)
class Student:
    """The model and how it is run.

    ``vocabulary`` columns of the head count: the ids of the tokenizer. More are padding and are cut before the
    softmax; a head that lacks some (special tokens only, which no sample holds) sets a smaller number.
    ``flat``: the model attends by segments (``xtoken.trainer.student.head.attend_flat``), all rows in one.
    """

    model: Any
    device: torch.device
    autocast: torch.dtype | None
    vocabulary: int
    known_head: Head | None = None
    flat: bool = False

    @cached_property
    def head(self) -> Head:
        """The model's head, looked for once."""
        return self.known_head or find_head(self.model)

    def states(self, micro: Micro) -> Tensor:
        """[P, H] hidden states of the predicting positions, or their logits [P, M] where the head is not fused."""
        rows = (1, -1) if self.flat else micro.input_BL.shape
        inputs, positions = (tensor(part.reshape(rows), self.device) for part in (micro.input_BL, micro.position_BL))
        with self.precision():
            states_BLH = self.head.states(inputs, positions, self._segments(micro) if self.flat else None)
        # padding and the last token of each sample predict nothing: the head never sees them
        return states_BLH.flatten(0, 1).index_select(0, tensor(micro.place_P, self.device))

    def _segments(self, micro: Micro) -> dict[str, Any]:
        found = segments(micro.position_BL)
        return {name: one if isinstance(one, int) else tensor(one, self.device) for name, one in found.items()}

    def blocks(self, micro: Micro, losses: Sequence[Loss] = ()) -> Iterator[Block]:
        """The micro-batch's predicting positions, scored; for whoever needs no gradient, under ``no_grad``."""
        states_PH = self.states(micro)
        weight_VH, bias_V = self.columns()
        for piece in pieces_of(micro, self.vocabulary, losses, self.device).blocks:
            yield Block(piece, self.rows(states_PH[piece.low : piece.high], weight_VH, bias_V))

    def columns(self) -> tuple[Tensor | None, Tensor | None]:
        """The head's rows that are multiplied, [W, H] and [W], in the dtype of the forward pass.

        On a GPU W is V or a little more (see ``even``), and what comes of the rest is cut.
        """
        weight, bias = self.head.weight_MH, self.head.bias_M
        size = self.vocabulary if weight is None else even(self.vocabulary, len(weight), self.device)
        return tuple(  # type: ignore[return-value]
            None if part is None else part[:size].to(self.autocast or part.dtype) for part in (weight, bias)
        )

    def rows(self, states_PH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None) -> Tensor:
        """[P, V] logits, at least float32."""
        return self.head.bend(self.linear(states_PH, weight_VH, bias_V))

    def linear(self, states_PH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None) -> Tensor:
        """[P, V] what the head's matrix makes, before scale and cap, at least float32; logits where it is not fused."""
        if weight_VH is not None:
            return linear(states_PH.to(weight_VH.dtype), weight_VH, bias_V)[:, : self.vocabulary]
        rows_PV = states_PH[:, : self.vocabulary]
        return rows_PV.to(torch.promote_types(rows_PV.dtype, torch.float32))

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, if the student has one."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


class Objective(torch.nn.Module):
    """A student with its losses as one module, which DDP and FSDP can wrap.

    It runs a function of itself: FSDP holds all weights outside the layers only while its module runs.
    """

    def __init__(self, student: Student, losses: Sequence[Loss], liger: bool = False) -> None:
        super().__init__()
        self.student, self.losses, self.liger = student, tuple(losses), liger
        self.model = student.model
        # registered, so that DDP averages their gradients too; FSDP refuses learned weights when it is configured
        self.learned = torch.nn.ParameterList([p for loss in losses for p in loss.parameters()])

    def forward(self, work: "Callable[Concatenate[Objective, A], T]", *args: A.args, **options: A.kwargs) -> T:
        """``work(self, ...)``."""
        return work(self, *args, **options)
