"""From a micro-batch to sums and gradients, by a fused linear loss.

Logits are made for a block of positions, scored, and turned at once into the gradient of the hidden states and of the
head. Logits of all tokens exist at no time. Peak memory is the model's activations, one block, and one gradient as
large as the head.

Shapes: P predicting positions, C chunks, H width of the hidden states, M width of the head, V <= M ids of the
tokenizer, F features, D teachers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtoken.trainer.blocks import tensor
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.losses.base import WEIGHT, FeatureLoss, Loss
from xtoken.trainer.losses.ce import cross_entropy
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.pieces import Block, Lesson, Piece, pieces_of
from xtoken.trainer.products import add_product, widened


class Sums(NamedTuple):
    """What a pass over a micro-batch, or a step of them, adds up; as a tensor float64 [4 + 3 D], in this order.

    Attributes:
        ce: of the predicted tokens.
        weighted, plain: KD of each teacher, with and without the weights of samples.
        agreed, compared: chunks of the first teacher, if agreement was asked for.
        squares: of the gradient of each term by the hidden states (its logits, where the head is not fused), if norms
            were asked for; CE first, then the teachers, all 1 + D without factors and denominators.
    """

    ce: float
    weighted: list[float]
    plain: list[float]
    agreed: float
    compared: float
    squares: list[float]

    @staticmethod
    def size(teachers: int) -> int:
        """Of the tensor."""
        return 4 + 3 * teachers

    @classmethod
    def of(cls, values: Sequence[float], teachers: int) -> "Sums":
        """From the tensor's values."""
        ce, *rest = values
        weighted, plain, rest = rest[:teachers], rest[teachers : 2 * teachers], rest[2 * teachers :]
        return cls(ce, weighted, plain, rest[0], rest[1], rest[2:])


