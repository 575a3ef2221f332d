"""A step's objective: independent of micro-batches, blocks and padding, and equal to its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trainer.step as step_module
from trainer.batches import Layout, Loader, StepBatch
from trainer.losses import open_loss
from trainer.losses.base import Loss
from trainer.model import load_student
from trainer.step import Figures, Mixing, Student, run_step
from trainer.targets import Targets

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10]]
FIXED = Mixing("fixed", 0.7, 0.3)
DYNAMIC = Mixing("dynamic", 1.0, 0.1)
ROUNDING = 1e-5  # float32 gradients summed in another order


def student_of(folder: str) -> Student:
    return Student(load_student(folder, torch.device("cpu"), False).double(), torch.device("cpu"), None, 24)


def batch_of(root: str, loss: Loss, micro_tokens: int) -> StepBatch:
    layout = Layout(0, 32, 24, loss.columns)
    return Loader(Targets(root), layout, step_tokens=200, micro_tokens=micro_tokens, seed=0).step()


def gradients(student: Student, batch: StepBatch, loss: Loss, mixing: Mixing) -> tuple[Figures, list[torch.Tensor]]:
    student.model.zero_grad(set_to_none=True)
    figures = run_step(student, batch, loss, mixing)
    return figures, [p.grad.clone() for p in student.model.parameters()]


@pytest.mark.parametrize("mixing", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ["p-kl", "h-kl", "ce"])
def test_micro_batches_and_blocks_do_not_matter(
    make_targets: Callable[..., str],
    student_dir: str,
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mixing: Mixing,
) -> None:
    root, student, loss = make_targets(LENGTHS), student_of(student_dir), open_loss(name, pair.setup())
    whole = batch_of(root, loss, 1000)
    split = batch_of(root, loss, 13)
    assert len(whole.micros) == 1
    assert len(split.micros) > 4
    figures, grads = gradients(student, whole, loss, mixing)
    monkeypatch.setattr(step_module, "BLOCK_ELEMENTS", 24 * 3)
    figures_split, grads_split = gradients(student, split, loss, mixing)
    assert figures_split.loss == pytest.approx(figures.loss, rel=ROUNDING)
    assert (figures.kd is None) == (name == "ce")
    for one, other in zip(grads, grads_split, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("name", ["p-kl", "h-kl"])
def test_gradient_is_that_of_the_definition(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str
) -> None:
    """kd_weight * KD / chunks + ce_weight * CE / tokens, by autograd through everything at once."""
    root, student, loss = make_targets(LENGTHS), student_of(student_dir), open_loss(name, pair.setup())
    batch = batch_of(root, loss, 1000)
    figures, grads = gradients(student, batch, loss, FIXED)
    (micro,) = batch.micros
    student.model.zero_grad(set_to_none=True)
    logp = student.logits(micro).reshape(-1, 32)[torch.from_numpy(micro.place_P)][:, :24].log_softmax(-1)
    columns = {k: torch.from_numpy(v) for k, v in micro.chunk_slice(0, len(micro.row_C)).items()}
    kd = loss.total(logp[torch.from_numpy(micro.row_C)], columns) / len(micro.row_C)
    ce = -logp[torch.arange(len(micro.label_P)), torch.from_numpy(micro.label_P)].mean()
    (0.7 * kd + 0.3 * ce).backward()
    assert figures.kd == pytest.approx(float(kd.detach()), rel=1e-9)
    assert figures.ce == pytest.approx(float(ce.detach()), rel=1e-9)
    for one, parameter in zip(grads, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-10)


def test_dynamic_mixing_scales_kd_to_ce(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    root, student, loss = make_targets(LENGTHS), student_of(student_dir), open_loss("p-kl", pair.setup())
    batch = batch_of(root, loss, 20)
    figures, grads = gradients(student, batch, loss, DYNAMIC)
    assert figures.loss == pytest.approx(2 * figures.ce, rel=1e-9)
    assert figures.kd is not None
    _, fixed = gradients(student, batch, loss, Mixing("fixed", figures.ce / figures.kd, 1.0))
    for one, other in zip(grads, fixed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_dynamic_mixing_without_kd_is_ce(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    """Samples of one token have no chunk with a row: KD is 0, and nothing divides by it."""
    root, student, loss = make_targets([[1, 1]]), student_of(student_dir), open_loss("p-kl", pair.setup())
    batch = batch_of(root, loss, 20)
    assert batch.chunks == 0
    figures, grads = gradients(student, batch, loss, DYNAMIC)
    assert figures.loss == figures.ce
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_padded_head_columns_get_no_gradient_and_no_probability(
    make_targets: Callable[..., str], student_dir: str, pair: Any
) -> None:
    """Rows 24 to 31 of the head stand for no token."""
    loss = open_loss("ce", pair.setup())
    batch, student = batch_of(make_targets(LENGTHS), loss, 50), student_of(student_dir)
    before, _ = gradients(student, batch, loss, FIXED)
    with torch.no_grad():
        student.model.get_output_embeddings().weight[24:] = 50.0
    after, _ = gradients(student, batch, loss, FIXED)
    assert after.ce == before.ce
    assert float(student.model.get_output_embeddings().weight.grad[24:].abs().sum()) == 0.0


@pytest.mark.parametrize("name", ["p-kl", "h-kl", "ce"])
def test_autocast_stays_near_float32(make_targets: Callable[..., str], student_dir: str, pair: Any, name: str) -> None:
    """bfloat16 has 8 bits of mantissa: a few per cent."""
    loss, device = open_loss(name, pair.setup()), torch.device("cpu")
    batch = batch_of(make_targets(LENGTHS), loss, 50)
    found = []
    for autocast in (None, torch.bfloat16):
        student = Student(load_student(student_dir, device, False), device, autocast, 24)
        figures, grads = gradients(student, batch, loss, FIXED)
        found.append((figures.loss, torch.cat([grad.flatten() for grad in grads])))
    (loss32, grad32), (loss16, grad16) = found
    assert loss16 == pytest.approx(loss32, rel=0.02)
    assert torch.cosine_similarity(grad32, grad16, dim=0) > 0.99
