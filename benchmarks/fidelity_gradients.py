"""Gradients of the product's losses from stored rows, and of the same losses from whole rows, by the student's logits.

Shapes: C chunks with a teacher row, U teacher vocabulary, V student vocabulary, H hidden, P student inputs.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.align.chunks import cut
from xtoken.pipeline.align.kernels_prefix import prefix_entries
from xtoken.pipeline.align.kernels_project import project_rows
from xtoken.pipeline.align.kernels_targets import merged, split_targets
from xtoken.pipeline.align.maps import Routes
from xtoken.pipeline.align.prefix import PrefixMaps, first_tokens
from xtoken.pipeline.align.rows import Rows
from xtoken.pipeline.corpus import Document, windows
from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.project.projection import EXACT, Projection
from xtoken.pipeline.teachers.base import shows_bos
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.capture import TeacherGroup
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup, ProjectionArrays, View, VocabArrays

LOSSES = ("p-kl", "byte-prefix", "sparse-kl")
TOKENS = 256  # teacher tokens of a window
_BLOCK = 32


@dataclass(frozen=True)
class Window:
    """One sample, at the positions where a chunk with a teacher row begins.

    Attributes:
        name: document it is from.
        student_P: int64, inputs of the student; first_C: positions that predict a chunk's first token.
        hidden_CH: the student's last hidden states there; logp_CV: its log-probabilities.
        logprob_CU: the teacher's rows.
    """

    name: str
    student_P: Tensor
    first_C: Tensor
    hidden_CH: Tensor
    logp_CV: Tensor
    logprob_CU: Tensor


@dataclass(frozen=True)
class Pair:
    """Two models and what lies between their tokenizers."""

    teacher: Any
    student: Any
    teacher_tokens: TextTokenizer
    student_tokens: TextTokenizer
    projection: Projection
    prefix: PrefixMaps

    @property
    def head_VH(self) -> Tensor:
        """The student's output matrix."""
        return self.student.get_output_embeddings().weight.detach()


def load_pair(teacher: Path, student: Path, student_tokens: Path) -> Pair:
    """Load both models and build W."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (teacher, student)]
    tokens = [load_tokenizer(str(path)) for path in (teacher, student_tokens)]
    projection = build_w(tokens[1].table, tokens[0].table)
    phi_B = first_tokens(tokens[0].table, tokens[1])
    prefix = PrefixMaps.of(tokens[1].table, tokens[0].table, projection, phi_B)
    return Pair(models[0], models[1], tokens[0], tokens[1], projection, prefix)


def open_losses(pair: Pair, names: tuple[str, ...]) -> dict[tuple[str, bool], Loss]:
    """The product's losses by name and whether REST is dropped; byte-prefix with its root term alone."""
    found, student = pair.projection, pair.student_tokens.table
    exact = found.common & (found.kind == EXACT)
    w = ProjectionArrays(found.student_id, found.teacher_id, found.weight, found.common, exact)
    setup = partial(
        LossSetup,
        w,
        VocabArrays.of(student.pieces(), student.role),
        student.size,
        pair.teacher_tokens.table.size,
        torch.device("cpu"),
    )
    options = {drop: LossOptions(rest="drop" if drop else "bucket", prefix=["root"]) for drop in (False, True)}
    return {(name, drop): open_loss(name, setup(options[drop])) for name in names for drop in (False, True)}


def read_window(pair: Pair, document: Document, number: int) -> Window:
    """A window of a document through both models."""
    found = [piece for piece in windows(document, pair.teacher_tokens, TOKENS) if not piece.complete]
    piece = found[min(number, len(found) - 1)].encoded
    mine, table = pair.student_tokens.encode(piece.text, complete=False, keep_text=True), pair.teacher_tokens.table
    chunks = cut(mine.ends, piece.ends, student_eos=False, teacher_eos=False)
    starts = [np.concatenate([[0], end[:-1]]) for end in (chunks.student_end, chunks.teacher_end)]
    bos = shows_bos(TeacherGroup(teacher=table.info.name), table.info)
    row_C = starts[1] - int(not bos)
    used_C = row_C >= 0
    context = context_token(pair.student_tokens.table.info)
    student_P = torch.tensor([*([] if context is None else [context]), *mine.ids.tolist()])
    first_C = torch.from_numpy(starts[0][used_C].astype(np.int64)) - int(context is None)
    teacher_T = torch.tensor([*([table.info.bos_id] if bos else []), *piece.ids.tolist()])
    with torch.inference_mode():
        hidden_CH = pair.student.model(input_ids=student_P[None]).last_hidden_state[0, first_C]
        logp_CV = (hidden_CH @ pair.head_VH.T).log_softmax(dim=-1)
        states = pair.teacher.model(input_ids=teacher_T[None]).last_hidden_state[0, torch.from_numpy(row_C[used_C])]
        logprob_CU = pair.teacher.get_output_embeddings()(states)
        logprob_CU.sub_(logprob_CU.logsumexp(dim=-1, keepdim=True))
    return Window(document.id, student_P, first_C, hidden_CH.clone(), logp_CV.clone(), logprob_CU.clone())


