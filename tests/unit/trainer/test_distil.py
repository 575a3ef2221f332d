"""One call for other people's training loops: the values and gradients of ``xtoken train``."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from xtoken import XtokenError, distillation_loss, targets_dataset
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.losses import open_loss
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import Sums, score
from xtoken.trainer.student.head import find_head

LENGTHS = [[9, 12, 5, 7], [6, 8, 10, 4]]
WEIGHTS = {"kd_weight": 0.7, "ce_weight": 0.3}


@pytest.fixture
def model(student_dir: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()}


def states(model: Any, batch: dict[str, Any]) -> Tensor:
    found: Tensor = model.base_model(**inputs(batch))[0]
    return found


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "targets"}


def trained(model: Any, dataset: Any, batch: dict[str, Any], setups: list[Any]) -> tuple[Tensor, Sums]:
    """As ``xtoken.trainer.step`` asks for it, from the micro-batch."""
    losses = tuple(open_loss(name, setup) for name, setup in zip(dataset.asked.losses, setups, strict=True))
    student = Student(model, torch.device("cpu"), None, dataset.vocabulary, find_head(model))
    micro = batch["targets"].micro
    totals = [len(micro.label_P), *(one.total for one in micro.targets)]
    weights = [WEIGHTS["ce_weight"]] + [WEIGHTS["kd_weight"]] * len(losses)
    factors = [weight / total for weight, total in zip(weights, totals, strict=True)]
    value, sums = score(Objective(student, losses), micro, factors)
    return value, Sums.of(sums.tolist(), len(losses))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "ce"])
def test_values_and_gradients_are_those_of_the_trainer(
    make_targets: Callable[..., str], pair: Any, model: Any, loss: str, pack: bool
) -> None:
    dataset = targets_dataset(make_targets(LENGTHS, losses=(loss,)), loss, pack=pack, max_tokens=32)
    batch = dataset.collate(list(dataset))
    value, sums = trained(model, dataset, batch, [pair.setup()])
    wanted = gradients(model, value)
    fused = distillation_loss(states(model, batch), batch["targets"], head=model, **WEIGHTS)
    assert fused.loss.item() == value.item()
    found = gradients(model, fused.loss)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=0)
    logits = model(**inputs(batch)).logits
    plain = distillation_loss(logits, batch["targets"], **WEIGHTS)
    assert plain.loss.item() == pytest.approx(value.item(), rel=1e-6)
    for name, grad in gradients(model, plain.loss).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-7)
    totals = batch["targets"].totals
    assert fused.ce == pytest.approx(sums.ce / totals[0], rel=1e-9)
    assert fused.teachers == pytest.approx([sums.plain[0] / totals[1]], rel=1e-9)
    assert fused.loss.item() == pytest.approx(0.7 * fused.kd + 0.3 * fused.ce, rel=1e-5)


def test_two_teachers_weigh_as_asked(make_targets: Callable[..., str], pair: Any, model: Any) -> None:
    roots = [make_targets(LENGTHS, name, seed=0) for name in ("one", "two")]
    dataset = targets_dataset(roots, ["p-kl", "h-kl"], weights=[3.0, 1.0])
    batch = dataset.collate(list(dataset))
    value, _ = trained(model, dataset, batch, [pair.setup()] * 2)
    fused = distillation_loss(states(model, batch), batch["targets"], head=model, **WEIGHTS)
    assert fused.loss.item() == value.item()
    assert fused.kd == pytest.approx(0.75 * fused.teachers[0] + 0.25 * fused.teachers[1], rel=1e-6)


def test_a_step_of_several_batches_is_that_of_one(make_targets: Callable[..., str], model: Any) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    samples = list(dataset)
    whole, parts = dataset.collate(samples), [dataset.collate(samples[:3]), dataset.collate(samples[3:])]
    wanted = gradients(model, distillation_loss(states(model, whole), whole["targets"], head=model).loss)
    model.zero_grad()
    for batch in parts:
        distillation_loss(
            states(model, batch), batch["targets"], head=model, step=[one["targets"] for one in parts]
        ).loss.backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_options_of_the_loss_reach_it(make_targets: Callable[..., str], pair: Any, model: Any) -> None:
    root, found = make_targets(LENGTHS), []
    for options in ({}, {"kl": "reverse"}):
        dataset = targets_dataset(root, **options)
        batch = dataset.collate(list(dataset))
        value, _ = trained(model, dataset, batch, [pair.setup(**options)])
        found.append(distillation_loss(states(model, batch), batch["targets"], head=model, **WEIGHTS).loss.item())
        assert found[-1] == value.item()
    assert found[0] != found[1]


def test_autocast_is_that_of_the_loop(make_targets: Callable[..., str], model: Any) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    batch = dataset.collate(list(dataset))
    exact = distillation_loss(states(model, batch), batch["targets"], head=model).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = distillation_loss(states(model, batch), batch["targets"], head=model).loss
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact
    assert rounded.item() == pytest.approx(exact, rel=0.02)


def test_what_does_not_fit_the_batch_is_refused(make_targets: Callable[..., str], model: Any) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    samples = list(dataset)
    batch, other = dataset.collate(samples), dataset.collate(samples[:2])
    logits = model(**inputs(batch)).logits
    with pytest.raises(XtokenError, match="give logits or hidden states of all positions"):
        distillation_loss(logits, other["targets"])
    with pytest.raises(XtokenError, match="give logits or hidden states of all positions"):
        distillation_loss(logits[:, :-1], batch["targets"])
    with pytest.raises(XtokenError, match="hidden states of width 16, and this has 32; of logits leave head out"):
        distillation_loss(logits, batch["targets"], head=model)
    with pytest.raises(XtokenError, match="targets are a dict: give batch"):
        distillation_loss(logits, batch)  # type: ignore[arg-type]
    with pytest.raises(XtokenError, match=r"predicts 20 tokens, and those of .* go up to 23"):
        distillation_loss(logits[..., :20], batch["targets"])


def test_a_model_is_not_kept(make_targets: Callable[..., str], student_dir: str) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    batch = dataset.collate(list(dataset))
    model: Any = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    for _ in range(2):
        distillation_loss(states(model, batch), batch["targets"], head=model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
