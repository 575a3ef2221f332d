"""Bits per byte, KL, agreement and the teacher's own figure against sums made by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import XtokenError
from schemas.progress import Silent
from schemas.train_config import EvalConfig
from trainer.data.samples import Layout, read_sample
from trainer.data.targets import Targets
from trainer.evaluate import EvalSample, evaluate
from trainer.evaluate.agreement import heaviest
from trainer.losses import reference
from trainer.losses.base import ProjectionArrays
from trainer.losses.pkl import PKL
from trainer.student.model import load_student

SAMPLES = [EvalSample(np.array([3, 4, 5, 6, 1], np.int32), 9, 2), EvalSample(np.array([7, 8], np.int32), 3, 1)]


def eval_config(student_dir: str, **options: Any) -> EvalConfig:
    return EvalConfig(model=student_dir, max_tokens=32, device="cpu", **options)


def log_probabilities(model: Any, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0, :, :24].double().log_softmax(-1)


@pytest.mark.parametrize("context", [0, 1, None])
def test_bits_per_byte(student_dir: str, student_info: Any, context: int | None) -> None:
    """BOS first; eos first; nothing first, then the first token's bits and bytes do not count."""
    info = student_info.model_copy(update={"adds_bos": context == 0, "eos_id": None if context is None else 1})
    figures = evaluate(eval_config(student_dir, text="given"), info, SAMPLES, Silent())
    model, nats, size = load_student(student_dir, torch.device("cpu"), False), 0.0, 0
    for sample in SAMPLES:
        sequence = ([] if context is None else [context]) + sample.ids.tolist()
        logp = log_probabilities(model, sequence)
        nats -= float(sum(logp[i, token] for i, token in enumerate(sequence[1:])))
        size += sample.text_bytes - (sample.first_token_bytes if context is None else 0)
    assert size == (12 if context is not None else 9)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert figures["bytes"] == size


def test_kl_agreement_and_teacher(
    make_targets: Callable[..., str], student_dir: str, student_info: Any, pair: Any
) -> None:
    root = make_targets([[9, 12, 31], [30, 30, 32], [32, 32]])
    figures = evaluate(eval_config(student_dir, targets=root), student_info, [], Silent())
    targets, model = Targets(root), load_student(student_dir, torch.device("cpu"), False)
    W = torch.tensor(pair.weight_VU.astype(np.float32)).double()
    kl, agreed, chunks, nats, size = 0.0, 0, 0, 0.0, 0
    layout = Layout(0, 32, 24, (PKL(pair.setup()),))
    for ref in targets.groups:
        group = targets.read(ref, (*layout.columns(0), "teacher_logprob"))
        for row in range(ref.rows):
            sample = read_sample([(group, row)], layout)
            (part,) = sample.targets
            assert part is not None
            logp, entry = log_probabilities(model, sample.sequence.tolist()), 0
            for c, position in enumerate(part.first_C):
                count = int(part.columns["pkl_count"][c])
                ids = part.columns["pkl_ids"][entry : entry + count].tolist()
                p = np.exp(part.columns["pkl_logprob"][entry : entry + count].astype(float)).tolist()
                entry += count
                rest = float(np.exp(part.columns["pkl_rest_logprob"][c]))
                kl += float(reference.p_kl(logp[position].exp(), W, dict(zip(ids, p, strict=True)), rest))
                row_U = W[logp[position].argmax()]
                agreed += bool(row_U.sum() > 0) and int(row_U.argmax()) == ids[0]
                chunks += 1
            end_C, logprob_C = group.values("chunk_student_end", row), group.values("teacher_logprob", row)
            nats -= float(logprob_C[:-1].sum())
            size += int(end_C[-2])  # one byte per token; the last chunk has no row
    assert figures["chunks"] == chunks
    assert figures["kl"] == pytest.approx(kl / chunks, rel=1e-5)
    assert figures["top1_agreement"] == agreed / chunks > 0
    assert figures["teacher_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_heaviest_takes_the_larger_weight_then_the_lower_id() -> None:
    w = ProjectionArrays(
        np.array([1, 1, 1, 3, 3], np.int32),
        np.array([9, 2, 4, 8, 5], np.int32),
        np.array([0.1, 0.8, 0.1, 0.5, 0.5], np.float32),
        np.zeros(5, bool),
        np.zeros(5, bool),
    )
    assert heaviest(w, 5).tolist() == [-1, 2, -1, 5, -1]


def test_training_mode_is_given_back(student_dir: str, student_info: Any) -> None:
    from trainer.evaluate import measure_student
    from trainer.step import Student

    for mode in (True, False):
        model = load_student(student_dir, torch.device("cpu"), False).train(mode)
        student = Student(model, torch.device("cpu"), None, 24)
        measure_student(student, student_info, SAMPLES, None, 32, Silent())
        assert model.training is mode


def test_nothing_to_measure(make_targets: Callable[..., str], student_dir: str, student_info: Any) -> None:
    with pytest.raises(XtokenError, match="holds no tokens"):
        evaluate(eval_config(student_dir, text="given"), student_info, [], Silent())
    bare = student_info.model_copy(update={"adds_bos": False, "eos_id": None})
    with pytest.raises(XtokenError, match="no token that the model predicts"):
        evaluate(eval_config(student_dir, text="x"), bare, [EvalSample(np.array([3], np.int32), 1, 1)], Silent())
    with pytest.raises(XtokenError, match="no chunk"):
        evaluate(eval_config(student_dir, targets=make_targets([[1, 1]])), student_info, [], Silent())
    only = make_targets([[5, 5]], name="only", losses=("h-kl",))
    with pytest.raises(XtokenError, match="no columns for loss 'p-kl'"):
        evaluate(eval_config(student_dir, targets=only), student_info, [], Silent())