class _Gradients:
    """Gradients of a micro-batch as they are made: of the states, of the head in float32 or more, of the learned."""

    def __init__(
        self,
        states_PH: Tensor,
        weight_MH: Tensor | None,
        bias_M: Tensor | None,
        learned: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> None:
        # one buffer each for the whole micro-batch: blocks write to their rows of the first, and add to the others
        self.states_PH = torch.zeros_like(states_PH)
        self.like = (weight_MH, bias_M)
        self.weight_MH = _zeros(weight_MH) if needed[1] else None
        self.bias_M = _zeros(bias_M) if needed[2] else None
        self.learned = [torch.zeros_like(one) for one in learned]

    def add(self, block: Block, rows_grad: Tensor, states_PH: Tensor, head_VH: Tensor | None) -> None:
        """The gradient of a block's logits (of the head's linear map, where it is fused)."""
        low, high = block.piece.low, block.piece.high
        if head_VH is None:  # the states are logits already, and wider than the vocabulary where the head is padded
            self.states_PH[low:high, : rows_grad.shape[1]] = rows_grad.to(self.states_PH.dtype)
            return
        size = len(head_VH)
        rows_grad = widened(rows_grad, size, head_VH.dtype)
        states_PH = states_PH[low:high].to(head_VH.dtype)
        self.states_PH[low:high] = (rows_grad @ head_VH).to(self.states_PH.dtype)
        if self.weight_MH is not None:
            add_product(self.weight_MH[:size], rows_grad.t(), states_PH)
        if self.bias_M is not None:
            self.bias_M[:size] += rows_grad.sum(0)

    def scaled(self, grad: Tensor) -> list[Tensor | None]:
        """As backward returns them."""
        grads = [self.states_PH, self.weight_MH, self.bias_M, *self.learned]
        # a GPU would be waited for, if it were asked whether this is 1, as it is
        factor = float(grad) if grad.device.type == "cpu" else grad
        if factor is grad or factor != 1:  # in place: nothing else reads them, and the head's is as large as the head
            grads = [None if one is None else one.mul_(factor) for one in grads]
        for at, like in enumerate(self.like, start=1):
            if grads[at] is not None and like is not None:
                grads[at] = grads[at].to(like.dtype)  # type: ignore[union-attr]
        return grads


def _zeros(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


class _Scorer:
    """One micro-batch through the head and the losses, block by block."""

    def __init__(self, objective: Objective, micro: Micro, factors: Sequence[float], agree: bool, norms: bool) -> None:
        self.student, self.losses, self.micro = objective.student, objective.losses, micro
        self.pieces = pieces_of(micro, self.student.vocabulary, self.losses, self.student.device)
        self.factors, self.agree, self.norms, self.learned = factors, agree, norms, list(objective.learned)
        self.sums = torch.zeros(Sums.size(len(self.losses)), dtype=torch.float64, device=self.student.device)

    def run(self, states_PH: Tensor, grads: _Gradients | None) -> Tensor:
        """The sums of ``score``; gradients, if wanted, are added to ``grads``."""
        weight_VH, bias_V = self.student.columns()
        collected = self._collect(states_PH, weight_VH, bias_V)
        for piece in self.pieces.blocks:
            self._block(piece, states_PH, weight_VH, bias_V, collected, grads)
        return self.sums

    def _block(
        self,
        piece: Piece,
        states_PH: Tensor,
        weight_VH: Tensor | None,
        bias_V: Tensor | None,
        collected: dict[int, Tensor],
        grads: _Gradients | None,
    ) -> None:
        """One block; all that is as large as its logits is gone when the next begins."""
        linear_PV = self._linear(states_PH[piece.low : piece.high], weight_VH, bias_V)
        graph = grads is not None or self.norms
        with torch.set_grad_enabled(graph):
            # the graph begins at the block's logits: autograd goes through the loss alone, never the head's matrix
            leaf = linear_PV.requires_grad_(graph)
            block = Block(piece, self._rows(leaf), spare=weight_VH is not None, again=self.norms)
            terms = self._terms(block, collected)
            if not graph or not terms:
                return
            rows_grad, *learned = self._measured(leaf, terms, weight_VH) if self.norms else self._total(leaf, terms)
        if grads is None:
            return
        if rows_grad is not None:
            grads.add(block, rows_grad, states_PH, weight_VH)
        for kept, one in zip(grads.learned, learned, strict=True):
            if one is not None:
                kept.add_(one)

    def _total(self, leaf: Tensor, terms: Mapping[int, Tensor]) -> Sequence[Tensor | None]:
        """Gradients of a block's part of the objective by its logits and by what losses learn."""
        total = torch.stack([self.factors[i] * term for i, term in terms.items()]).sum()
        return torch.autograd.grad(total, [leaf, *self.learned], allow_unused=True)

    def _measured(self, leaf: Tensor, terms: Mapping[int, Tensor], head_VH: Tensor | None) -> list[Tensor | None]:
        """The same, term by term; the squares of each are added to the sums."""
        total: list[Tensor | None] = [None] * (1 + len(self.learned))
        squares = self.sums[3 + 2 * len(self.losses) :]
        for i, term in terms.items():
            # all terms come from one log-softmax, whose graph is needed until the last has been through it
            grads = torch.autograd.grad(term, [leaf, *self.learned], allow_unused=True, retain_graph=True)
            if grads[0] is not None:
                rows_grad = grads[0]
                states_grad = (
                    rows_grad if head_VH is None else widened(rows_grad, len(head_VH), head_VH.dtype) @ head_VH
                )
                squares[i] += states_grad.double().square().sum()
            parts = [None if grad is None else grad * self.factors[i] for grad in grads]
            total = [
                new if old is None else old if new is None else old + new for old, new in zip(total, parts, strict=True)
            ]
        return total

    def _linear(self, states_PH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None) -> Tensor:
        """What the head's matrix makes, before scale and cap, at least float32."""
        return self.student.linear(states_PH, weight_VH, bias_V).detach()

    def _rows(self, linear_PV: Tensor) -> Tensor:
        return self.student.head.bend(linear_PV)

    def _collect(self, states_PH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None) -> dict[int, Tensor]:
        """Gradients [P, F] of losses that need the features of all positions, by a first pass over the blocks."""
        wanted = {i: loss for i in self.pieces.whole if isinstance(loss := self.losses[i], FeatureLoss)}
        if not wanted:
            return {}
        pieces: dict[int, list[Tensor]] = {i: [] for i in wanted}
        # the second pass makes the same logits again: two forward passes of the head cost less than all logits at once
        with torch.no_grad():
            for piece in self.pieces.blocks:
                rows_PV = self._rows(self._linear(states_PH[piece.low : piece.high], weight_VH, bias_V))
                block = Block(piece, rows_PV, spare=weight_VH is not None)
                for i, loss in wanted.items():
                    pieces[i].append(loss.features(block.logp(loss.temperature), piece.label_P))
                del rows_PV, block  # before the next is made
        return {i: self._features(i, loss, torch.cat(pieces[i])) for i, loss in wanted.items()}

    def _features(self, i: int, loss: FeatureLoss, feature_PF: Tensor) -> Tensor:
        lesson, leaf = self.pieces.whole[i], feature_PF.requires_grad_()
        with torch.enable_grad():
            # without log-probabilities: those of all positions exist at no time, and terms_of reads the features alone
            weighted, plain = _weigh(loss.terms_of(leaf, lesson.view), lesson, loss)
            # few numbers per position, so the gradient by all of them at once fits; the way to the logits comes later
            (grad_PF,) = torch.autograd.grad(weighted, leaf)
        self.sums[1 + i], self.sums[1 + len(self.losses) + i] = weighted.detach(), plain.detach()
        return grad_PF

    def _terms(self, block: Block, collected: dict[int, Tensor]) -> dict[int, Tensor]:
        """Add a block's sums; the terms whose factor is not 0, CE being term 0, to take gradients of."""
        ce = cross_entropy(block.logp(), block.piece.label_P)
        self.sums[0] += ce.detach()
        terms: list[Tensor | None] = [ce]
        for i, (lesson, loss) in enumerate(zip(block.piece.lessons, self.losses, strict=True)):
            if isinstance(loss, FeatureLoss) and i in collected:
                terms.append(_linearised(block, loss, collected[i]))
            else:
                terms.append(None if lesson is None else self._term(i, block, lesson, loss))
        # a term whose factor is 0 is counted above and left out of the graph
        return {i: term for i, term in enumerate(terms) if term is not None and self.factors[i]}

    def _term(self, i: int, block: Block, lesson: Lesson, loss: Loss) -> Tensor:
        seen = lesson.at(block.logp(loss.temperature))
        # a loss per token is asked for blocks in which no chunk starts; there is nothing to compare there
        if self.agree and i == 0 and len(seen.first_C):
            self._compare(loss.agrees(seen))
        weighted, plain = _weigh(loss.terms(seen), lesson, loss)
        self.sums[1 + i] += weighted.detach()
        self.sums[1 + len(self.losses) + i] += plain.detach()
        return weighted

    def _compare(self, agrees_C: Tensor | None) -> None:
        if agrees_C is not None:
            at = 1 + 2 * len(self.losses)
            self.sums[at] += agrees_C.sum()
            self.sums[at + 1] += len(agrees_C)


def _weigh(terms: Tensor, lesson: Lesson, loss: Loss) -> tuple[Tensor, Tensor]:
    """Sums with and without the weights of samples; temperature squared and the weights of kinds are in both."""
    columns = lesson.view.columns
    if WEIGHT in columns:
        terms = terms * columns[WEIGHT].to(terms.dtype)
    # a softmax at temperature T has gradients of size 1 / T, on both sides: the factor keeps losses comparable over T
    return (terms * lesson.weight.to(terms.dtype)).sum() * loss.temperature**2, terms.sum() * loss.temperature**2


def _linearised(block: Block, loss: FeatureLoss, grad_PF: Tensor) -> Tensor:
    """A sum whose gradient is that of the loss: its features times the gradient taken by them.

    Its value means nothing; ``_features`` has added the loss's own.
    """
    features = loss.features(block.logp(loss.temperature), block.piece.label_P)
    return (features * grad_PF[block.piece.low : block.piece.high]).sum()


def score(
    objective: Objective, micro: Micro, factors: Sequence[float], agree: bool = False, norms: bool = False
) -> tuple[Tensor, Tensor]:
    """sum_i factors_i * term_i (CE first, then teachers) with its gradient; and ``Sums`` as a tensor, without."""
    states_PH = objective.student.states(micro)
    if objective.liger and any(factors):
        return _liger(objective, micro, states_PH, factors)
    return score_states(objective, micro, states_PH, factors, agree, norms)


def score_states(
    objective: Objective,
    micro: Micro,
    states_PH: Tensor,
    factors: Sequence[float],
    agree: bool = False,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``score`` from hidden states on, [P, H], or from logits where the head is not fused."""
    head = objective.student.head
    scorer = _Scorer(objective, micro, tuple(factors), agree=agree, norms=norms)
    # autograd gives gradients to arguments only, so everything that has one is an argument
    inputs = (states_PH, head.weight_MH, head.bias_M, *objective.learned)
    value, sums = _FusedLinear.apply(scorer, *inputs)  # type: ignore[no-untyped-call]
    return value, sums


def sums_of(objective: Objective, micro: Micro, factors: Sequence[float]) -> Tensor:
    """``Sums`` as a tensor, for whoever needs no gradient, under ``no_grad``."""
    return score(objective, micro, factors)[1]


def gradient_sizes(objective: Objective, micro: Micro, factors: Sequence[float]) -> Tensor:
    """``Sums`` as a tensor, with the squares of the terms whose factor is not 0; leaves no gradient anywhere."""
    states_PH = objective.student.states(micro).detach()
    return _Scorer(objective, micro, tuple(factors), agree=False, norms=True).run(states_PH, None)


def _liger(objective: Objective, micro: Micro, states_PH: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """CE alone by Liger's fused kernel, which knows the head's cap but not its scale: that goes into what it is given.

    Its sum of the head's gradient over chunks is in float32, as that of our own blocks.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    head = objective.student.head
    # the kernel's softmax is over all rows that it is given
    weight_VH, bias_V = (
        None if part is None else part[: objective.student.vocabulary] for part in objective.student.columns()
    )
    assert weight_VH is not None, "xtoken.trainer.start asks for a head that can be fused"
    if head.scale != 1:
        states_PH, bias_V = states_PH * head.scale, None if bias_V is None else bias_V * head.scale
    ce = liger_fused_linear_cross_entropy(
        states_PH.to(weight_VH.dtype),
        weight_VH,
        tensor(micro.label_P, states_PH.device),
        bias=bias_V,
        reduction="sum",
        softcap=head.softcap,
        accum_dtype=torch.float32,
    )
    sums = torch.zeros(Sums.size(len(objective.losses)), dtype=torch.float64, device=ce.device)
    sums[0] = ce.detach()  # the other sums are of KD, of which there is none
    return ce * factors[0], sums


def measure(student: Student, micro: Micro, losses: Sequence[Loss]) -> Tensor:
    """The sums of ``score``, without gradient."""
    with torch.no_grad():
        return score(Objective(student, losses), micro, (0.0,) * (1 + len(losses)))[1]


class _FusedLinear(torch.autograd.Function):
    """The objective from hidden states and head; its gradient is made in the forward pass, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        scorer: _Scorer,
        states_PH: Tensor,
        weight_MH: Tensor | None,
        bias_M: Tensor | None,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        factors = scorer.factors
        # the gradient is made now, while each block's logits exist; backward only hands it out
        wanted = any(factors) and any(ctx.needs_input_grad)
        grads = _Gradients(states_PH, weight_MH, bias_M, learned, ctx.needs_input_grad[1:]) if wanted else None
        sums = scorer.run(states_PH, grads)
        ctx.grads, ctx.inputs, ctx.handed_out = grads, (states_PH, weight_MH, bias_M, *learned), False
        # CE and the weighted sums, in the order of the factors; in float64, and rounded once at the end
        total = sums.new_zeros(())
        for factor, term in zip(factors, sums, strict=False):
            total = total + factor * term
        ctx.mark_non_differentiable(sums)
        return total.float(), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.handed_out:
            raise RuntimeError("the gradient of this pass was handed out; call score again for another one")
        # only autograd holds them then, so it takes them as they are: else it copies a gradient as large as the head
        grads, ctx.grads, ctx.handed_out = ctx.grads, None, True
        if grads is None:  # all factors are 0; DDP and FSDP still wait for a gradient of every parameter
            zeros = [None if one is None else torch.zeros_like(one) for one in ctx.inputs]
            return (None, *zeros)
        return (None, *grads.scaled(grad))
