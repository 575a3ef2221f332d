"""How near a student is to its teacher on held-out targets.

Shapes: C chunks, V student vocabulary, G categories of text and one for holes.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from xtoken.schemas.categories import CATEGORIES
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro, split_micros
from xtoken.trainer.data.samples import context_token, read_samples
from xtoken.trainer.data.targets import RowGroup, Targets
from xtoken.trainer.evaluate.bits_per_byte import micro_tokens
from xtoken.trainer.evaluate.spelling import token_bytes
from xtoken.trainer.evaluate.together import together
from xtoken.trainer.losses.base import LossSetup
from xtoken.trainer.losses.pkl import PKL
from xtoken.trainer.objective import Student
from xtoken.trainer.ranks import ALONE, Ranks

_TEACHER_COLUMNS = ("student_end", "teacher_logprob")


class _Tally:
    """Sums over chunks by the category of their text; for the teacher, over the bytes of chunks that have rows."""

    def __init__(self) -> None:
        groups = len(CATEGORIES) + 1
        self.kl_G, self.agreed_G = np.zeros(groups), np.zeros(groups, np.int64)
        self.chunks_G = np.zeros(groups, np.int64)
        self.teacher_nats, self.teacher_bytes = 0.0, 0

    def add(self, kl_C: torch.Tensor, agreed_C: torch.Tensor, group_C: torch.Tensor) -> None:
        """Count chunks."""
        group, groups = group_C.cpu().numpy(), len(self.kl_G)
        self.kl_G += np.bincount(group, kl_C.cpu().double().numpy(), groups)
        self.agreed_G += np.bincount(group[agreed_C.cpu().numpy()], minlength=groups)
        self.chunks_G += np.bincount(group, minlength=groups)

    def shared(self, ranks: Ranks) -> "_Tally":
        """The sums of all ranks."""
        total, groups = _Tally(), len(self.kl_G)
        plain = [self.teacher_nats, self.teacher_bytes]
        sums = ranks.sum([*self.kl_G.tolist(), *self.agreed_G.tolist(), *self.chunks_G.tolist(), *plain])
        total.kl_G = np.array(sums[:groups])
        total.agreed_G, total.chunks_G = np.array(sums[groups : 3 * groups], np.int64).reshape(2, groups)
        total.teacher_nats, total.teacher_bytes = sums[-2], int(sums[-1])
        return total

    def figures(self) -> dict[str, Any]:
        """See ``agreement``."""
        if not self.chunks_G.any():
            raise XtokenError("the held-out targets hold no chunk that the student predicts; align a longer text")
        figures = self._of(slice(None))
        if self.teacher_bytes:
            figures["teacher_bits_per_byte"] = self.teacher_nats / math.log(2) / self.teacher_bytes
        by_category = {name: self._of(slice(i, i + 1)) for i, name in enumerate(CATEGORIES) if self.chunks_G[i]}
        return {**figures, "by_category": by_category}

    def _of(self, groups: slice) -> dict[str, Any]:
        chunks = int(self.chunks_G[groups].sum())
        return {
            "kl": float(self.kl_G[groups].sum()) / chunks,
            "top1_agreement": int(self.agreed_G[groups].sum()) / chunks,
            "chunks": chunks,
        }


def agreement(
    student: Student,
    tokenizer: TokenizerInfo,
    targets: Targets,
    max_tokens: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """KL to the teacher and top-1 agreement over all chunks, and the teacher's own bits per byte.

    They agree on a chunk where the teacher token with the largest weight in the W row of the student's most probable
    token is the target's most probable one.

    Args:
        ranks: share the row groups out; all must call this, and all return the same.

    Returns:
        ``kl`` (mean P-KL per chunk, nats), ``top1_agreement`` (share), ``chunks``, and these by the category of the
        chunk's first student token under ``by_category`` (see ``schemas.categories``); ``teacher_bits_per_byte``,
        unless an imported capture lacks labels. Where it lacks the tail mass, KL is over the kept entries alone.

    Raises:
        XtokenError: no chunk can be compared.
    """
    size, device = student.vocabulary, student.device
    teacher_size = targets.manifest.teacher_tokenizer.size
    known = targets.manifest.imported
    options = LossOptions(rest="bucket" if known is None or known.whole_rest else "drop")
    setup = LossSetup(targets.w.within(size), targets.vocab, size, teacher_size, device, options)
    loss, group_V = PKL(setup), torch.as_tensor(token_bytes(targets).categories(), device=device)
    chat = targets.manifest.chat is not None
    layout = Layout(None if chat else context_token(tokenizer), max_tokens, size, (loss,), chat=chat)
    tally, mine = _Tally(), targets.groups[ranks.rank :: ranks.size]

    def micros() -> Iterator[Micro]:
        for ref in mine:
            group = targets.read(ref, (*layout.columns(0), *_TEACHER_COLUMNS))
            _add_teacher(tally, group)
            samples = read_samples([[(group, row)] for row in range(ref.rows)], layout)
            yield from split_micros(samples, micro_tokens(student), layout.losses)
            progress.advance(ref.rows)

    progress.start("agreement", sum(ref.rows for ref in mine), "samples")
    with torch.no_grad():
        for micro in together(student, micros(), ranks):
            for block in student.blocks(micro, layout.losses):
                (lesson,) = block.piece.lessons
                if lesson is not None:
                    view = lesson.at(block.logp(loss.temperature))
                    tally.add(loss.terms(view), loss.agrees(view), group_V[view.label_P[view.first_C]])
    progress.finish()
    figures = tally.shared(ranks).figures()
    if known is not None and known.labels_unknown > 0:  # those that are there are the likely ones
        figures.pop("teacher_bits_per_byte", None)
    return figures


def _add_teacher(tally: _Tally, group: RowGroup) -> None:
    """Log-probability and bytes of every chunk whose teacher tokens all have rows, cut samples included."""
    for row in range(group.ref.rows):
        logprob_C = group.values("teacher_logprob", row).astype(np.float64)
        byte_end_S = np.concatenate([[0], group.values("student_end", row)])
        end_C = byte_end_S[group.values("chunk_student_end", row)]
        known_C = np.isfinite(logprob_C)
        tally.teacher_nats -= float(logprob_C[known_C].sum())
        tally.teacher_bytes += int(np.diff(end_C, prepend=0)[known_C].sum())