def targets(pair: Pair, loss: str, rows: Rows) -> dict[str, NDArray[Any]]:
    """Columns of one loss for rows that are one to a chunk, by the kernels of align."""
    found, row_C = pair.projection, np.arange(len(rows.rest))
    kept = (rows.offsets, rows.ids, rows.logprob)
    routes = Routes.of(found.routes("prefix"), found.columns_by_kind())
    if loss == "p-kl":
        columns = project_rows(row_C, *kept, rows.p, rows.rest, *routes, False, len(rows.ids))
        names = ("pkl_count", "pkl_ids", "pkl_logprob", "pkl_rest_logprob")
        return dict(zip(names, columns[:4], strict=True))
    if loss == "sparse-kl":
        same = np.arange(found.teacher.size, dtype=np.int32)
        columns = split_targets(row_C, *kept, same)
        names = ("skl_count", "skl_ids", "skl_logprob")
        return {**dict(zip(names, columns[:3], strict=True)), "skl_rest_logprob": rows.rest.astype(np.float32)}
    nothing_C, maps = np.zeros(len(row_C), np.int32), pair.prefix
    vocab = (maps.teacher.data, maps.teacher.offsets, maps.phi_B, maps.role_U)
    count, ids, logprob, rest = prefix_entries(row_C, nothing_C, nothing_C, *kept, rows.rest, *vocab)
    values = (*merged(count, ids, logprob), rest)
    columns = dict(zip(("prefix_count", "prefix_ids", "prefix_logprob", "prefix_rest_logprob"), values, strict=True))
    none = np.zeros(0, np.int32)
    return {**columns, "child_count": nothing_C, "child_low": none, "child_high": none, "child_logprob": none}


def gradient(loss: Loss, window: Window, columns: dict[str, NDArray[Any]]) -> tuple[Tensor, float]:
    """[C, V]: of the product's loss, summed over chunks, by the logits; and its value."""
    leaf = window.logp_CV.clone().requires_grad_()
    every_C = torch.arange(len(leaf))
    view = View(
        every_C,
        torch.ones_like(every_C),
        torch.full_like(every_C, -1),
        {name: torch.from_numpy(value) for name, value in columns.items()},
        logp_PV=leaf,
        label_P=torch.zeros_like(every_C),
    )
    total = loss.terms(view).sum()
    (grad_CV,) = torch.autograd.grad(total, leaf)
    return _by_logits(grad_CV, window.logp_CV), float(total.detach())


def _by_logits(grad_CV: Tensor, logp_CV: Tensor) -> Tensor:
    """The gradient by the logits from that by the log-probabilities, as the softmax has it."""
    return grad_CV.addcmul_(logp_CV.exp(), grad_CV.sum(dim=1, keepdim=True), value=-1.0)


def whole_gradient(pair: Pair, loss: str, window: Window) -> tuple[Tensor, float, float]:
    """The same from whole rows, written densely: gradient, value, and the sum of the targets' entropies."""
    grad_CV, value, entropy = torch.empty_like(window.logp_CV), 0.0, 0.0
    for start in range(0, len(grad_CV), _BLOCK):
        block = slice(start, start + _BLOCK)
        leaf = window.logp_CV[block].clone().requires_grad_()
        p, logq = _dense(pair, loss, window.logprob_CU[block].exp(), leaf)
        ours, total = float(-torch.xlogy(p, p).sum()), -(p * logq).sum()
        (found,) = torch.autograd.grad(total, leaf)
        grad_CV[block] = _by_logits(found, window.logp_CV[block])
        value, entropy = value + float(total.detach()) - ours, entropy + ours
    return grad_CV, value, entropy


def _dense(pair: Pair, loss: str, p_CU: Tensor, logq_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher probabilities and student log-probabilities over the same cells."""
    if loss == "sparse-kl":
        return p_CU, logq_CV
    if loss == "byte-prefix":
        return logq_CV.new_zeros(logq_CV.shape[0], logq_CV.shape[1] + 1).index_add_(1, _phi(pair), p_CU)[
            :, :-1
        ], logq_CV
    w, route_U = pair.projection, torch.from_numpy(pair.projection.routes("prefix")).long()
    held = route_U >= 0
    p = torch.zeros_like(p_CU).index_add_(1, route_U[held], p_CU[:, held])
    share_CN = logq_CV.exp()[:, torch.from_numpy(w.student_id).long()] * torch.from_numpy(w.weight)
    q = torch.zeros_like(p_CU).index_add(1, torch.from_numpy(w.teacher_id).long(), share_CN)
    return p, q.clamp(min=1e-30).log()


def _phi(pair: Pair) -> Tensor:
    """int64 [U]: the student token at the root of each teacher token; V = none."""
    maps, teacher, size = pair.prefix, pair.prefix.teacher, pair.student_tokens.table.size
    first_U = np.where(teacher.lengths > 0, maps.phi_B[np.minimum(teacher.offsets[:-1], len(maps.phi_B) - 1)], -1)
    target_U = np.where(teacher.lengths > 0, first_U, maps.role_U)
    return torch.from_numpy(np.where(target_U < 0, size, target_U).astype(np.int64))


def body_gradient(pair: Pair, window: Window, grad_CH: Tensor) -> None:
    """Add to the student's ``grad`` what a gradient by its last hidden states makes of the layers below."""
    states_PH = pair.student.model(input_ids=window.student_P[None]).last_hidden_state[0]
    states_PH[window.first_C].backward(grad_CH)
