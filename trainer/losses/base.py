"""What a distillation loss is: the student's log-probabilities of some positions in, one number per chunk out.

Shapes: P positions, C chunks, V student vocabulary, U teacher vocabulary, K entries summed over chunks or positions,
N entries of W.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.word_starts import SpaceSet, word_starts
from xtoken.trainer.ragged import Arrays, Columns, Ragged

WEIGHT = "chunk_weight"  # a column that follows from the ends of a chunk and stands in no table


@dataclass(frozen=True)
class ProjectionArrays:
    """W of a target folder, entries ascending by student id (see ``xtoken.schemas.tables.W``); every array is [N].

    ``common`` marks H-KL's pairs, ``exact`` those of equal bytes among them (strict GOLD's), and of conversations the
    tokens that end an answer on either side.
    """

    student_id: NDArray[np.int32]
    teacher_id: NDArray[np.int32]
    weight: NDArray[np.float32]
    common: NDArray[np.bool_]
    exact: NDArray[np.bool_]

    def within(self, size: int) -> "ProjectionArrays":
        """Without rows of student ids from ``size`` on: specials that the model's head does not have."""
        kept = self.student_id < size
        return ProjectionArrays(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class VocabArrays:
    """What losses ask of the student's tokens.

    Attributes:
        space_V: bool, the token begins a word (``xtoken.schemas.word_starts``).
        length_V: int32, bytes of text that the token stands for; 0 for specials.
        order: int32, text tokens in order of (bytes, id): what ``child_low`` and ``child_high`` count in.
    """

    space_V: NDArray[np.bool_]
    order: NDArray[np.int32]
    length_V: NDArray[np.int32]

    @classmethod
    def of(cls, token_bytes: Sequence[bytes], roles: Sequence[str | None], space: SpaceSet = "space") -> "VocabArrays":
        """From each token's bytes and role (None: text), and which tokens the targets say begin a word."""
        is_text = [role is None for role in roles]
        text = [i for i, (data, keep) in enumerate(zip(token_bytes, is_text, strict=True)) if keep and data]
        length = np.array([len(data) * keep for data, keep in zip(token_bytes, is_text, strict=True)], np.int32)
        return cls(
            word_starts(token_bytes, roles, space),
            np.array(sorted(text, key=lambda i: (token_bytes[i], i)), np.int32),
            length,
        )


@dataclass(frozen=True)
class LossSetup:
    """What losses are built from.

    Attributes:
        tau: distillation temperature of the targets.
        merge: how a chunk's teacher distributions became one: ``first``, ``last`` or ``mean``.
    """

    w: ProjectionArrays
    vocab: VocabArrays
    student_size: int
    teacher_size: int
    device: torch.device
    options: LossOptions = LossOptions()  # noqa: RUF009 - frozen
    tau: float = 1.0
    merge: str = "first"
    learn_w: bool = False


@dataclass(frozen=True, kw_only=True)
class View(Ragged[Tensor]):
    """Consecutive positions of a micro-batch, whole chunks only, with what is to be learnt there.

    Its columns are those the loss declares, on the device of the log-probabilities.

    Attributes:
        logp_PV: normalised log-probabilities at the loss's ``temperature``, at least float32.
        label_P: int64, the token that each position predicts in the text.
        index: what ``Loss.index`` made of it; None: not made yet.
    """

    logp_PV: Tensor
    label_P: Tensor
    spec: Columns = Columns()  # noqa: RUF009 - frozen; a view is cut no further
    index: Any = None


class Loss(ABC):
    """A distillation loss; the caller averages its terms over the valid chunks of the whole optimizer step.

    Attributes:
        columns: what it reads of the target table.
        per: ``terms`` gives one number per chunk, or one per position.
        temperature: of the log-probabilities it is shown; its terms are multiplied by the square of it.
        kinds: weights of one-to-one and of other chunks; None: all weigh the same. ``WEIGHT`` is then a column of its
            targets, and a chunk of weight 0 has none.
    """

    columns: ClassVar[Columns]
    per: ClassVar[Literal["chunk", "token"]] = "chunk"
    temperature: float = 1.0
    kinds: tuple[float, float] | None = None

    @property
    def spec(self) -> Columns:
        """The columns of its targets once they are read."""
        return self.columns if self.kinds is None else replace(self.columns, chunk=(*self.columns.chunk, WEIGHT))

    def check(self, arrays: Arrays) -> None:  # noqa: B027 - most losses have nothing to refuse
        """Refuse target entries that W or the vocabulary cannot serve, before they reach the device.

        Raises:
            VerificationError: an id is out of range or not reached by W.
        """

    def valid(self, start_C: NDArray[np.int64], arrays: Arrays) -> NDArray[np.bool_]:
        """Which chunks have a target, [C]; ``start_C`` is the index of the chunk's first student token."""
        counts = [arrays[name].astype(np.int64) for name in self.columns.entries if name in self.columns.chunk]
        return np.sum(counts, axis=0) > 0 if counts else np.zeros(len(start_C), np.bool_)

    def regroup(self, end_C: NDArray[np.int64], arrays: Arrays) -> tuple[NDArray[np.int64], Arrays]:
        """Join consecutive chunks of a sample: new student ends and chunk columns (here: none are joined)."""
        return end_C, arrays

    def agrees(self, view: View) -> Tensor | None:  # noqa: ARG002 - for those that can tell
        """Bool [C]: student and teacher hold the same token for the most probable at the chunk's first position.

        None where the targets do not tell.
        """
        return None

    def index(self, view: View) -> Any:  # noqa: ARG002 - for those that have one
        """Where a view's targets lie, of which the student knows nothing: made on the host before the pass begins.

        Args:
            view: on the CPU; of its log-probabilities only the width is known, [0, V].

        Returns:
            Tensors and numbers in (nested) tuples; ``indexed`` finds it, with its tensors on the device of the view.
        """
        return None

    def indexed(self, view: View) -> Any:
        """The ``index`` of a view, made now where a view was made by hand."""
        return self.index(view) if view.index is None else view.index

    @abstractmethod
    def terms(self, view: View) -> Tensor:
        """The loss in nats, [C] or [P] as ``per`` says, without the factor temperature squared."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the loss itself learns."""
        return []


class FeatureLoss(Loss):
    """A loss of few numbers per position, whose chunks may be longer than the positions that fit memory at once.

    The step collects the features of a whole micro-batch first, then takes the gradient through them block by block;
    unless ``local``, where a block of whole chunks holds all that they need and is scored like any other loss's.
    """

    local: bool = False

    @abstractmethod
    def features(self, logp_PV: Tensor, label_P: Tensor) -> Tensor:
        """[P, F] numbers of each position."""

    @abstractmethod
    def terms_of(self, feature_PF: Tensor, view: View) -> Tensor:
        """The loss [C] from the features of all positions; ``view.logp_PV`` must not be touched."""

    def terms(self, view: View) -> Tensor:
        """See ``Loss.terms``."""
        return self.terms_of(self.features(view.logp_PV, view.label_P), view)


class Entries(NamedTuple):
    """The kept part of teacher distributions: the entries of one chunk (or position) after those of the other.

    Attributes:
        count_C: entries of each chunk.
        id_K: their tokens, in the vocabulary that the loss compares in.
        logp_K: the teacher's log-probabilities, nats.
    """

    count_C: Tensor
    id_K: Tensor
    logp_K: Tensor

    @classmethod
    def of_view(cls, view: View, stem: str) -> "Entries":
        """The columns ``STEM_count``, ``STEM_ids`` and ``STEM_logprob``."""
        return cls(*(view.columns[f"{stem}_{name}"] for name in ("count", "ids", "logprob")))

    @classmethod
    def top(cls, logp_CU: Tensor, k: int) -> "tuple[Entries, Tensor]":
        """The ``k`` most probable tokens of whole distributions, and the log of what is left, the tail mass, [C]."""
        kept = logp_CU.topk(k)
        count_C = torch.full((len(logp_CU),), k, device=logp_CU.device)
        tail_C = (1 - kept.values.exp().sum(1)).clamp(min=0).log()
        return cls(count_C, kept.indices.reshape(-1), kept.values.reshape(-1)), tail_C


class Places(NamedTuple):
    """Where entries lie among the student's log-probabilities [P, V].

    Attributes:
        owner_K: int64, the chunk (or position) of each entry.
        place_K: int64, its place in [P, V] laid flat.
    """

    owner_K: Tensor
    place_K: Tensor

    @classmethod
    def of(cls, count_C: Tensor, id_K: Tensor, width: int, row_C: Tensor | None = None) -> "Places":
        """Of entries by student id; ``row_C`` is the position of each chunk, where not every position is one."""
        owner_K = owners(count_C, len(id_K))
        row_K = owner_K if row_C is None else row_C[owner_K]
        return cls(owner_K, row_K * width + id_K.long())

    @classmethod
    def of_view(cls, view: View, stem: str, row_C: Tensor | None = None) -> "Places":
        """Of the columns ``STEM_count`` and ``STEM_ids``."""
        return cls.of(view.columns[f"{stem}_count"], view.columns[f"{stem}_ids"], view.logp_PV.shape[1], row_C)


def owners(count_C: Tensor, total: int | None = None) -> Tensor:
    """int64 [K]: for each entry the chunk it belongs to.

    Args:
        total: K, where it is known: a GPU that is asked for the sum of the counts must first finish all else.
    """
    each_C = torch.arange(len(count_C), device=count_C.device)
    return torch.repeat_interleave(each_C, count_C.long(), output_size=total)
