"""A micro-batch cut into blocks: labels, targets and where these lie, all that a pass asks of it beside the model.

It follows from the targets alone, so it is made on the host, in a step while the pass before it runs. A GPU gets it in
one copy for each dtype and is never asked for a size.

Shapes: P predicting positions of a block, C chunks of a teacher in it, V ids of the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xtoken.trainer.blocks import collects, spans, view
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.losses.log_softmax import log_softmax
from xtoken.trainer.packed import Packed


@dataclass(frozen=True)
class Lesson:
    """What one loss is shown of some positions.

    Attributes:
        view: without log-probabilities, [0, V], and with the loss's ``index``.
        weight: float64, of each of its terms: its teacher's weight in the sample.
    """

    view: View
    weight: Tensor

    def at(self, logp_PV: Tensor) -> View:
        """The view with its log-probabilities."""
        return replace(self.view, logp_PV=logp_PV)


@dataclass(frozen=True)
class Piece:
    """Positions ``low`` to ``high`` of a micro-batch.

    Attributes:
        label_P: int64, the token that each position predicts in the text.
        lessons: by teacher; None where its loss has no term here, or takes all positions together.
    """

    low: int
    high: int
    label_P: Tensor
    lessons: tuple[Lesson | None, ...]


@dataclass(frozen=True)
class Block:
    """The logits of a piece while they exist: ``rows`` [P, V], at least float32.

    Attributes:
        spare: nobody else reads them, as they were made here: log-probabilities are written over them. They are the
            logits less a number for each position, so those at another temperature come out the same.
        again: more than one backward pass will come.
    """

    piece: Piece
    rows: Tensor
    spare: bool = False
    again: bool = False
    _logp: dict[float, Tensor] = field(default_factory=dict)

    def logp(self, temperature: float = 1.0) -> Tensor:
        """Log-softmax of the logits over the temperature."""
        if temperature not in self._logp:
            plain = temperature == 1
            scaled = self.rows if plain else self.rows / temperature
            self._logp[temperature] = log_softmax(scaled, over=self.spare or not plain, again=self.again)
        return self._logp[temperature]


@dataclass(frozen=True)
class Pieces:
    """The blocks of a micro-batch; ``whole`` are the lessons of losses that take all positions together."""

    blocks: tuple[Piece, ...]
    whole: dict[int, Lesson]


def cut(micro: Micro, vocabulary: int, losses: Sequence[Loss], device: torch.device) -> Packed:
    """``Pieces`` for a device, packed.

    Raises:
        VerificationError: a target has an id that W or the vocabulary does not have.
    """
    taught = list(enumerate(zip(micro.targets, losses, strict=False)))
    whole = {
        i: _lesson(micro, i, loss, vocabulary, 0, len(micro.place_P))
        for i, (targets, loss) in taught
        if collects(loss) and len(targets.first_C)
    }
    blocks = [
        Piece(
            low,
            high,
            torch.from_numpy(micro.label_P[low:high]),
            tuple(
                _lesson(micro, i, loss, vocabulary, low, high) if _has_terms(micro, i, loss, low, high) else None
                for i, (_, loss) in taught
            ),
        )
        for low, high in spans(micro, vocabulary, losses, device)
    ]
    return Packed(Pieces(tuple(blocks), whole), device)


def pieces_of(micro: Micro, vocabulary: int, losses: Sequence[Loss], device: torch.device) -> Pieces:
    """What ``cut`` made of a micro-batch, or makes now, on the device."""
    pieces: Pieces = (micro.pieces or cut(micro, vocabulary, losses, device)).on(device)
    return pieces


def _has_terms(micro: Micro, i: int, loss: Loss, low: int, high: int) -> bool:
    if collects(loss):
        return False
    first, last = micro.targets[i].chunks(low, high)
    return loss.per == "token" or first < last


def _lesson(micro: Micro, i: int, loss: Loss, vocabulary: int, low: int, high: int) -> Lesson:
    targets = micro.targets[i]
    seen = view(torch.empty(0, vocabulary), micro, targets, loss, (low, high))
    # a term weighs as its sample's teacher does, and belongs to the sample of its chunk, or of its position
    owner = targets.sample_C[slice(*targets.chunks(low, high))] if loss.per == "chunk" else micro.sample_P[low:high]
    return Lesson(replace(seen, index=loss.index(seen)), torch.from_numpy(targets.weight_B[owner]))
