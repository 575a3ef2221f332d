"""A log-softmax whose gradient is made once, in one buffer, however many losses read it.

What reads log-probabilities leaves its gradient with the log-softmax that made them, as what it is: numbers of single
cells (``picked``), a factor of a row's probabilities (``Tail``), or whole rows. Autograd calls the log-softmax's own
backward after all of theirs, and that turns the buffer of probabilities into ``p * (factor - sum) + cells + rows``,
where ``sum`` is that of a row's gradients by its log-probabilities. Readers of log-probabilities that another
log-softmax made, or that went through another operation, find nothing to leave theirs with and return it to autograd.

Shapes: P positions, V student vocabulary, E cells read, M cells of a tail, C rows read.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Tail:
    """A gradient of ``pull * p`` in all cells of a row but some, where it is ``pull * share * p``.

    Attributes:
        buffer_PV: p, apart from what stands in the named cells; it becomes the gradient.
        pull_P: the factor of each row.
        sum_P: the sum of a row's gradient.
        place_M, p_M, share_M: flat places of the named cells, each once; their p, and the part that counts.
    """

    buffer_PV: Tensor
    pull_P: Tensor
    sum_P: Tensor
    place_M: Tensor
    p_M: Tensor
    share_M: Tensor


@dataclass
class Gradients:
    """What was left in one backward pass.

    Attributes:
        cells: flat places and gradients; a place may be named more than once.
        rows: [C] positions, each once, and gradients [C, V].
        whole: a gradient [P, V] that is ours to write to.
        tail: one; a second teacher's comes as ``whole``, since named cells of two do not add up in place.
    """

    cells: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    whole: Tensor | None = None
    tail: Tail | None = None

    def add_whole(self, grad_PV: Tensor, own: bool = True) -> None:
        """Add a dense gradient; ``own``: nobody else reads it."""
        if self.whole is not None:
            self.whole.add_(grad_PV)
        else:
            self.whole = grad_PV if own else grad_PV.clone()

    def total(self, logp_PV: Tensor) -> Tensor:
        """[P] the sum of all by each row's log-probabilities."""
        rows, width = logp_PV.shape
        total_P = logp_PV.new_zeros(rows) if self.tail is None else self.tail.sum_P.clone()
        for place_E, grad_E in self.cells:
            total_P.index_add_(0, place_E // width, grad_E)
        for row_C, grad_CV in self.rows:
            total_P.index_add_(0, row_C, grad_CV.sum(1))
        return total_P if self.whole is None else total_P.add_(self.whole.sum(1))

    def add_to(self, grad_PV: Tensor) -> Tensor:
        """Cells and rows, added in place."""
        for row_C, grad_CV in self.rows:
            grad_PV.index_add_(0, row_C, grad_CV)
        for place_E, grad_E in self.cells:
            grad_PV.view(-1).index_add_(0, place_E, grad_E)
        return grad_PV


@dataclass
class Sink:
    """Where readers of one log-softmax leave their gradients."""

    left: Gradients = field(default_factory=Gradients)

    def take(self) -> Gradients:
        """All of this backward pass; the next begins anew."""
        left, self.left = self.left, Gradients()
        return left


def log_softmax(logits_PV: Tensor, *, over: bool = False, again: bool = False) -> Tensor:
    """Log-softmax along the last dimension.

    Args:
        logits_PV: at least float32.
        over: write it over the logits, which nobody reads after.
        again: more than one backward pass will come. Without it the first destroys the log-probabilities.
    """
    logp_PV: Tensor = _LogSoftmax.apply(logits_PV, over and logits_PV.is_contiguous(), again)  # type: ignore[no-untyped-call]
    return logp_PV


def sink_of(logp_PV: Tensor) -> Sink | None:
    """Where to leave a gradient by these log-probabilities; None: return it to autograd."""
    return getattr(logp_PV.grad_fn, "sink", None)


def left_with(sink: Sink | None, grad_PV: Tensor) -> Tensor | None:
    """Leave a gradient in a buffer of its own with a sink, if there is one; what is to be returned to autograd."""
    if sink is None:
        return grad_PV
    sink.left.add_whole(grad_PV)
    return None


def picked(logp_PV: Tensor, place_E: Tensor) -> Tensor:
    """[E] log-probabilities at flat places in [P, V]."""
    sink = sink_of(logp_PV)
    if sink is None:
        return logp_PV.reshape(-1).index_select(0, place_E)
    found_E: Tensor = _Picked.apply(logp_PV, place_E, sink)  # type: ignore[no-untyped-call]
    return found_E


def labels(logp_PV: Tensor, label_P: Tensor) -> Tensor:
    """[P] the log-probability of each position's label."""
    return picked(logp_PV, label_places(label_P, logp_PV.shape[1]))


def label_places(label_P: Tensor, width: int) -> Tensor:
    """[P] flat places of labels in [P, V], V being the ``width``."""
    return torch.arange(len(label_P), device=label_P.device) * width + label_P


def rows_at(logp_PV: Tensor, row_C: Tensor) -> Tensor:
    """[C, V] rows, each once at most, for one reader, whose gradient is a buffer of its own.

    No copy is made of all of them in their order.
    """
    sink = sink_of(logp_PV)
    if sink is None:
        return logp_PV if len(row_C) == len(logp_PV) else logp_PV.index_select(0, row_C)
    logp_CV: Tensor = _Rows.apply(logp_PV, row_C, sink)  # type: ignore[no-untyped-call]
    return logp_CV


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, over: bool, again: bool) -> Tensor:
        ctx.set_materialize_grads(False)  # where all was left in the sink there is none
        ctx.sink, ctx.again = Sink(), again
        if over:
            # detached, or it would be an input that is returned; autograd still counts it as a change of the logits
            logits_PV = logits_PV.detach()
            logp_PV = torch.log_softmax(logits_PV, dim=-1, out=logits_PV)
        else:
            logp_PV = torch.log_softmax(logits_PV, dim=-1)
        ctx.save_for_backward(logp_PV)
        return logp_PV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PV: Tensor | None) -> tuple[Tensor, None, None]:
        logp_PV, left = ctx.saved_tensors[0].detach(), ctx.sink.take()
        if grad_PV is not None:
            left.add_whole(grad_PV, own=False)
        if left.whole is not None and left.tail is None:
            return _dense(left, left.whole, logp_PV), None, None
        return _sparse(left, logp_PV, ctx.again), None, None


