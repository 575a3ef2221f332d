"""How near a student is to its teacher on held-out targets.

Shapes: C chunks, V student vocabulary, K entries summed over chunks.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import XtokenError
from schemas.manifest import TokenizerInfo
from schemas.progress import Progress
from trainer.data.micro import Micro, split_micros
from trainer.data.samples import Layout, context_token, read_sample
from trainer.data.targets import RowGroup, Targets
from trainer.evaluate.bits_per_byte import MICRO_TOKENS
from trainer.losses.base import LossSetup, ProjectionArrays
from trainer.losses.pkl import PKL
from trainer.step import Block, Student, block_view, blocks

_TEACHER_COLUMNS = ("student_end", "teacher_logprob")


class _Tally:
    """Sums over chunks and, for the teacher, over the bytes of chunks that have rows."""

    def __init__(self) -> None:
        self.kl, self.agreed, self.chunks = 0.0, 0, 0
        self.teacher_nats, self.teacher_bytes = 0.0, 0

    def figures(self) -> dict[str, float]:
        if not self.chunks:
            raise XtokenError("the held-out targets hold no chunk that the student predicts; align a longer text")
        figures = {
            "kl": self.kl / self.chunks,
            "top1_agreement": self.agreed / self.chunks,
            "chunks": float(self.chunks),
        }
        if self.teacher_bytes:
            figures["teacher_bits_per_byte"] = self.teacher_nats / math.log(2) / self.teacher_bytes
        return figures


def agreement(
    student: Student, tokenizer: TokenizerInfo, targets: Targets, max_tokens: int, progress: Progress
) -> dict[str, float]:
    """KL to the teacher and top-1 agreement over all chunks, and the teacher's own bits per byte.

    They agree on a chunk where the teacher token with the largest weight in the W row of the student's most probable
    token is the target's most probable one.

    Raises:
        XtokenError: no chunk can be compared.
    """
    size = student.vocabulary
    teacher_size = targets.manifest.teacher_tokenizer.size
    setup = LossSetup(targets.w.within(size), targets.vocab, size, teacher_size, student.device)
    loss, heaviest_V = PKL(setup), torch.as_tensor(heaviest(setup.w, size), device=student.device)
    layout = Layout(context_token(tokenizer), max_tokens, size, (loss,))
    tally = _Tally()
    progress.start("agreement", targets.samples, "samples")
    with torch.no_grad():
        for group, micros in _micros(targets, layout):
            _add_teacher(tally, group)
            for micro in micros:
                for block in blocks(student.logits(micro), micro, student.vocabulary, layout.losses):
                    _add_block(tally, block, micro, loss, heaviest_V)
            progress.advance(group.ref.rows)
    progress.finish()
    return tally.figures()


def heaviest(w: ProjectionArrays, size: int) -> NDArray[np.int64]:
    """int64 [V]: for each student token the teacher token of the largest weight (lower id on a tie), or -1."""
    order = np.lexsort((w.teacher_id, -w.weight, w.student_id))
    first = order[np.flatnonzero(np.diff(w.student_id[order], prepend=-1))]
    best_V = np.full(size, -1, np.int64)
    best_V[w.student_id[first]] = w.teacher_id[first]
    return best_V


def _micros(targets: Targets, layout: Layout) -> Iterator[tuple[RowGroup, list[Micro]]]:
    for ref in targets.groups:
        group = targets.read(ref, (*layout.columns(0), *_TEACHER_COLUMNS))
        samples = [read_sample([(group, row)], layout) for row in range(ref.rows)]
        yield group, split_micros(samples, MICRO_TOKENS, layout.losses)


def _add_block(tally: _Tally, block: Block, micro: Micro, loss: PKL, heaviest_V: torch.Tensor) -> None:
    view = block_view(block, micro, micro.lessons[0], loss)
    if not len(view.first_C):
        return
    count_C = view.columns["pkl_count"]
    first_C = view.columns["pkl_ids"][count_C.cumsum(0) - count_C].long()
    tally.kl += float(loss.terms(view).sum())
    tally.agreed += int((heaviest_V[view.first_rows.argmax(dim=1)] == first_C).sum())
    tally.chunks += len(first_C)


def _add_teacher(tally: _Tally, group: RowGroup) -> None:
    """Log-probability and bytes of every chunk whose teacher tokens all have rows, cut samples included."""
    for row in range(group.ref.rows):
        logprob_C = group.values("teacher_logprob", row).astype(np.float64)
        byte_end_S = np.concatenate([[0], group.values("student_end", row)])
        end_C = byte_end_S[group.values("chunk_student_end", row)]
        known_C = ~np.isnan(logprob_C)
        tally.teacher_nats -= float(logprob_C[known_C].sum())
        tally.teacher_bytes += int(np.diff(end_C, prepend=0)[known_C].sum())
