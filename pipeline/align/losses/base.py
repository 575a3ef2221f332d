"""What a loss is to align: how its target columns are built, what it refuses, and what must hold of them.

A loss is one file here with a class ``Builder``, and an entry in ``xtoken.schemas.losses.LOSSES`` that names the file
and the columns. From what those columns hold follow the rules that every part is checked by (``checks.py``), the views
of 'xtoken query' and the tables of a sample's page, so none of these has a list of losses.

Shapes: N samples, S student tokens, R teacher distributions, C chunks, K kept entries (all samples of a batch
together), U teacher vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.align.blanks import Shifted
from xtoken.pipeline.align.chunks import Joined, chunks_per_sample, gaps, offsets_of
from xtoken.pipeline.align.kernels import realised
from xtoken.pipeline.align.kernels_targets import split_targets
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.rows import Recipe, RowBatch, Rows, merge_rows
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.manifest import CaptureManifest, TokenizerInfo

Values = dict[str, NDArray[Any]]
Built = tuple[Values, Mapping[str, int]]


@dataclass(frozen=True)
class Source:
    """What the columns of a batch are made of.

    Attributes:
        batch: of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        maps: of the pair.
        recipe: what is asked for.
        rows: all teacher distributions of the batch, decoded.
        start_C, end_C: which of them belong to each chunk (``RowBatch.spans``).
    """

    batch: pa.RecordBatch
    samples: Sequence[Joined]
    maps: Maps
    recipe: Recipe
    rows: RowBatch
    start_C: NDArray[np.int64]
    end_C: NDArray[np.int64]

    @property
    def chat(self) -> bool:
        """Whether the samples are conversations."""
        return "span_learn" in self.batch.schema.names

    @cached_property
    def shifted(self) -> Shifted:
        """The teacher's distributions, with those of chunks that one side begins with a blank of its own shifted."""
        rows = self.rows.rows
        if self.maps.blanks is None:
            return Shifted.none(rows, self.start_C)
        return self.maps.blanks.shift(self.batch, self.samples, rows, self.start_C)

    @cached_property
    def plain(self) -> tuple[Rows, NDArray[np.int64]]:
        """Distributions as the teacher gave them, and which is each chunk's."""
        return merge_rows(self.rows.rows, self.start_C, self.end_C, self.recipe.merge, self.maps.teacher_size)

    def merged(self, *, prefix: bool = False) -> tuple[Rows, NDArray[np.int64]]:
        """Distributions in the student's terms, and which is each chunk's; a mean leaves the shifted ones out.

        Args:
            prefix: see ``Shifted.prefix_C``.
        """
        (rows, row_C), shifted = self.plain, self.shifted
        moved_C = shifted.moved_C
        if not moved_C.any():
            return rows, row_C
        if self.recipe.merge == "mean":
            return rows, np.where(moved_C, -1, row_C)
        instead_C = shifted.prefix_C if prefix else shifted.row_C
        return shifted.rows, np.where(moved_C & (row_C == self.start_C), instead_C, row_C)

    @cached_property
    def one_to_one(self) -> NDArray[np.bool_]:
        """bool [C]: chunks of one teacher token and one student token."""
        first_N = offsets_of(chunks_per_sample(self.samples))[:-1]
        single_C = ~gaps(self.samples)
        for side in ("student_end", "teacher_end"):
            ends = [getattr(sample.chunks, side) for sample in self.samples]
            size_C = np.diff(np.concatenate([np.zeros(0, np.int32), *ends]), prepend=np.int32(0))
            filled_N = first_N[[len(end) > 0 for end in ends]]
            size_C[filled_N] = [end[0] for end in ends if len(end)]
            single_C &= size_C == 1
        return single_C

    def split(self, pair_U: NDArray[np.int32], of_C: NDArray[np.int64] | None = None) -> tuple[NDArray[Any], ...]:
        """``split_targets`` of every chunk; ``of_C``: of which distribution, where not of the one of ``merged``."""
        rows, merged_C = self.merged()
        row_C = merged_C if of_C is None else of_C
        return split_targets(row_C, rows.offsets, rows.ids, rows.logprob, pair_U)

    def factored(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Which distribution is each chunk's, -1 = none, and column ``factor_logprob``: a chunk whose factor an
        imported capture does not know has neither."""
        factor_C = self.label_factor()
        row_C = self.merged()[1]
        return np.where(np.isnan(factor_C), -1, row_C), factor_C

    def label_factor(self) -> NDArray[np.float32]:
        """Column ``factor_logprob``: labels before a chunk's last distribution or after its first; NaN = none."""
        start_C, end_C = self.start_C, self.end_C
        if self.recipe.merge == "last":
            return realised(self.rows.realised, start_C, end_C - 1)
        return realised(self.rows.realised, np.where(start_C < 0, -1, start_C + 1), end_C)


@dataclass(frozen=True)
class TargetBuilder:
    """Builds the columns that one loss adds to a target table.

    Attributes:
        name: the loss, of ``xtoken.schemas.losses.LOSSES``.
        needs_rows: it reads the teacher's distributions, which a subset may have left out.
        needs_tail: it has no meaning without the tail mass at the temperature of the targets.
        not_linear: why its targets are not linear in a distribution, as in "compares sorted lists"; samples are right
            in the mean only, so captures that hold them cannot serve it. Empty = linear.
        needs_prefix_maps: it reads ``Maps.prefix``, which takes seconds to make.
        revision: counted up where the same flags begin to give other columns, so that no folder holds both.
        w_rule: the rule of 'xtoken project' that W is built by where none is given; empty = it serves through any W.
        rules: what must hold of its targets beyond what their columns say: a sentence, and the SQL condition under
            which a sample breaks it, over the columns of ``checks.summary_batch``.
    """

    name: str
    needs_rows: ClassVar[bool] = True
    needs_tail: ClassVar[bool] = True
    not_linear: ClassVar[str] = ""
    needs_prefix_maps: ClassVar[bool] = False
    revision: ClassVar[int] = 0
    w_rule: ClassVar[str] = ""
    rules: ClassVar[Mapping[str, str]] = {}

    def columns(self, source: Source) -> Built:  # noqa: ARG002
        """The loss's columns by name, all samples one after the other, and counts for ``Part.counts``."""
        return {}, {}

    def refuse(self, config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:
        """Raise XtokenError where the loss has no meaning for this pair or capture, whatever the codec holds."""

    def without_tail(self, config: AlignConfig) -> str:  # noqa: ARG002
        """What of these settings needs the tail mass at their temperature, in words; empty = nothing."""
        return self.name if self.needs_tail else ""

    def biased(self, config: AlignConfig) -> Sequence[str]:  # noqa: ARG002
        """Why a capture of samples cannot serve these settings, a clause each."""
        return [f"--for {self.name} {self.not_linear}"] if self.not_linear else []


class TextAlone(TargetBuilder):
    """A loss that adds no column (``ce``)."""

    needs_rows: ClassVar[bool] = False
    needs_tail: ClassVar[bool] = False