def _dense(left: Gradients, grad_PV: Tensor, logp_PV: Tensor) -> Tensor:
    """Everything put into the whole gradient, and torch's backward of that."""
    left.add_to(grad_PV)
    over = grad_PV if grad_PV.device.type == "cpu" else None  # whether other kernels may write there is not known
    return torch._log_softmax_backward_data(grad_PV, logp_PV, 1, logp_PV.dtype, out=over)


def _sparse(left: Gradients, logp_PV: Tensor, again: bool) -> Tensor:
    """The buffer of probabilities scaled row by row, and single cells and rows added."""
    total_P = left.total(logp_PV)
    if (tail := left.tail) is None:
        grad_PV = logp_PV.exp() if again else logp_PV.exp_()
        grad_PV.mul_(-total_P[:, None])
    else:
        grad_PV = tail.buffer_PV.mul_((tail.pull_P - total_P)[:, None])
        # assigned, not corrected: where the tail is tiny its pull is huge, and a difference of two such would be noise
        row_M = tail.place_M // logp_PV.shape[1]
        grad_M = tail.p_M * (tail.pull_P[row_M] * tail.share_M - total_P[row_M])
        grad_PV.view(-1).index_copy_(0, tail.place_M, grad_M)
    if left.whole is not None:
        grad_PV.add_(left.whole)
    return left.add_to(grad_PV)


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_PV: Tensor, place_E: Tensor, sink: Sink) -> Tensor:
        ctx.into = sink
        ctx.save_for_backward(place_E)
        return logp_PV.view(-1).index_select(0, place_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor) -> tuple[None, None, None]:
        ctx.into.left.cells.append((ctx.saved_tensors[0], grad_E))
        return None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_PV: Tensor, row_C: Tensor, sink: Sink) -> Tensor:
        ctx.into, ctx.all = sink, len(row_C) == len(logp_PV)
        ctx.save_for_backward(row_C)
        return logp_PV.view_as(logp_PV) if ctx.all else logp_PV.index_select(0, row_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CV: Tensor) -> tuple[None, None, None]:
        if ctx.all:
            ctx.into.left.add_whole(grad_CV)
        else:
            ctx.into.left.rows.append((ctx.saved_tensors[0], grad_CV))
        return None, None, None
